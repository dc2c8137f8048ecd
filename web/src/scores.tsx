/** The scores of an explanation: each with its interval, what guessing gives, and what failed. */
import type { ScoreJson } from "./gen/tdb/explainer/v1/explanation_pb";
import { full, num } from "./numbers";
import {
  SCORERS,
  failureWords,
  figure,
  measureMeaning,
  measureName,
  scorerName,
  scoreTitle,
} from "./worth";

export function Scores({ scores }: { scores: readonly ScoreJson[] }) {
  if (scores.length === 0)
    return <p class="quiet-text">Not scored: nobody knows what it is worth.</p>;
  const measured = scores.some(({ measure }) => measure !== "MEASURE_PUBLISHED");
  return (
    <table class="scores">
      <thead>
        <tr>
          <th scope="col">score</th>
          <th scope="col" class="number">
            value
          </th>
          {measured && (
            <>
              <th scope="col" title="Bootstrap interval over documents">
                95 %
              </th>
              <th scope="col" class="number" title="What guessing gives">
                chance
              </th>
              <th scope="col" class="number" title="Items that were answered">
                n
              </th>
              <th scope="col" title="Items that were not answered, which are in no number">
                failed
              </th>
              <th scope="col">judge</th>
            </>
          )}
        </tr>
      </thead>
      <tbody>
        {ordered(scores).map((score, i) => (
          <Row key={i} score={score} measured={measured} />
        ))}
      </tbody>
    </table>
  );
}

const SCORERS_IN_ORDER: string[] = Object.keys(SCORERS);

/** By scorer, the measure that explanations are compared by first; equal ones stay the newest first. */
export function ordered(scores: readonly ScoreJson[]): ScoreJson[] {
  const place = ({ scorer = "SCORER_UNSPECIFIED", measure }: ScoreJson) =>
    2 * SCORERS_IN_ORDER.indexOf(scorer) +
    (measure === "MEASURE_AUC" || measure === "MEASURE_PEARSON" ? 0 : 1);
  return [...scores].sort((a, b) => place(a) - place(b));
}

function Row({ score, measured }: { score: ScoreJson; measured: boolean }) {
  const [value, low, high, chance] = [score.value, score.low, score.high, score.chance].map(num);
  const { n = 0, judge = "", seed, dataset = "", codeVersion } = score;
  const failed = failureWords(score);
  const where = [
    dataset && `on ${dataset}`,
    seed !== undefined && `seed ${seed}`,
    codeVersion && `scored by version ${codeVersion}`,
  ]
    .filter(Boolean)
    .join(", ");
  return (
    <tr title={`${scoreTitle(score)}${where === "" ? "" : `; ${where}`}`}>
      <th scope="row">
        {scorerName(score.scorer)} <span title={measureMeaning(score)}>{measureName(score)}</span>
      </th>
      <td class="number" title={value === undefined ? "Not defined here" : full(value)}>
        <strong>{value === undefined ? "–" : figure(value)}</strong>
      </td>
      {measured && (
        <>
          <td>
            {low === undefined || high === undefined ? "" : `${figure(low)} – ${figure(high)}`}
          </td>
          <td class="number">{chance === undefined ? "" : figure(chance)}</td>
          <td class="number">{n === 0 ? "" : n}</td>
          <td class={failed ? "error" : undefined}>{failed || (n > 0 ? "0" : "")}</td>
          <td>{judge}</td>
        </>
      )}
    </tr>
  );
}
