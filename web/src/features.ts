/** What the service can do with the loaded model, by its own word, and so what the page offers. */
import { site } from "./address";
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

const OPS = { ablate: "zero", set: "set", scale: "scale" } as const;
export type Op = keyof typeof OPS;

/** Why an operation does not fit the node, or nothing if it does. */
export function cannot(op: Op, node: string): string | undefined {
  if (site(node).kind === "embed") {
    if (op === "set") return "An embedding is a vector: it can be ablated or scaled.";
    const reason = whyNot("target.residual");
    if (reason) return `An embedding cannot be edited: ${reason}`;
  }
  return whyNot(`intervention.${OPS[op]}`);
}
