/** The logit lens: what the residual stream at one token would predict, layer by layer. */
import { currentModel } from "./asking";
import { whyNot } from "./features";
import type { LensReadingJson, PredictionJson } from "./gen/tdb/inference/v1/run_pb";
import { run } from "./inference";
import { full, num, percent, signed } from "./numbers";
import { problems } from "./problems";
import { lensRequest } from "./requests";
import { answer } from "./state";
import { useLatest } from "./tokenise";
import { TokenAt, TokenText } from "./tokens";
import { onePlace } from "./view";

const LIKELIEST = 4;

export function Lens() {
  const shown = answer.value;
  const tokens = shown?.response.tokens ?? [];
  const position = onePlace.value ?? tokens.length - 1;
  const why = whyNot("run.logit_lens");
  const request =
    shown && !why && position >= 0 && position < tokens.length
      ? lensRequest({ ...shown.question, model: currentModel() }, position, LIKELIEST)
      : null;
  const key = request && JSON.stringify(request);
  const { value, error, key: at } = useLatest(key, (signal) => run(request!, { signal }), 0);
  const wrong = error ? problems(error)[0]?.text : undefined;
  if (why) return <p class="quiet-text">No logit lens: {why}</p>;
  return (
    <div class="lens">
      <p class="quiet-text">
        what the stream after <TokenAt tokens={tokens} position={position} /> would predict;{" "}
        {onePlace.value === null
          ? "choose a token above for another"
          : "clear the token for the last"}
      </p>
      {wrong && (
        <p class="error" role="alert">
          {wrong}
        </p>
      )}
      <div class="lens-box" tabIndex={0} role="region" aria-label="Logit lens">
        <table data-waiting={at === key ? undefined : ""}>
          <thead>
            <tr>
              <th scope="col">point</th>
              <th scope="col" title="Mean target logit minus mean distractor logit, read here">
                diff.
              </th>
              <th scope="col" colSpan={LIKELIEST}>
                likeliest
              </th>
            </tr>
          </thead>
          <tbody>
            {(value?.logitLens ?? []).map((reading) => (
              <Reading
                key={reading.point}
                reading={reading}
                targets={shown?.question.targets.length ?? 0}
              />
            ))}
          </tbody>
        </table>
      </div>
    </div>
  );
}

function Reading({ reading, targets }: { reading: LensReadingJson; targets: number }) {
  const [next] = reading.nextTokens ?? [];
  const named = next?.named ?? [];
  const difference = mean(named.slice(0, targets)) - mean(named.slice(targets));
  return (
    <tr>
      <th scope="row">
        <code>{reading.point}</code>
      </th>
      <td title={full(difference)}>{signed(difference)}</td>
      {(next?.top ?? []).map(({ token, probability, logit }) => (
        <td
          key={token?.id ?? 0}
          class="lens-token"
          title={`id ${token?.id ?? 0}, logit ${full(num(logit) ?? 0)}`}
        >
          <TokenText token={token} /> <small>{percent(num(probability) ?? 0)}</small>
        </td>
      ))}
    </tr>
  );
}

function mean(predictions: readonly PredictionJson[]): number {
  if (predictions.length === 0) return 0;
  return predictions.reduce((sum, { logit }) => sum + (num(logit) ?? 0), 0) / predictions.length;
}
