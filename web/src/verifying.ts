/**
 * The verified column: each node really ablated, its effect filled in as it comes.
 *
 * Effects belong to the answer whose rows they stand in. A new question ends the stream; the effects come
 * along only if it asks for the same run and objective, be it with other rows.
 */
import { signal } from "@preact/signals";
import { whyNot } from "./features";
import type { NodeRowJson } from "./gen/tdb/inference/v1/attribute_pb";
import { verify } from "./inference";
import { num } from "./numbers";
import { problems } from "./problems";
import { standing } from "./queue";
import { verifyRequest } from "./requests";
import { amend, answer, found, stale, type Answer, type Verified } from "./state";
import type { Question } from "./url";

const FLUSH_MS = 80;

/** How far the stream is, and where its next nodes stand in the queue; null while there is none. */
export const verifying = signal<{ done: number; total: number; waits: string } | null>(null);
let flight = new AbortController();

export const NOTHING_VERIFIED: Verified = { effects: new Map(), agreement: null };

export function cancelVerify(): void {
  flight.abort();
  verifying.value = null;
}

/** What was verified before, where it holds for the new question as well. */
export function stillVerified(before: Answer | null, question: Question): Verified {
  const asks = (of: Question) => JSON.stringify(verifyRequest(of, []).table);
  return before && asks(before.question) === asks(question)
    ? { ...before.verified, agreement: null }
    : NOTHING_VERIFIED;
}

/** Why the row cannot be verified, or nothing if it can. */
export function cannotVerify(row: NodeRowJson): string | undefined {
  return (
    whyNot("verify") ??
    (row.activation === undefined ? "The node does not exist in this run." : undefined)
  );
}

/** Verifies these rows of the shown answer, once each; a stream that runs already is ended. */
export async function verifyRows(rows: readonly NodeRowJson[]): Promise<void> {
  const shown = answer.value;
  const nodes = rows.filter((row) => cannotVerify(row) === undefined).map(({ node = "" }) => node);
  if (!shown || stale.value || nodes.length === 0) return;
  cancelVerify();
  const own = (flight = new AbortController());
  const { response, question } = shown;
  found.value = found.value.filter(({ place }) => place !== "verify");
  verifying.value = { done: 0, total: nodes.length, waits: "" };

  let fresh = new Map<string, number>();
  let flushed = 0;
  const flush = () => {
    const came = fresh;
    fresh = new Map();
    flushed = Date.now();
    amend(response, ({ verified }) => ({
      verified: { ...verified, effects: new Map([...verified.effects, ...came]) },
    }));
  };
  try {
    let done = 0;
    for await (const event of verify(verifyRequest(question, nodes), own)) {
      if (own.signal.aborted) return;
      const { node, progress, summary } = event;
      if (progress)
        verifying.value = { done, total: nodes.length, waits: standing(progress.queue) };
      if (node) {
        fresh.set(node.node ?? "", num(node.verifiedEffect) ?? 0);
        done += 1;
        if (Date.now() - flushed >= FLUSH_MS) {
          flush();
          verifying.value = { done, total: nodes.length, waits: "" };
        }
      }
      if (summary) {
        const rank = num(summary.rankCorrelation);
        const agreement = rank === undefined ? null : { rank, nodes: summary.nodes ?? 0 };
        amend(response, ({ verified }) => ({ verified: { ...verified, agreement } }));
      }
    }
  } catch (error) {
    if (own.signal.aborted) return;
    found.value = [
      ...found.value,
      ...problems(error).map((problem) => ({ ...problem, place: "verify" as const })),
    ];
  } finally {
    if (!own.signal.aborted) {
      flush();
      verifying.value = null;
    } else if (fresh.size > 0) flush();
  }
}
