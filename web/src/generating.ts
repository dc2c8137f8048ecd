/**
 * Continuing the prompt under the present interventions, token by token, with its twin without them.
 *
 * A continuation is never asked for by itself: only its button and its key do. It stays in sight, out of
 * date, when the run it belongs to has changed.
 */
import { computed, signal } from "@preact/signals";
import { whyNot } from "./features";
import type {
  BranchJson,
  ContinuationJson,
  GeneratedTokenJson,
  GenerateRequestJson,
} from "./gen/tdb/inference/v1/generate_pb";
import type { ReceiptJson } from "./gen/tdb/inference/v1/intervention_pb";
import { generate } from "./inference";
import { problems } from "./problems";
import { standing } from "./queue";
import { generateRequest } from "./requests";
import { asked, found } from "./state";
import { DEFAULT_SAMPLING, type Sampling } from "./sampling";

export interface Generation {
  request: GenerateRequestJson;
  tokens: Record<"edited" | "twin", GeneratedTokenJson[]>;
  /** Absent until the end. */
  endings?: ContinuationJson[];
  receipts?: ReceiptJson[];
  /** The seed that was drawn, where none was given. */
  seed?: number;
}

export const sampling = signal<Sampling>(DEFAULT_SAMPLING);
export const generation = signal<Generation | null>(null);
export const generating = signal(false);
/** Where the next token stands in the queue; empty while none waits. */
export const waiting = signal("");
let flight = new AbortController();

/** What would be asked now. */
export const wanted = computed(() =>
  asked.value ? generateRequest(asked.value, sampling.value) : null,
);

/** Whether the continuation in sight is that of another run. */
export const outdated = computed(
  () =>
    generation.value !== null &&
    JSON.stringify(generation.value.request.run) !== JSON.stringify(wanted.value?.run),
);

export function cancelGeneration(): void {
  flight.abort();
  generating.value = false;
  waiting.value = "";
}

const BRANCHES: Partial<Record<BranchJson, "edited" | "twin">> = {
  BRANCH_EDITED: "edited",
  BRANCH_TWIN: "twin",
};

export async function continuePrompt(): Promise<void> {
  const request = wanted.value;
  if (!request || whyNot("generate") !== undefined) return;
  cancelGeneration();
  const own = (flight = new AbortController());
  found.value = found.value.filter(({ place }) => place !== "generate");
  generating.value = true;
  generation.value = { request, tokens: { edited: [], twin: [] } };
  const amend = (how: (now: Generation) => Partial<Generation>) => {
    const now = generation.value;
    if (now) generation.value = { ...now, ...how(now) };
  };
  try {
    for await (const { token, progress, summary } of generate(request, own)) {
      if (own.signal.aborted) return;
      waiting.value = standing(progress?.queue);
      const branch = token && BRANCHES[token.branch ?? "BRANCH_UNSPECIFIED"];
      if (token && branch)
        amend(({ tokens }) => ({ tokens: { ...tokens, [branch]: [...tokens[branch], token] } }));
      if (summary) {
        const seed = seedOf(summary.manifest?.requestJson);
        amend(() => ({
          endings: summary.continuations ?? [],
          receipts: summary.receipts ?? [],
          ...(seed === undefined ? {} : { seed }),
        }));
      }
    }
  } catch (error) {
    if (own.signal.aborted) return;
    found.value = [
      ...found.value,
      ...problems(error).map((problem) => ({ ...problem, place: "generate" as const })),
    ];
  } finally {
    if (own === flight) {
      generating.value = false;
      waiting.value = "";
    }
  }
}

function seedOf(requestJson: string | undefined): number | undefined {
  try {
    return (JSON.parse(requestJson ?? "") as GenerateRequestJson).seed;
  } catch {
    return undefined;
  }
}

/** Whether each token of one branch differs from the other's at the same place. */
export function differing(
  own: readonly GeneratedTokenJson[],
  other: readonly GeneratedTokenJson[],
): boolean[] {
  return own.map(({ token }, i) => {
    const there = other[i];
    return there !== undefined && (there.token?.id ?? 0) !== (token?.id ?? 0);
  });
}
