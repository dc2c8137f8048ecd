/** Tokens in a record: where the component is strongest on average, and what its source says it promotes. */
import type {
  ComponentRecordJson,
  TextScoreJson,
  TokenStatisticJson,
} from "./gen/tdb/dataset/v1/record_pb";
import { full, num, plain, signed } from "./numbers";
import { visible } from "./tokens";

const MEANS = 12;

interface RecordProps {
  record: ComponentRecordJson;
}

export function RecordTokens({ record }: RecordProps) {
  return (
    <>
      <Means record={record} />
      <Listed record={record} />
    </>
  );
}

/** The tokens at which it is strongest on average. */
function Means({ record: { tokenStatistics = [], keyTokenStatistics = [] } }: RecordProps) {
  if (tokenStatistics.length === 0 && keyTokenStatistics.length === 0) return null;
  const pairs = keyTokenStatistics.length > 0;
  const chips = (name: string, meaning: string, all: TokenStatisticJson[]) =>
    all.length > 0 && (
      <>
        <dt title={meaning}>{name}</dt>
        <dd>
          {all.slice(0, MEANS).map(({ tokenId = 0, tokenText = "", count, mean }) => (
            <span
              key={tokenId}
              class="chip"
              title={`token ${tokenId}: ${full(num(mean) ?? 0)} on average, counted ${count ?? 0} times`}
            >
              <span class="token">{visible(tokenText) || `<${tokenId}>`}</span>{" "}
              <small>{plain(num(mean) ?? 0)}</small>
            </span>
          ))}
        </dd>
      </>
    );
  return (
    <section aria-label="Tokens by mean activation">
      <h2>strongest on average</h2>
      <dl class="read-outs">
        {chips(
          pairs ? "by the token that reads" : "at the token",
          "Tokens with the largest mean activation over the corpus",
          tokenStatistics,
        )}
        {chips("by the token that is read", "The same by the key of the pair", keyTokenStatistics)}
      </dl>
    </section>
  );
}

/** Tokens that the record lists, where it does: those that its source lists, or the model's own. */
function Listed({ record: { promoted = [], suppressed = [] } }: RecordProps) {
  if (promoted.length === 0 && suppressed.length === 0) return null;
  const chips = (name: string, scores: TextScoreJson[]) =>
    scores.length > 0 && (
      <>
        <dt title="As the records list them: logits per unit of activation, without a prompt">
          {name}
        </dt>
        <dd>
          {scores.map(({ text = "", score }, i) => (
            <span key={i} class="chip" title={full(num(score) ?? 0)}>
              <span class="token">{visible(text)}</span> <small>{signed(num(score) ?? 0)}</small>
            </span>
          ))}
        </dd>
      </>
    );
  return (
    <section aria-label="Tokens listed by the records">
      <h2>by the records</h2>
      <dl class="read-outs">
        {chips("promotes", promoted)}
        {chips("suppresses", suppressed)}
      </dl>
    </section>
  );
}
