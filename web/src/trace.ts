/**
 * Tracing upstream: the objective becomes a node's own value, and again the value of a node that made it.
 *
 * A trace is the chain of nodes from the question's own objective upstream; the last one is J. Only a
 * trace through a head's value looks at what comes before it in the chain: there J is the write's direct
 * effect on the objective downstream.
 */
import { site } from "./address";
import type { ObjectiveJson, ThroughJson } from "./gen/tdb/inference/v1/objective_pb";

const THROUGHS = {
  query: "THROUGH_QUERY",
  key: "THROUGH_KEY",
  query_key: "THROUGH_QUERY_KEY",
  value: "THROUGH_VALUE",
  gate: "THROUGH_GATE",
  up: "THROUGH_UP",
} as const satisfies Record<string, ThroughJson>;

export type Through = keyof typeof THROUGHS;

export interface Step {
  /** Address of the node. */
  node: string;
  /** Which of its inputs; heads only, and gated neurons where it is not the gate. */
  through?: Through;
}

/** The short names of a head's inputs, in the order they are offered. */
export const HEAD_INPUTS = { query: "Q", key: "K", query_key: "QK", value: "V" } as const;
export type HeadInput = keyof typeof HEAD_INPUTS;

/** The objective at the end of the chain that starts at `own`. */
export function traced(own: ObjectiveJson, trace: readonly Step[]): ObjectiveJson {
  return trace.reduce<ObjectiveJson>(
    (downstream, { node, through }) => ({
      tracedNode: {
        node,
        ...(through ? { through: THROUGHS[through] } : {}),
        ...(through === "value" ? { downstream } : {}),
      },
    }),
    own,
  );
}

/** `head.3.1~13-1 through Q`; the node alone where it has one input. */
export function stepWords({ node, through }: Step): string {
  if (!through) return node;
  return `${node} through ${through in HEAD_INPUTS ? HEAD_INPUTS[through as HeadInput] : through}`;
}

/** Why a node cannot be traced through an input at the end of this chain, or nothing if it can. */
export function untraceable(
  node: string,
  through: Through | undefined,
  trace: readonly Step[],
): string | undefined {
  const { kind } = site(node);
  if (kind === "embed") return "Nothing is upstream of an embedding.";
  if (!["head", "neuron", "latent"].includes(kind))
    return "Only heads, neurons and latents have a value to trace.";
  if (through === "value" && trace.at(-1)?.through === "value")
    return "The present objective is itself traced through V, and there is no gradient below it to measure a write on.";
  return undefined;
}

/** The chain without one step; what can no longer stand on what comes before it goes too. */
export function withoutStep(trace: readonly Step[], index: number): Step[] {
  const kept = trace.filter((_, i) => i !== index);
  const broken = kept.findIndex(
    ({ node, through }, i) => untraceable(node, through, kept.slice(0, i)) !== undefined,
  );
  return broken < 0 ? kept : kept.slice(0, broken);
}

/** `head.3.1~13-1:query`, as a link holds it. */
export function encodeStep({ node, through }: Step): string {
  return through ? `${node}:${through}` : node;
}

/** The step in a link; throws a sentence if it is malformed. */
export function decodeStep(text: string): Step {
  const [, node, through] = /^([\w.~-]+)(?::(\w+))?$/.exec(text) ?? [];
  if (node === undefined || (through !== undefined && !(through in THROUGHS)))
    throw new Error(
      `This link traces “${text}”; a step reads like head.3.1~13-1:query or neuron.1.88~1.`,
    );
  return through === undefined ? { node } : { node, through: through as Through };
}
