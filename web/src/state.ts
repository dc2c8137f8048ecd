/**
 * What the page knows, as signals.
 *
 * A *question* is everything that determines an answer. The *draft* is what stands in the input fields;
 * it becomes the question only on Enter. `asked` is the latest question, `answer` the latest result: while
 * they differ the answer is out of date and shown dimmed. An answer is never changed by a later one, so
 * undo is going back to an earlier object.
 */
import { computed, signal } from "@preact/signals";
import type { Sort } from "./columns";
import type { Filters } from "./filters";
import type { AttributeResponseJson } from "./gen/tdb/inference/v1/attribute_pb";
import type { GetModelResponseJson } from "./gen/tdb/inference/v1/model_pb";
import type { PredictionJson } from "./gen/tdb/inference/v1/run_pb";
import type { TokenJson } from "./gen/tdb/type/v1/token_pb";
import type { Place, Problem } from "./problems";
import { beside, type Opened, type Question } from "./url";

/** One next token: now, and in the compared run where there is one. */
export interface Outlook {
  role: "target" | "distractor" | "likely";
  now: PredictionJson;
  base?: PredictionJson;
}

/** Exact effects by real ablation. */
export interface Verified {
  effects: ReadonlyMap<string, number>;
  /** Rank correlation of the estimate with them, at the end of a stream. */
  agreement: { rank: number; nodes: number } | null;
}

export interface Answer {
  question: Question;
  response: AttributeResponseJson;
  /** Tokens of prompt B, whether the run stands beside it or not; null until they are known. */
  b: TokenJson[] | null;
  /** What was verified of its rows so far. */
  verified: Verified;
  /** Filled in once the second pair of calls has come back. */
  outlooks: Outlook[] | null;
}

export type Side = "targets" | "distractors";

export interface Draft {
  prompt: string;
  targets: string[];
  distractors: string[];
  /** Prompt B; null where none is wanted. */
  compare: string | null;
  /** Text typed beside the chips, not yet one of them. */
  pending: Record<Side, string>;
}

export const models = signal<string[]>([]);
export const model = signal<GetModelResponseJson | null>(null);
/** Why there is no model, and whether asking again may help. */
export const modelProblem = signal<Problem | null>(null);

export const draft = signal<Draft>({
  prompt: "",
  targets: [],
  distractors: [],
  compare: null,
  pending: { targets: "", distractors: "" },
});

export const asked = signal<Question | null>(null);
export const answer = signal<Answer | null>(null);
export const past = signal<Answer[]>([]);
export const loading = signal(false);
export const found = signal<Problem[]>([]);
/** Whether the service wants a token that it has not been given. */
export const locked = signal(false);

/** The component that is looked at in place of the workbench. */
export const opened = signal<Opened | null>(null);
export const selected = signal<string | null>(null);
/** The open field for a new value or a factor, in the details of a row. */
export const valueForm = signal<{ node: string; op: "set" | "scale" } | null>(null);
/** Whether the logit lens stands in place of the next token. */
export const lens = signal(false);
export const sort = signal<Sort | null>(null);
export const filters = signal<Filters>({});

/** Whether what is shown answers an earlier question. */
export const stale = computed(() => !!answer.value && answer.value.question !== asked.value);

/** What the answer's run stands beside. */
export const compared = computed(() => (answer.value ? beside(answer.value.question) : null));
export const paired = computed(() => compared.value !== null);

/** Whether Enter would ask something new. */
export const edited = computed(() => {
  const { prompt, targets, distractors, compare, pending } = draft.value;
  const now = asked.value;
  return (
    !now ||
    now.prompt !== prompt ||
    now.compare !== (compare ?? "") ||
    now.targets.join("\0") !== targets.join("\0") ||
    now.distractors.join("\0") !== distractors.join("\0") ||
    pending.targets !== "" ||
    pending.distractors !== ""
  );
});

/** Adds to the answer that this response belongs to, if it is the one shown. */
export function amend(
  response: AttributeResponseJson,
  how: (shown: Answer) => Partial<Answer>,
): void {
  const shown = answer.value;
  if (shown?.response === response) answer.value = { ...shown, ...how(shown) };
}

export function problemsAt(place: Place, index?: number): Problem[] {
  return found.value.filter((p) => p.place === place && (index === undefined || p.index === index));
}

export function editDraft(change: Partial<Draft>): void {
  draft.value = { ...draft.value, ...change };
}
