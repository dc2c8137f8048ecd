/**
 * Where an error belongs. The service names the field of the request that it refuses; the page shows the
 * sentence beside the control that filled that field, and everything else in one line above the answer.
 */
import { ConnectError } from "./connect";

export type Place =
  | "prompt"
  | "compare"
  | "target"
  | "distractor"
  | "edit"
  | "trace"
  | "verify"
  | "generate"
  | "page"
  | "prediction";

export interface Problem {
  place: Place;
  /** Which target, distractor or intervention; of a trace how many steps before the last. */
  index?: number;
  text: string;
  /** Whether asking the same again may help. */
  retry: boolean;
}

const PLACES: [RegExp, Place][] = [
  [/^(?:run|compare)\.interventions\[(\d+)\]/, "edit"],
  [/^(?:compare_)?objective\.(?:traced_node\.downstream\.)*\w+\.targets(?:\[(\d+)\])?/, "target"],
  [
    /^(?:compare_)?objective\.(?:traced_node\.downstream\.)*\w+\.distractors(?:\[(\d+)\])?/,
    "distractor",
  ],
  [/^(?:compare_)?objective\.traced_node/, "trace"],
  [/^compare\b/, "compare"],
  [/^(?:run\.)?prompt\b/, "prompt"],
  [/^run$/, "prompt"],
];

const AGAIN = new Set([
  "unavailable",
  "deadline_exceeded",
  "resource_exhausted",
  "aborted",
  "unknown",
]);

const FAULTS = new Set(["internal", "unknown", "data_loss"]);

/** The sentences of an error, each with its place. */
export function problems(error: unknown): Problem[] {
  if (!(error instanceof ConnectError)) {
    const text = error instanceof Error ? error.message : String(error);
    return [{ place: "page", text: sentence(text), retry: false }];
  }
  const retry = AGAIN.has(error.code);
  const placed = error.violations.map(({ field, description }): Problem => {
    for (const [pattern, place] of PLACES) {
      const match = pattern.exec(field);
      if (!match) continue;
      const text = sentence(description || error.message);
      const index = place === "trace" ? field.split(".downstream").length - 1 : match[1];
      return { place, text, retry, ...(index === undefined ? {} : { index: Number(index) }) };
    }
    return { place: "page", text: sentence(`${field}: ${description}`), retry };
  });
  if (placed.length > 0) return placed;
  // Of a fault of ours nobody can make anything but whoever reads the logs: they need its id.
  const id = FAULTS.has(error.code) && error.requestId ? ` Request ${error.requestId}.` : "";
  return [{ place: "page", text: sentence(error.message) + id, retry }];
}

/** The text as a sentence: it begins with a capital, unless it begins with an address, and ends in a stop. */
export function sentence(text: string): string {
  const trimmed = text.trim();
  const first = trimmed.split(" ")[0] ?? "";
  const opened = /^[a-z]+[,:]?$/.test(first)
    ? trimmed[0]!.toUpperCase() + trimmed.slice(1)
    : trimmed;
  return /[.!?]$/.test(opened) ? opened : `${opened}.`;
}
