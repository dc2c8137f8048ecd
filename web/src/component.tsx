/** What a component is without a prompt: the tokens it writes and reads, and those most like it. */
import { useState } from "preact/hooks";
import { site } from "./address";
import { currentModel } from "./asking";
import { CopyButtons } from "./copy";
import { dictionaryOf, whyNot } from "./features";
import type {
  ComponentDirectionJson,
  DescribeComponentRequestJson,
  DescribeComponentResponseJson,
} from "./gen/tdb/inference/v1/component_pb";
import { describeComponent } from "./inference";
import { full, num, plain, signed } from "./numbers";
import { problems } from "./problems";
import { TokenChip } from "./readouts";
import { useLatest } from "./tokenise";
import { setFilter } from "./view";

/** Room the section takes in an open row, whatever is in it: fixed, so that the table's window can count. */
export function componentHeight(node: string): number {
  const { kind } = site(node);
  return kind === "head" ? 136 : describable(node) ? 96 : 0;
}

const TOKENS = 6;
const MORE_TOKENS = 10;
const SIMILAR = 8;
const REMEMBERED = 200;
const memory = new Map<string, DescribeComponentResponseJson>();

/** Whether the component can be described at all: an embedding has nothing but its token. */
export function describable(node: string): boolean {
  return ["head", "neuron", "latent"].includes(site(node).kind);
}

function description(component: string, tokens = TOKENS): DescribeComponentRequestJson {
  return { model: currentModel(), component, tokens, similar: SIMILAR };
}

async function described(
  request: DescribeComponentRequestJson,
  signal: AbortSignal,
): Promise<DescribeComponentResponseJson> {
  const key = JSON.stringify(request);
  const known = memory.get(key);
  if (known) return known;
  const answer = await describeComponent(request, { signal });
  if (memory.size >= REMEMBERED) memory.clear();
  memory.set(key, answer);
  return answer;
}

export function Component({ node }: { node: string }) {
  const own = site(node).component;
  const [component, setComponent] = useState(own);
  const why = whyNot("describe_component");
  const { value, error } = useLatest(
    why === undefined ? component : null,
    (signal) => described(description(component), signal),
    0,
  );
  const shown = value?.component === component ? value : null;
  const wrong = error && !shown ? problems(error)[0]?.text : undefined;
  return (
    <section
      class="component"
      aria-label={`Component ${component}`}
      style={{ height: `${componentHeight(node)}px` }}
    >
      <header>
        <span class="quiet-text">without a prompt</span> <code>{component}</code>
        {component !== own && (
          <button type="button" class="link" onClick={() => setComponent(own)}>
            back to {own}
          </button>
        )}
        {component !== own && (
          <button
            type="button"
            class="link"
            title="List only its rows; the filter can be removed above the table"
            onClick={() => setFilter("node", component)}
          >
            its rows
          </button>
        )}
        {why === undefined && (
          <CopyButtons method="DescribeComponent" request={description(component)} />
        )}
      </header>
      {why && <p class="quiet-text">Nothing is known of the component: {why}</p>}
      {wrong && (
        <p class="error" role="alert">
          {wrong}
        </p>
      )}
      {(shown ?? value) && (
        <dl class="read-outs" data-waiting={shown ? undefined : ""}>
          <Similar value={shown ?? value} onChoose={setComponent} />
          {((shown ?? value)?.directions ?? []).flatMap((direction) => lines(direction))}
        </dl>
      )}
    </section>
  );
}

/** The same in a view of its own, with more tokens. */
export function Directions({
  component,
  onChoose,
}: {
  component: string;
  onChoose: (component: string) => void;
}) {
  const unserved = site(component).kind === "latent" && !dictionaryOf(component);
  const why = unserved
    ? "The loaded model serves no dictionary with this latent."
    : whyNot("describe_component");
  const request = description(component, MORE_TOKENS);
  const { value, error } = useLatest(
    why === undefined ? JSON.stringify(request) : null,
    (signal) => described(request, signal),
    0,
  );
  const shown = value?.component === component ? value : null;
  const wrong = error && !shown ? problems(error)[0]?.text : undefined;
  return (
    <section class="directions" aria-label="What it writes and reads">
      <h2 title="From the weights alone, without a prompt">writes and reads</h2>
      {why && <p class="quiet-text">{why}</p>}
      {wrong && <p class="error">{wrong}</p>}
      {!why && !wrong && !value && <p class="quiet-text">Reading the weights…</p>}
      {value && !wrong && (
        <dl class="read-outs" data-waiting={shown ? undefined : ""}>
          {(value.directions ?? []).flatMap((direction) => lines(direction))}
          <Similar value={value} onChoose={onChoose} />
        </dl>
      )}
    </section>
  );
}

/** A line for what a direction writes and one for each thing it reads. */
function lines(direction: ComponentDirectionJson) {
  const { name = "", outputTokens = [], inputTokens = [], keyInputTokens = [] } = direction;
  const head = name.startsWith("ov") || name.startsWith("qk");
  const size = `${head ? "Singular value" : "Length"} ${full(num(direction.norm) ?? 0)}`;
  return [
    {
      does: "writes",
      scores: outputTokens,
      says: "Tokens whose logit it moves most, scales omitted",
    },
    {
      does: keyInputTokens.length > 0 ? "query reads" : "reads",
      scores: inputTokens,
      says: "Tokens whose embedding lies most along it",
    },
    { does: "key reads", scores: keyInputTokens, says: "The same for the key's side" },
  ]
    .filter(({ scores }) => scores.length > 0)
    .map(({ does, scores, says }) => (
      <div key={`${name} ${does}`} class="line">
        <dt title={`${says}. ${size}`}>
          {head && <span class="token">{name} </span>}
          {does}
          <small> {plain(num(direction.norm) ?? 0)}</small>
        </dt>
        <dd>
          {scores.map((score) => (
            <TokenChip key={score.token?.id ?? 0} score={score} unit="" />
          ))}
        </dd>
      </div>
    ));
}

interface SimilarProps {
  value: DescribeComponentResponseJson | null;
  onChoose: (component: string) => void;
}

function Similar({ value, onChoose }: SimilarProps) {
  const similar = value?.similar ?? [];
  if (similar.length === 0) return null;
  return (
    <div class="line">
      <dt title="Cosine of what they write; choose one to see what it does">similar</dt>
      <dd>
        {similar.map(({ component = "", cosine }) => (
          <button key={component} type="button" class="link" onClick={() => onChoose(component)}>
            <span class="token">{component}</span> <small>{signed(num(cosine) ?? 0)}</small>
          </button>
        ))}
      </dd>
    </div>
  );
}
