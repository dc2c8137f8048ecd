/** The line above the table: how many rows, ranked by what, and the filters. */
import { Fragment } from "preact";
import { change } from "./editing";
import { ExplanationsNote } from "./explainedrow";
import { awayProblem, capabilities, columnWanted, lookingUp } from "./explanations";
import { whyNot } from "./features";
import { count, signed } from "./numbers";
import { Late } from "./late";
import { RowsJob } from "./rowsjob";
import { LatentSwitches } from "./switches";
import { answer, asked, problemsAt, stale } from "./state";
import { TokenText } from "./tokens";
import { DEFAULT_ROWS, RANK_NAMES, type Rank } from "./url";
import { cancelVerify, verifying, verifyRows } from "./verifying";
import { activeFilters, allRows, clearFilters, setFilter, shownRows } from "./view";

const RANK_WORDS: Record<Rank, string> = {
  total: "total effect",
  direct: "direct effect",
  write: "write magnitude",
  activation: "activation",
  each: "each column",
};

const KEYS = ["ablate", "trace", "verify", "open", "explain"];

export function TableBar() {
  const { rankBy = "total", rows: wanted = DEFAULT_ROWS } = asked.value ?? {};
  const [rows, most] = [shownRows.value.length, allRows.value.length];
  const sizes = [...new Set([20, 50, 200, 1000, 10_000, wanted])].sort((a, b) => a - b);
  return (
    <div class="table-bar">
      <span class="count" aria-live="polite">
        {rows === most ? count(most, "row") : `${rows} of ${count(most, "row")}`}
      </span>
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
      <LatentSwitches />
      <Verification />
      <ExplanationSwitch />
      <FilterChips />
      <span
        class="keys"
        title="Keyboard: j and k move, the others do what they stand for; V verifies all, g generates, u undoes, f filters, / goes to the prompt"
      >
        <kbd>j</kbd>
        <kbd>k</kbd>{" "}
        {KEYS.map((word) => (
          <Fragment key={word}>
            <kbd>{word[0]}</kbd>
            {word.slice(1)}{" "}
          </Fragment>
        ))}
        <kbd>/</kbd>
      </span>
    </div>
  );
}

/** Whether what the components do stands in the table; nothing where nobody can say. */
function ExplanationSwitch() {
  if (!capabilities.value) return <ExplanationsNote />;
  return (
    <span class="switch" role="group" aria-label="Explanations">
      <label title="Show or hide the column that says what each component does">
        <input
          type="checkbox"
          checked={columnWanted.value}
          onChange={(event) => (columnWanted.value = event.currentTarget.checked)}
        />{" "}
        explanations
      </label>
      <RowsJob />
      {lookingUp.value && <Late>looking them up…</Late>}
      {awayProblem.value && (
        <span class="quiet-text" title={awayProblem.value.text}>
          the service is away
        </span>
      )}
    </span>
  );
}

/** Verifies every row in sight of the filters; meanwhile how far it is, and afterwards how well they agree. */
function Verification() {
  const why = whyNot("verify");
  const now = verifying.value;
  const agreement = answer.value?.verified.agreement;
  const wrong = problemsAt("verify")[0]?.text;
  return (
    <span class="verification">
      <button
        type="button"
        class="small"
        disabled={why !== undefined || stale.value || shownRows.value.length === 0}
        title={
          why ??
          (now
            ? "Stop; what is verified stays"
            : "Really ablate each of these rows, one by one, for its exact effect (V)")
        }
        onClick={() => (now ? cancelVerify() : void verifyRows(shownRows.value))}
      >
        {now ? "cancel" : "verify all"}
      </button>
      <span aria-live="polite">
        {now ? (
          <>
            <progress value={now.done} max={now.total} aria-label="Verified" /> {now.done} of{" "}
            {now.total}
            {now.waits && <span class="quiet-text"> · {now.waits}</span>}
          </>
        ) : (
          agreement && (
            <span title="Spearman's rank correlation of the estimated and the exact effect">
              rank correlation {signed(agreement.rank)} over {count(agreement.nodes, "node")}
            </span>
          )
        )}
      </span>
      {wrong && (
        <span class="error" role="alert">
          {wrong}
        </span>
      )}
    </span>
  );
}

/** The filters that are set, each removable on its own; one that cannot be read says so. */
function FilterChips() {
  const active = activeFilters.value;
  const problem = active.find((filter) => filter.problem)?.problem;
  if (active.length === 0) return null;
  return (
    <span class="filters">
      {active.map(({ id, words, problem }) => (
        <span key={id} class="chip" data-wrong={problem ? "" : undefined}>
          {words}
          {id === "at" && !problem && <OneToken text={words} />}
          <button
            type="button"
            class="remove"
            aria-label={`Remove filter: ${words}`}
            onClick={() => setFilter(id, "")}
          >
            ×
          </button>
        </span>
      ))}
      <button type="button" class="link" onClick={clearFilters}>
        clear filters
      </button>
      {problem && (
        <span class="error" role="alert">
          {problem}
        </span>
      )}
    </span>
  );
}

/** The token of a filter to one position. */
function OneToken({ text }: { text: string }) {
  const [, position] = /^at (\d+)$/.exec(text) ?? [];
  const token = answer.value?.response.tokens?.[Number(position)];
  return token ? <TokenText token={token} /> : null;
}
