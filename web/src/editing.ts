/** Editing the run: what an action on a row or a chip makes of the latest question. */
import { ask } from "./asking";
import { site } from "./address";
import { cannot, whyNot } from "./features";
import type { InterventionJson } from "./gen/tdb/inference/v1/intervention_pb";
import { count } from "./numbers";
import { answer, asked, selected } from "./state";
import { stepWords, untraceable, withoutStep, type Step } from "./trace";
import { ablation, isAblation, type Question } from "./url";

/** The question that an action on a shown row changes: the latest, if it is about the same prompt. */
function base(): Question | null {
  const [now, shown] = [asked.value, answer.value?.question];
  return now && shown && now.prompt === shown.prompt && now.model === shown.model
    ? now
    : (shown ?? now);
}

/** Whether the edit is one that a row's actions make: of this node, and no other kind of edit. */
function own(edit: InterventionJson, node: string): boolean {
  return (
    edit.target === node &&
    !edit.positions &&
    (isAblation(edit) ||
      edit.set?.value !== undefined ||
      [edit.scale, edit.patch, edit.mean, edit.mask].some((op) => op !== undefined))
  );
}

/** What a row's actions have made of the node, if anything. */
export function editOf(node: string): InterventionJson | undefined {
  return asked.value?.interventions.find((edit) => own(edit, node));
}

export function isAblated(node: string): boolean {
  return !!asked.value?.interventions.some((e) => e.target === node && isAblation(e));
}

/** Ablates the node, instead of what was done to it before; or gives an ablated one its value back. */
export function toggleAblation(node: string): void {
  if (isAblated(node)) drop(node);
  else if (cannot("ablate", node) === undefined) edit(ablation(node));
}

export function setValue(node: string, value: number): void {
  edit({ target: node, set: { value } });
}

export function scaleBy(node: string, factor: number): void {
  edit({ target: node, scale: { factor } });
}

/** Gives the node the value it has in prompt B. */
export function patchFromB(node: string): void {
  edit({ target: node, patch: { source: { prompt: { text: base()?.compare ?? "" } } } });
}

/** Gives the node its mean over both prompts, at its own position if they are equally long. */
export function setToMean(node: string): void {
  const question = base();
  if (!question) return;
  const prompts = [question.prompt, question.compare].map((text) => ({ text }));
  edit({ target: node, mean: { prompts, ...(aligned() ? { perPosition: true } : {}) } });
}

/** Takes the pair out of its softmax, so that the head attends elsewhere. */
export function mask(node: string): void {
  edit({ target: node, mask: {} });
}

/** Removes a direction from what is written at the node's token. */
export function projectOut(made: InterventionJson): void {
  const question = base();
  if (!question) return;
  void ask({ ...question, interventions: [...question.interventions, made] });
}

/** Whether prompt B has as many tokens as the first, so that their places correspond. */
function aligned(): boolean {
  const { response, b } = answer.value ?? {};
  return !!b && b.length === (response?.tokens ?? []).length;
}

/** Why a value of prompt B, or one that is made with it, cannot be put into the node. */
export function cannotFromB(op: "patch" | "mean", node: string): string | undefined {
  const why = cannot(op, node);
  if (why) return why;
  if (!base()?.compare) return "Compare with another prompt first: the value comes from there.";
  if (aligned() || (op === "mean" && site(node).kind !== "head")) return undefined;
  const { response, b } = answer.value ?? {};
  if (!b) return "Prompt B has not been read yet.";
  return `Prompt B has ${count(b.length, "token")} and the first ${response?.tokens?.length ?? 0}: places correspond only where they are equally long.`;
}

/** Two edits that set one value are an error, so a row has one: a new one takes the old one's place. */
function edit(made: InterventionJson): void {
  const question = base();
  if (!question) return;
  const { interventions } = question;
  const index = interventions.findIndex((each) => own(each, made.target ?? ""));
  void ask({
    ...question,
    interventions: index < 0 ? [...interventions, made] : interventions.with(index, made),
  });
}

function drop(node: string): void {
  const question = base();
  if (!question) return;
  const kept = question.interventions.filter((e) => !(e.target === node && isAblation(e)));
  void ask({ ...question, interventions: kept });
}

export function removeIntervention(index: number): void {
  change((question) => ({ interventions: question.interventions.filter((_, i) => i !== index) }));
}

/** Makes the node's own value the objective; the chain grows by it. */
export function traceInto(step: Step): void {
  const question = base();
  if (!question || cannotTrace(step, question.trace) !== undefined) return;
  selected.value = null;
  void ask({ ...question, trace: [...question.trace, step] });
}

/** Back along the chain: its first `length` steps stay. */
export function traceBackTo(length: number): void {
  retrace((trace) => trace.slice(0, length));
}

export function removeStep(index: number): void {
  retrace((trace) => withoutStep(trace, index));
}

function retrace(how: (trace: Step[]) => Step[]): void {
  selected.value = null;
  change(({ trace }) => ({ trace: how(trace) }));
}

/** Why the node cannot be traced from here, or nothing if it can. */
export function cannotTrace(step: Step, trace: readonly Step[]): string | undefined {
  const now = trace.at(-1);
  return (
    untraceable(step.node, step.through, trace) ??
    whyNot("objective.traced_node") ??
    (site(step.node).kind === "latent" ? whyNot("objective.traced_node.latent") : undefined) ??
    (now && stepWords(now) === stepWords(step) ? "This is what is traced now." : undefined)
  );
}

/** Asks the latest question again with something changed. */
export function change(how: (question: Question) => Partial<Question>): void {
  const question = asked.value;
  if (question) void ask({ ...question, ...how(question) });
}
