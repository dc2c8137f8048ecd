/** Editing the run: what an action on a row or a chip makes of the latest question. */
import { ask } from "./asking";
import { cannot } from "./features";
import type { InterventionJson } from "./gen/tdb/inference/v1/intervention_pb";
import { answer, asked } from "./state";
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
    (isAblation(edit) || edit.set?.value !== undefined || edit.scale !== undefined)
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

/** Asks the latest question again with something changed. */
export function change(how: (question: Question) => Partial<Question>): void {
  const question = asked.value;
  if (question) void ask({ ...question, ...how(question) });
}
