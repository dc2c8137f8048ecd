/**
 * A question and its form in the address bar.
 *
 * Everything that determines an answer stands after the `#`, so a link shows a colleague exactly the
 * same thing, and no prompt lands in a server's access log. An ablation reads `edit=zero:head.2.3~13-1`;
 * every other intervention is its JSON, so that no link has to change when the page learns to make more.
 */
import type { ColumnJson } from "./gen/tdb/inference/v1/attribute_pb";
import type { InterventionJson } from "./gen/tdb/inference/v1/intervention_pb";
import { decodeStep, encodeStep, type Step } from "./trace";

export interface Question {
  /** Model id; empty: the default. */
  model: string;
  prompt: string;
  targets: string[];
  distractors: string[];
  /** A second prompt, B, to compare with; empty: none. */
  compare: string;
  /** Whether an edited run stands beside B rather than beside itself without the edits. */
  againstB: boolean;
  interventions: InterventionJson[];
  /** The chain of nodes whose value is traced, the last being the objective; empty: targets and distractors are. */
  trace: Step[];
  /** Dictionary ids or set names whose latents stand in the table. */
  dictionaries: string[];
  rankBy: Rank;
  rows: number;
}

const RANKS = {
  total: "COLUMN_TOTAL_EFFECT",
  direct: "COLUMN_DIRECT_EFFECT",
  write: "COLUMN_WRITE_MAGNITUDE",
  activation: "COLUMN_ACTIVATION",
  each: "COLUMN_EACH",
} as const satisfies Record<string, ColumnJson>;

export type Rank = keyof typeof RANKS;
export const RANK_NAMES = Object.keys(RANKS) as Rank[];
export const DEFAULT_ROWS = 50;

/** All of a question that need not be said. */
export const USUAL: Omit<Question, "model" | "prompt" | "targets" | "distractors"> = {
  compare: "",
  againstB: false,
  interventions: [],
  trace: [],
  dictionaries: [],
  rankBy: "total",
  rows: DEFAULT_ROWS,
};

/** What the run stands beside: itself without the edits, prompt B, or nothing. */
export function beside(question: Question): "untouched" | "b" | null {
  const { compare, againstB, interventions } = question;
  if (compare !== "" && (againstB || interventions.length === 0)) return "b";
  return interventions.length > 0 ? "untouched" : null;
}

export function column(rank: Rank): ColumnJson {
  return RANKS[rank];
}

export function ablation(target: string): InterventionJson {
  return { target, zero: {} };
}

export function isAblation(edit: InterventionJson): boolean {
  return Object.keys(edit).every((key) => key === "target" || key === "zero") && !!edit.zero;
}

/** The question as the part of an address after `#`. */
export function encode(question: Question): string {
  const query = new URLSearchParams();
  if (question.model) query.append("model", question.model);
  query.append("prompt", question.prompt);
  for (const text of question.targets) query.append("target", text);
  for (const text of question.distractors) query.append("distractor", text);
  if (question.compare !== "") query.append("compare", question.compare);
  if (question.againstB) query.append("against", "b");
  for (const edit of question.interventions) {
    query.append("edit", isAblation(edit) ? `zero:${edit.target}` : JSON.stringify(edit));
  }
  for (const step of question.trace) query.append("trace", encodeStep(step));
  for (const id of question.dictionaries) query.append("dictionary", id);
  if (question.rankBy !== "total") query.append("rank_by", question.rankBy);
  if (question.rows !== DEFAULT_ROWS) query.append("rows", String(question.rows));
  return query.toString();
}

/** The question in an address, `null` if there is none; throws a sentence if it is malformed. */
export function decode(hash: string): Question | null {
  const query = new URLSearchParams(hash.replace(/^#/, ""));
  const prompt = query.get("prompt");
  if (prompt === null) return null;
  return {
    model: query.get("model") ?? "",
    prompt,
    targets: query.getAll("target"),
    distractors: query.getAll("distractor"),
    compare: query.get("compare") ?? "",
    againstB: against(query.get("against")),
    interventions: query.getAll("edit").map(intervention),
    trace: query.getAll("trace").map(decodeStep),
    dictionaries: query.getAll("dictionary"),
    rankBy: rank(query.get("rank_by") ?? "total"),
    rows: rowCount(query.get("rows") ?? String(DEFAULT_ROWS)),
  };
}

function intervention(text: string): InterventionJson {
  if (text.startsWith("zero:")) return ablation(text.slice("zero:".length));
  try {
    const parsed: unknown = JSON.parse(text);
    if (typeof parsed === "object" && parsed !== null && "target" in parsed) {
      return parsed as InterventionJson;
    }
  } catch {
    // falls through to the sentence below
  }
  throw new Error(`This link holds an intervention that cannot be read: “${text}”.`);
}

function against(text: string | null): boolean {
  if (text === null || text === "b") return text === "b";
  throw new Error(`This link compares against “${text}”; it can only be b, the compared prompt.`);
}

function rank(text: string): Rank {
  const found = RANK_NAMES.find((name) => name === text);
  if (found) return found;
  throw new Error(`This link ranks by “${text}”; it can be one of ${RANK_NAMES.join(", ")}.`);
}

function rowCount(text: string): number {
  if (/^[1-9]\d{0,5}$/.test(text)) return Number(text);
  throw new Error(`This link asks for “${text}” rows; it takes a whole number from 1.`);
}

/** Whether a link shows the logit lens. */
export function hasLens(hash: string): boolean {
  return new URLSearchParams(hash.replace(/^#/, "")).has("lens");
}

/** A component that is looked at by itself. */
export interface Opened {
  component: string;
  /** The dataset that its records are read from; null: the first that has it. */
  dataset: string | null;
}

export function encodeOpened(opened: Opened | null): string {
  if (!opened) return "";
  const query = new URLSearchParams({ component: opened.component });
  if (opened.dataset !== null) query.append("dataset", opened.dataset);
  return `&${query.toString()}`;
}

/** The component in an address, `null` if there is none; throws a sentence if it is none. */
export function decodeOpened(hash: string): Opened | null {
  const query = new URLSearchParams(hash.replace(/^#/, ""));
  const component = query.get("component");
  if (component === null) return null;
  if (!isComponent(component))
    throw new Error(
      `This link opens “${component}”; it can be a component such as neuron.3.17, head.2.3 or latent.ID.5.`,
    );
  return { component, dataset: query.get("dataset") };
}

/** Whether the text is the address of a component that records can be about. */
export function isComponent(text: string): boolean {
  return /^(?:(?:neuron|head)\.\d{1,9}|latent\.[A-Za-z0-9_-]+)\.\d{1,9}$/.test(text);
}
