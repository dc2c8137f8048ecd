/**
 * A question and its form in the address bar.
 *
 * Everything that determines an answer stands after the `#`, so a link shows a colleague exactly the
 * same thing, and no prompt lands in a server's access log. An ablation reads `edit=zero:head.2.3~13-1`;
 * every other intervention is its JSON, so that no link has to change when the page learns to make more.
 */
import type { ColumnJson } from "./gen/tdb/inference/v1/attribute_pb";
import type { InterventionJson } from "./gen/tdb/inference/v1/intervention_pb";

export interface Question {
  /** Model id; empty: the default. */
  model: string;
  prompt: string;
  targets: string[];
  distractors: string[];
  interventions: InterventionJson[];
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
  for (const edit of question.interventions) {
    query.append("edit", isAblation(edit) ? `zero:${edit.target}` : JSON.stringify(edit));
  }
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
    interventions: query.getAll("edit").map(intervention),
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

function rank(text: string): Rank {
  const found = RANK_NAMES.find((name) => name === text);
  if (found) return found;
  throw new Error(`This link ranks by “${text}”; it can be one of ${RANK_NAMES.join(", ")}.`);
}

function rowCount(text: string): number {
  if (/^[1-9]\d{0,5}$/.test(text)) return Number(text);
  throw new Error(`This link asks for “${text}” rows; it takes a whole number from 1.`);
}
