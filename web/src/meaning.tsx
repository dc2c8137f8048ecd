/** What J is, in words: the question's own objective, or the value of the node that is traced. */
import { site } from "./address";
import type { Answer } from "./state";
import { Place, visible } from "./tokens";
import { stepWords, type Step } from "./trace";
import type { Question } from "./url";

/** The question's own objective: `logit difference ␣Mary − ␣John`. */
export function formula({ targets, distractors }: Question) {
  const names = (texts: string[]) => texts.map(visible).join(", ");
  return (
    <>
      {distractors.length > 0 ? "logit difference" : "logit"}{" "}
      <span class="token formula">
        {names(targets)}
        {distractors.length > 0 && ` − ${names(distractors)}`}
      </span>
    </>
  );
}

/** What J is called. */
export function title(question: Question) {
  const step = question.trace.at(-1);
  if (!step) return <span class="capital">{formula(question)}</span>;
  return (
    <>
      {valueOf(step).name} <span class="token formula">{stepWords(step)}</span>
    </>
  );
}

/** What J is when a node is traced: its name, its unit, and the sentence that defines it. */
interface Value {
  name: string;
  unit: string;
  rest: string;
}

const VALUES: Record<string, Value> = {
  neuron: {
    name: "Pre-activation of",
    unit: "pre-activation",
    rest: "the neuron's value before its non-linearity",
  },
  latent: {
    name: "Pre-activation of",
    unit: "pre-activation",
    rest: "the latent's value in the encoder, before its non-linearity, even where it is inactive",
  },
  query: {
    name: "Score of",
    unit: "score",
    rest: "the attention score before the softmax, as the query varies with the key held constant",
  },
  key: {
    name: "Score of",
    unit: "score",
    rest: "the attention score before the softmax, as the key varies with the query held constant",
  },
  query_key: {
    name: "Score of",
    unit: "score",
    rest: "the attention score before the softmax, as query and key both vary; it is not linear in them, so direct effects add up to twice the score",
  },
  value: {
    name: "Write of",
    unit: "direct effect",
    rest: "the direct effect of what the head writes, with its attention held constant, on",
  },
};

/** One sentence that says what a traced J is; nothing for the question's own objective. */
export function Meaning({ answer: { question, response } }: { answer: Answer }) {
  const step = question.trace.at(-1);
  if (!step) return null;
  const before = question.trace.at(-2);
  return (
    <p class="meaning">
      J is, at <Place node={step.node} tokens={response.tokens ?? []} />, {valueOf(step).rest}{" "}
      {step.through === "value" && (before ? stepWords(before) : formula(question))}
    </p>
  );
}

/** The unit of J. */
export function unit({ trace }: Pick<Question, "trace">): string {
  const step = trace.at(-1);
  if (!step) return "logits";
  if (step.through === "value") return unit({ trace: trace.slice(0, -1) });
  return `units of the ${valueOf(step).unit}`;
}

function valueOf({ node, through }: Step): Value {
  return VALUES[through ?? ""] ?? VALUES[site(node).kind] ?? VALUES["neuron"]!;
}
