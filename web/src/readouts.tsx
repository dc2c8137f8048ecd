/** Token read-outs: which tokens a node's write promotes and demotes, and which tokens it reads. */
import { site } from "./address";
import { whyNot } from "./features";
import type { NodeRowJson, SourceScoreJson } from "./gen/tdb/inference/v1/attribute_pb";
import type { TokenScoreJson } from "./gen/tdb/type/v1/token_pb";
import { full, num, signed } from "./numbers";
import { answer } from "./state";
import { TokenAt, TokenText } from "./tokens";

const PROMOTED_IN_LINE = 3;
const DEMOTED_IN_LINE = 2;

export function hasReadOuts(row: NodeRowJson): boolean {
  const { outputTokens, inputTokens, keyInputTokens } = row;
  return [outputTokens, inputTokens, keyInputTokens].some((scores) => (scores ?? []).length > 0);
}

/** The scores of one sign, largest first. A score of 0 says nothing. */
export function ofSign(scores: readonly TokenScoreJson[] = [], sign: 1 | -1): TokenScoreJson[] {
  const size = ({ score }: TokenScoreJson) => sign * (num(score) ?? 0);
  return scores.filter((each) => size(each) > 0).sort((a, b) => size(b) - size(a));
}

/** `promotes ␣Mary ␣Anna demotes ␣John`, in one line. */
export function InLine({ row }: { row: NodeRowJson }) {
  const parts = [
    { verb: "promotes", scores: ofSign(row.outputTokens, 1), most: PROMOTED_IN_LINE },
    { verb: "demotes", scores: ofSign(row.outputTokens, -1), most: DEMOTED_IN_LINE },
  ].filter(({ scores }) => scores.length > 0);
  return (
    <>
      {parts.map(({ verb, scores, most }) => (
        <span key={verb} class="part">
          {verb}
          {scores.slice(0, most).map((score) => (
            <span key={score.token?.id ?? 0} title={told(score)}>
              {" "}
              <TokenText token={score.token} />
            </span>
          ))}
        </span>
      ))}
    </>
  );
}

function told({ token, score }: TokenScoreJson): string {
  return `token ${token?.id ?? 0}: ${full(num(score) ?? 0)} logits`;
}

/** Everything that is known of the row's tokens, one line each; or why nothing is. */
export function ReadOuts({ row }: { row: NodeRowJson }) {
  const reason = whyNot("attribute.read_outs");
  if (reason) return <p class="quiet-text">No token read-outs: {reason}</p>;
  const { outputTokens, inputTokens, keyInputTokens } = row;
  const pair = site(row.node ?? "").kind === "head";
  const reads = pair
    ? "The score's gradient, by token embedding"
    : "Its gradient, by token embedding";
  const lines: Line[] = [
    {
      name: "promotes",
      title: "Tokens whose logit the write raises most, in logits",
      scores: ofSign(outputTokens, 1),
      unit: "logits",
    },
    {
      name: "demotes",
      title: "Tokens whose logit the write lowers most, in logits",
      scores: ofSign(outputTokens, -1),
      unit: "logits",
    },
    {
      name: pair ? "reads by query" : "reads",
      title: pair ? `${reads} at the token that reads` : reads,
      scores: inputTokens ?? [],
      unit: "",
    },
    {
      name: "reads by key",
      title: `${reads} at the token that is read`,
      scores: keyInputTokens ?? [],
      unit: "",
    },
  ];
  const known = lines.filter(({ scores }) => scores.length > 0);
  const sources = row.sources ?? [];
  if (known.length === 0 && sources.length === 0) return null;
  return (
    <dl class="read-outs">
      {known.map((line) => (
        <Scores key={line.name} line={line} />
      ))}
      {sources.length > 0 && <Sources sources={sources} />}
    </dl>
  );
}

/** Which tokens an attention latent's value comes from, all heads together. */
function Sources({ sources }: { sources: SourceScoreJson[] }) {
  const tokens = answer.value?.response.tokens ?? [];
  return (
    <>
      <dt title="How much of the latent's value comes through each token, in units of its activation">
        comes from
      </dt>
      <dd>
        {sources.map(({ position = 0, score }) => (
          <span key={position} class="chip" title={full(num(score) ?? 0)}>
            <TokenAt tokens={tokens} position={position} /> <small>{signed(num(score) ?? 0)}</small>
          </span>
        ))}
      </dd>
    </>
  );
}

interface Line {
  name: string;
  title: string;
  scores: TokenScoreJson[];
  unit: string;
}

function Scores({ line: { name, title, scores, unit } }: { line: Line }) {
  return (
    <>
      <dt title={title}>{name}</dt>
      <dd>
        {scores.map((score) => (
          <TokenChip key={score.token?.id ?? 0} score={score} unit={unit} />
        ))}
      </dd>
    </>
  );
}

/** A token with its score, the exact number one hover away. */
export function TokenChip({
  score: { token, score },
  unit,
}: {
  score: TokenScoreJson;
  unit: string;
}) {
  const x = num(score) ?? 0;
  return (
    <span class="chip" title={`token ${token?.id ?? 0}: ${full(x)} ${unit}`.trim()}>
      <TokenText token={token} /> <small>{signed(x)}</small>
    </span>
  );
}
