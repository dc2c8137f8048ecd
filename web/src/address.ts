/**
 * What the page reads off an address (SEMANTICS section 2). The service parses addresses; the page only
 * needs to know what kind of node it is and at which tokens it sits.
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
