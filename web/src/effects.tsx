/**
 * Where in the prompt the effect comes from: each kind of node summed per token, in the table's colours.
 * Choosing a token filters the table, as it does in the prompt bar.
 */
import { difference } from "./columns";
import type { TokenEffectsJson } from "./gen/tdb/inference/v1/attribute_pb";
import type { TokenJson } from "./gen/tdb/type/v1/token_pb";
import { brief, full, num, signed } from "./numbers";
import { answer, compared } from "./state";
import { TokenText } from "./tokens";
import { choosePlace, isPlace } from "./view";

const KINDS: Record<string, { name: string; meaning: string }> = {
  embed: { name: "embed", meaning: "The token's embedding" },
  attn_source: { name: "attn from", meaning: "All heads, by the token they read from" },
  attn_reading: {
    name: "attn at",
    meaning: "All heads, or their latents, by the token they write at",
  },
  mlp: { name: "mlp", meaning: "All neurons, or latents, at the token" },
};

export function EffectsByToken() {
  const response = answer.value?.response;
  const all = response?.tokenEffects ?? [];
  const tokens = response?.tokens ?? [];
  const aligned = response?.compareTokens?.length === tokens.length;
  const shown = Object.keys(KINDS).flatMap((kind) => {
    const now = all.find((row) => row.kind === kind && !row.compare);
    const before = aligned ? all.find((row) => row.kind === kind && row.compare) : undefined;
    return now ? [{ now, before }] : [];
  });
  if (shown.length === 0) return null;
  const values = shown.flatMap(({ now }) => (now.totalEffect ?? []).map((x) => num(x) ?? 0));
  const end = Math.max(...values.map(Math.abs), 0);
  return (
    <div class="effects" tabIndex={0} role="region" aria-label="Effect by token">
      <table>
        <caption>
          total effect by token <small>±{signed(end).replace("+", "")}</small>
        </caption>
        <thead>
          <tr>
            <td />
            {tokens.map((token, position) => (
              <th key={position} scope="col">
                <TokenButton token={token} position={position} />
              </th>
            ))}
          </tr>
        </thead>
        <tbody>
          {shown.map(({ now, before }) => (
            <Row key={now.kind} now={now} before={before} end={end} />
          ))}
        </tbody>
      </table>
    </div>
  );
}

function TokenButton({ token, position }: { token: TokenJson; position: number }) {
  const on = isPlace(position);
  return (
    <button
      type="button"
      class="link"
      aria-pressed={on}
      title={`token ${position}; click to list only nodes that read or write here, Shift-click to add it`}
      onClick={(event) => choosePlace(position, event.shiftKey)}
    >
      <TokenText token={token} />
    </button>
  );
}

interface RowProps {
  now: TokenEffectsJson;
  before: TokenEffectsJson | undefined;
  end: number;
}

function Row({ now, before, end }: RowProps) {
  const { name, meaning } = KINDS[now.kind ?? ""] ?? { name: now.kind, meaning: "" };
  return (
    <tr>
      <th scope="row" title={meaning}>
        {name}
      </th>
      {(now.totalEffect ?? []).map((raw, position) => {
        const x = num(raw) ?? 0;
        const was = num(before?.totalEffect?.[position]);
        const delta = difference(x, was);
        const direct = num(now.directEffect?.[position]) ?? 0;
        const change =
          was !== undefined && delta !== undefined
            ? `, ${compared.value === "b" ? "in B" : "was"} ${signed(was)}, diff. ${signed(delta)}`
            : "";
        return (
          <td
            key={position}
            class={`heat ${x < 0 ? "negative" : "positive"}`}
            style={{ "--heat": (end > 0 ? Math.abs(x) / end : 0).toFixed(3) }}
            title={`${meaning}: total ${full(x)}${change}; direct ${full(direct)}`}
          >
            {brief(x)}
          </td>
        );
      })}
    </tr>
  );
}
