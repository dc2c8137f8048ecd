/** The line above the table: how many rows, ranked by what, filtered to which token. */
import { change } from "./asking";
import { count } from "./numbers";
import { answer, asked, tokenFilter } from "./state";
import { TokenAt } from "./tokens";
import { DEFAULT_ROWS, RANK_NAMES, type Rank } from "./url";

const RANK_WORDS: Record<Rank, string> = {
  total: "total effect",
  direct: "direct effect",
  write: "write magnitude",
  activation: "activation",
  each: "each column",
};

export function TableBar({ rows }: { rows: number }) {
  const { rankBy = "total", rows: wanted = DEFAULT_ROWS } = asked.value ?? {};
  const most = answer.value?.response.rows?.length ?? 0;
  const token = tokenFilter.value;
  const sizes = [...new Set([20, 50, 200, 1000, wanted])].sort((a, b) => a - b);
  return (
    <div class="table-bar">
      <span>{rows === most ? count(most, "node") : `${rows} of ${count(most, "node")}`}</span>
      <label>
        ranked by{" "}
        <select
          value={rankBy}
          title="Which nodes are listed: the largest by this column. Choosing asks again"
          onChange={(event) => {
            const rank = event.currentTarget.value as Rank;
            change(() => ({ rankBy: rank }));
          }}
        >
          {RANK_NAMES.map((rank) => (
            <option key={rank} value={rank}>
              {RANK_WORDS[rank]}
            </option>
          ))}
        </select>
      </label>
      <label>
        rows{" "}
        <select
          value={String(wanted)}
          title="How many nodes are listed. Choosing asks again"
          onChange={(event) => {
            const size = Number(event.currentTarget.value);
            change(() => ({ rows: size }));
          }}
        >
          {sizes.map((size) => (
            <option key={size} value={String(size)}>
              {size}
            </option>
          ))}
        </select>
      </label>
      {token !== null && (
        <span class="chip">
          at <TokenAt tokens={answer.value?.response.tokens ?? []} position={token} />
          <button
            type="button"
            class="remove"
            aria-label="List the nodes of all tokens"
            onClick={() => (tokenFilter.value = null)}
          >
            ×
          </button>
        </span>
      )}
      <span class="keys" title="Keyboard">
        <kbd>j</kbd> <kbd>k</kbd> move · <kbd>a</kbd> ablate · <kbd>u</kbd> undo · <kbd>/</kbd>{" "}
        prompt
      </span>
    </div>
  );
}
