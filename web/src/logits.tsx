/** What the model says next: exact logits and probabilities, of this run and the one it stands beside. */
import { difference } from "./columns";
import type { PredictionJson } from "./gen/tdb/inference/v1/run_pb";
import { full, num, percent, plain, signed } from "./numbers";
import { Lens } from "./lens";
import { answer, compared, lens, paired, problemsAt, type Outlook } from "./state";
import { TokenText } from "./tokens";
import { writeAddress } from "./view";

const MARKS = {
  target: { mark: "●", title: "target" },
  distractor: { mark: "○", title: "distractor" },
  likely: { mark: "", title: "" },
} as const;

export function Logits() {
  return (
    <section class="card logits" aria-label="Next token">
      <header class="card-head">
        <h2>{lens.value ? "Logit lens" : "Next token"}</h2>
        <button
          type="button"
          class="link"
          title={
            lens.value
              ? "Back to what the model says next"
              : "What the residual stream at a token would predict, layer by layer"
          }
          onClick={() => {
            lens.value = !lens.value;
            writeAddress();
          }}
        >
          {lens.value ? "next token" : "logit lens"}
        </button>
      </header>
      {lens.value ? <Lens /> : <NextToken />}
    </section>
  );
}

function NextToken() {
  const outlooks = answer.value?.outlooks;
  const two = paired.value;
  const b = compared.value === "b";
  const [now, base, without] = b
    ? ["A", "B", "after prompt B"]
    : ["now", "base", "without the interventions"];
  const refused = problemsAt("prediction")[0]?.text;
  return (
    <>
      {refused && (
        <p class="error" role="alert">
          {refused}
        </p>
      )}
      <table data-waiting={outlooks ? undefined : ""}>
        <thead>
          <tr>
            <th scope="col">token</th>
            <th scope="col" title={b ? "Logit after this prompt, A" : "Logit of this run"}>
              {two ? now : "logit"}
            </th>
            {two && (
              <>
                <th scope="col" title={`Logit ${without}`}>
                  {base}
                </th>
                <th scope="col" title={`Logit ${now} minus logit ${base}`}>
                  Δ
                </th>
              </>
            )}
            <th scope="col" title="Probability, in this run">
              prob.
            </th>
            {two && (
              <th scope="col" title={`Probability ${without}`}>
                {base}
              </th>
            )}
          </tr>
        </thead>
        <tbody>
          {(outlooks ? ordered(outlooks) : []).map((outlook) => (
            <Row key={outlook.now.token?.id ?? 0} outlook={outlook} two={two} />
          ))}
        </tbody>
      </table>
    </>
  );
}

const SHOWN = 10;

/** Targets, distractors, then what this run finds likeliest. */
export function ordered(outlooks: Outlook[]): Outlook[] {
  const rank = { target: 0, distractor: 1, likely: 2 };
  return [...outlooks]
    .sort((a, b) => rank[a.role] - rank[b.role] || logit(b.now) - logit(a.now))
    .filter(({ role }, index) => role !== "likely" || index < SHOWN);
}

function logit(prediction: PredictionJson): number {
  return num(prediction.logit) ?? 0;
}

function Row({ outlook: { role, now, base }, two }: { outlook: Outlook; two: boolean }) {
  const { mark, title } = MARKS[role];
  const delta = difference(num(now.logit), num(base?.logit));
  return (
    <tr class={role}>
      <th scope="row" title={`id ${now.token?.id ?? 0}`}>
        <TokenText token={now.token} />{" "}
        {mark && (
          <span title={title} role="img" aria-label={title}>
            {mark}
          </span>
        )}
      </th>
      <Figure x={num(now.logit)} write={plain} />
      {two && <Figure x={num(base?.logit)} write={plain} />}
      {two && <Figure x={delta} write={signed} />}
      <Figure x={num(now.probability)} write={percent} />
      {two && <Figure x={num(base?.probability)} write={percent} />}
    </tr>
  );
}

function Figure({ x, write }: { x: number | undefined; write: (x: number) => string }) {
  return <td title={x === undefined ? "no value" : full(x)}>{x === undefined ? "–" : write(x)}</td>;
}
