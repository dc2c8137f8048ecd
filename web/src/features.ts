/** What the service can do with the loaded model, by its own word, and so what the page offers. */
import { site } from "./address";
import type { DictionaryJson } from "./gen/tdb/inference/v1/model_pb";
import { sublayerOf } from "./latents";
import { sentence } from "./problems";
import { model } from "./state";

export function supports(feature: string): boolean {
  return whyNot(feature) === undefined;
}

/** Why the feature does not work on this model, or nothing if it does. */
export function whyNot(feature: string): string | undefined {
  const found = model.value?.supports?.find((each) => each.feature === feature);
  if (found?.supported) return undefined;
  return sentence(found?.reason || `${feature} is not known to this service`);
}

const OPS = {
  ablate: "zero",
  set: "set",
  scale: "scale",
  patch: "patch",
  mean: "mean",
  mask: "mask",
} as const;
export type Op = keyof typeof OPS;

/** Why an operation does not fit the node, or nothing if it does. */
export function cannot(op: Op, node: string): string | undefined {
  const { kind } = site(node);
  if (op === "mask" && kind !== "head") return "Only the score of a head's pair can be masked.";
  if (op === "set" && ["embed", "mlp", "attn"].includes(kind))
    return `${kind === "embed" ? "An embedding" : "A sublayer"} is a vector: it can be ablated or scaled.`;
  if (kind === "embed") {
    const reason = whyNot("target.residual");
    if (reason) return `An embedding cannot be edited: ${reason}`;
  }
  return whyNot(`intervention.${OPS[op]}`);
}

/** The layer a component is in; an embedding counts as the first. Undefined where nobody says. */
export function layerOf(component: string): number | undefined {
  const [kind, name = "", ...rest] = component.split(".");
  if (kind === "embed") return 0;
  const site = kind === "latent" ? dictionaryOf(component)?.siteOut?.split(".").at(-1) : name;
  return site === undefined || rest.length === 0 || !/^\d+$/.test(site) ? undefined : Number(site);
}

/** The dictionary a latent belongs to. */
export function dictionaryOf(component: string): DictionaryJson | undefined {
  const [kind, id] = component.split(".");
  return kind === "latent" ? model.value?.dictionaries?.find((each) => each.id === id) : undefined;
}

/** Whether the node is a latent of the residual stream, which stands outside the table's sum. */
export function isView(node: string): boolean {
  const dictionary = dictionaryOf(site(node).component);
  return dictionary !== undefined && sublayerOf(dictionary) === "resid";
}
