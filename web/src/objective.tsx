/**
 * The objective's value, and how the direct effects add up to it.
 *
 * listed + unlisted + remainder = J holds for every answer; all four numbers are shown, and a share only
 * where J is not near 0, because a percentage of nothing says nothing.
 */
import type { TotalsJson } from "./gen/tdb/inference/v1/attribute_pb";
import { tableRequest } from "./asking";
import { CopyButtons } from "./copy";
import { difference, SIDE_NAMES } from "./columns";
import { EffectsByToken } from "./effects";
import { Meaning, title, unit } from "./meaning";
import { count, full, num, percent, plain, signed } from "./numbers";
import { answer, compared, paired, type Answer } from "./state";

export function ObjectiveCard() {
  const shown = answer.value;
  return (
    <section class="card objective-card" aria-label="Objective">
      <h2>{shown ? title(shown.question) : "Objective"}</h2>
      {shown && <Meaning answer={shown} />}
      {shown && (
        <div class="value-and-sum">
          <Value answer={shown} />
          <Sum answer={shown} />
        </div>
      )}
      {shown && <EffectsByToken />}
      {shown && <Provenance answer={shown} />}
    </section>
  );
}

function Value({ answer: { question, response } }: { answer: Answer }) {
  const now = num(response.objectiveValue) ?? 0;
  const before = num(response.compareValue);
  const delta = difference(now, before);
  const b = compared.value === "b";
  return (
    <p class="objective-value" aria-live="polite">
      <strong
        data-testid="objective"
        data-value={now}
        title={`J = ${full(now)}, in ${unit(question)}`}
      >
        {signed(now)}
      </strong>
      {before !== undefined && delta !== undefined && (
        <span class="was">
          {b ? "B" : "was"}{" "}
          <span data-testid="objective-before" data-value={before} title={full(before)}>
            {signed(before)}
          </span>
          <span class="quiet-text" title={full(delta)}>
            {" "}
            {b ? "A − B" : "Δ"} {signed(delta)}
          </span>
        </span>
      )}
    </p>
  );
}

const PARTS = [
  ["listed", "Direct effects of the nodes in the table"],
  ["unlisted", "Direct effects of the nodes that did not make it into the table"],
  ["remainder", "Biases, constants and the rest: what no node carries"],
] as const satisfies [keyof TotalsJson, string][];

function Sum({ answer: { question, response } }: { answer: Answer }) {
  const { totals, compareTotals } = response;
  if (!totals) return null;
  const j = num(response.objectiveValue) ?? 0;
  const size = PARTS.reduce((sum, [part]) => sum + Math.abs(num(totals[part]) ?? 0), 0);
  const sides = SIDE_NAMES[compared.value ?? "untouched"];
  const tellShare = Math.abs(j) > 0.05 * size;
  return (
    <table class="sum" title={`Sums of the direct-effect column, in ${unit(question)}`}>
      <thead>
        <tr>
          <th scope="col">direct effects</th>
          {paired.value && <th scope="col">{sides.before}</th>}
          <th scope="col">{paired.value ? sides.after : ""}</th>
          <th scope="col">{tellShare ? "share" : ""}</th>
        </tr>
      </thead>
      <tbody>
        {PARTS.map(([part, meaning]) => {
          const now = num(totals[part]) ?? 0;
          return (
            <tr key={part} title={meaning}>
              <th scope="row">{part}</th>
              {paired.value && <Figure x={num(compareTotals?.[part])} />}
              <Figure x={now} />
              <td>{tellShare ? share(now / j) : ""}</td>
            </tr>
          );
        })}
        <tr class="total" title="listed + unlisted + remainder">
          <th scope="row">objective</th>
          {paired.value && <Figure x={num(response.compareValue)} />}
          <Figure x={j} />
          <td />
        </tr>
      </tbody>
    </table>
  );
}

function share(fraction: number): string {
  return fraction < 0 ? `−${percent(-fraction)}` : percent(fraction);
}

function Figure({ x }: { x: number | undefined }) {
  return (
    <td title={x === undefined ? "no value" : full(x)}>{x === undefined ? "–" : signed(x)}</td>
  );
}

/** Where the numbers come from: timings, cache, warnings, and the request to send again. */
function Provenance({ answer: { question, response } }: { answer: Answer }) {
  const { manifest } = response;
  const t = manifest?.timings;
  const spent = [t?.queueMs, t?.forwardMs, t?.backwardMs, t?.readOutMs].map((ms) => num(ms) ?? 0);
  const total = spent.reduce((a, b) => a + b, 0);
  const [queue, forward, backward, readOut] = spent.map(plain);
  const shared =
    (t?.sharedBy ?? 1) > 1 ? ` · one pass with ${count(t!.sharedBy! - 1, "other request")}` : "";
  return (
    <footer class="provenance">
      {(manifest?.warnings ?? []).map((warning) => (
        <p key={warning} class="warning">
          {warning}
        </p>
      ))}
      <span
        title={`queue ${queue} ms · forward ${forward} ms · backward ${backward} ms · read-out ${readOut} ms${shared}`}
      >
        {manifest?.cached ? "from the cache" : `${plain(total)} ms`}
      </span>
      {manifest?.resultId && (
        <span class="token" title={`Result ${manifest.resultId}`}>
          {manifest.resultId.slice(0, 8)}
        </span>
      )}
      <CopyButtons method="Attribute" request={tableRequest(question)} />
    </footer>
  );
}
