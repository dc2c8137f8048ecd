/**
 * What the page reads off an address (SEMANTICS section 2). The service parses addresses; the page only
 * needs to know at which tokens a node sits and whether it can be ablated.
 */

export interface Site {
  /** Everything before `~`. */
  component: string;
  /** Head, neuron, embed ...: the first word. */
  kind: string;
  /** Token the node writes at (a head's query). */
  position?: number;
  /** Token a head's pair reads from. */
  key?: number;
}

export function site(node: string): Site {
  const [component = "", where] = node.split("~");
  const kind = component.split(".")[0] ?? "";
  if (where === undefined) return { component, kind };
  const [position, key] = where.split("-").map(Number);
  return {
    component,
    kind,
    ...(position === undefined ? {} : { position }),
    ...(key === undefined ? {} : { key }),
  };
}

/** Whether the node reads or writes at the token. */
export function touches(node: string, token: number): boolean {
  const { position, key } = site(node);
  return position === token || key === token;
}

/** Why the node cannot be ablated, or nothing if it can. */
export function notAblatable(node: string): string | undefined {
  return site(node).kind === "embed"
    ? "Embeddings cannot be ablated yet: this version edits heads, neurons and sublayers."
    : undefined;
}
