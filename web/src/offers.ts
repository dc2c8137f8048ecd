/** What can be done to a node, as a list: the same for the menu, the keys and the tests. */
import { site } from "./address";
import {
  cannotFromB,
  cannotTrace,
  isAblated,
  mask,
  patchFromB,
  projectOut,
  setToMean,
  toggleAblation,
  traceInto,
} from "./editing";
import { cannot, layerOf, whyNot } from "./features";
import type { InterventionJson } from "./gen/tdb/inference/v1/intervention_pb";
import { asked, selected, valueForm } from "./state";
import { cannotVerify, verifyRows } from "./verifying";
import { allRows } from "./view";
import { cannotOpen, openNode } from "./opening";
import { HEAD_INPUTS, stepWords, type HeadInput } from "./trace";

export interface Offer {
  label: string;
  /** What it does, in a few words. */
  hint?: string;
  /** The letter that chooses it while the menu is open. */
  key?: string;
  /** Why it cannot be done, where it cannot. */
  why?: string | undefined;
  act: () => void;
}

export interface OfferGroup {
  name: string;
  offers: Offer[];
}

const INPUTS: Record<HeadInput, { key: string; hint: string }> = {
  query: { key: "q", hint: "the score, with the key held constant" },
  key: { key: "k", hint: "the score, with the query held constant" },
  query_key: { key: "b", hint: "the score, with both live" },
  value: { key: "v", hint: "the write's effect on the present objective" },
};

/** The ways to trace a node: one, or for a head one per input. */
export function traces(node: string): Offer[] {
  const trace = asked.value?.trace ?? [];
  if (site(node).kind !== "head")
    return [
      {
        label: `trace ${node}`,
        hint: "its value before the non-linearity",
        key: "t",
        why: cannotTrace({ node }, trace),
        act: () => traceInto({ node }),
      },
    ];
  return (Object.keys(HEAD_INPUTS) as HeadInput[]).map((through) => ({
    label: `trace ${stepWords({ node, through })}`,
    ...INPUTS[through],
    why: cannotTrace({ node, through }, trace),
    act: () => traceInto({ node, through }),
  }));
}

function edits(node: string): Offer[] {
  const ablated = isAblated(node);
  const valued = (op: "set" | "scale", hint: string): Offer => ({
    label: `${op}…`,
    hint,
    why: cannot(op, node),
    act: () => {
      selected.value = node;
      valueForm.value = { node, op };
    },
  });
  return [
    {
      label: ablated ? "restore" : "ablate",
      hint: ablated ? "give it its value back" : "set it to 0",
      key: "a",
      why: ablated ? undefined : cannot("ablate", node),
      act: () => toggleAblation(node),
    },
    valued("set", "give it another value"),
    valued("scale", "multiply its value"),
    ...(site(node).kind === "head"
      ? [
          {
            label: "mask",
            hint: "take it out of the softmax; the others share its weight",
            why: cannot("mask", node),
            act: () => mask(node),
          },
        ]
      : []),
    ...withB(node),
    ...projections(node),
  ];
}

/** Edits that take a value from prompt B. */
function withB(node: string): Offer[] {
  return [
    {
      label: "patch from B",
      hint: "give it the value it has in prompt B",
      key: "p",
      why: cannotFromB("patch", node),
      act: () => patchFromB(node),
    },
    {
      label: "mean of A and B",
      hint: "give it its mean over both prompts",
      why: cannotFromB("mean", node),
      act: () => setToMean(node),
    },
  ];
}

/**
 * Removing a direction, where a vector is: of a neuron or latent its own write, from the stream after its
 * layer; of a head or an embedding the objective's direction, from what is written there.
 */
function projections(node: string): Offer[] {
  const question = asked.value;
  const { kind, component, position } = site(node);
  const layer = layerOf(component);
  if (!question || position === undefined || layer === undefined) return [];
  const refs = (texts: string[]) => texts.map((text) => ({ text }));
  const own = kind === "neuron" || kind === "latent";
  const target =
    kind === "embed" ? node : own ? `resid_post.${layer}~${position}` : `attn.${layer}~${position}`;
  const made: InterventionJson = {
    target,
    projectOut: {
      direction: own
        ? { writeOf: component }
        : {
            unembedding: {
              targets: refs(question.targets),
              distractors: refs(question.distractors),
            },
          },
    },
  };
  return [
    {
      label: "project out",
      hint: `${own ? "its direction" : "the objective's direction"}, from ${target}`,
      why: whyNot("intervention.project_out"),
      act: () => projectOut(made),
    },
  ];
}

export function verification(node: string): Offer {
  const row = allRows.value.find((each) => each.node === node);
  return {
    label: "verify",
    hint: "really ablate it, for its exact effect",
    key: "v",
    why: row ? cannotVerify(row) : "Only listed nodes are verified.",
    act: () => row && void verifyRows([row]),
  };
}

/** Among all that can be done, Q, K and V are no letters of their own: they would hide others. */
function inMenu(ways: Offer[]): Offer[] {
  if (ways.length === 1) return ways;
  return ways.map(({ key: _, ...way }) => way);
}

/** Its own view: what makes it fire. */
export function opening(node: string): Offer {
  return {
    label: "open",
    hint: "which texts make it fire",
    key: "o",
    why: cannotOpen(node),
    act: () => openNode(node),
  };
}

export function offers(node: string): OfferGroup[] {
  return [
    { name: "change", offers: edits(node) },
    { name: "why is it what it is?", offers: inMenu(traces(node)) },
    { name: "what would go without it?", offers: [verification(node)] },
    { name: "what is it anywhere else?", offers: [opening(node)] },
  ];
}
