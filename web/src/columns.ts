/**
 * The columns of the node table, as data: what each means, how it is read off a row, how it is coloured.
 *
 * With a compared run a column becomes three: before (the compared run), after (this run) and their
 * difference. A node that one run lacks has no value there, so it has no difference either.
 */
import type { NodeRowJson } from "./gen/tdb/inference/v1/attribute_pb";
import { site } from "./address";
import { num } from "./numbers";

export type Quantity =
  "activation" | "writeMagnitude" | "directEffect" | "totalEffect" | "verifiedEffect";
export type Side = "after" | "before" | "difference";

interface Meaning {
  name: string;
  definition: string;
  /** Effects carry a sign and the diverging scale; magnitudes the sequential one. */
  effect: boolean;
  /** Whether before and difference are shown when runs are compared. */
  paired: boolean;
}

export const QUANTITIES: Record<Quantity, Meaning> = {
  activation: {
    name: "act",
    definition:
      "Activation: a neuron's or latent's value, a head pair's attention probability; 1 for an embedding",
    effect: false,
    paired: true,
  },
  writeMagnitude: {
    name: "write",
    definition: "Write magnitude: norm of what the node adds to the residual stream",
    effect: false,
    paired: false,
  },
  directEffect: {
    name: "direct",
    definition:
      "Direct effect on the objective: the write times the gradient at the residual the objective reads",
    effect: true,
    paired: true,
  },
  totalEffect: {
    name: "total",
    definition:
      "Estimated total effect on the objective: activation times gradient, through everything downstream",
    effect: true,
    paired: true,
  },
  verifiedEffect: {
    name: "verified",
    definition:
      "Verified total effect: the objective less what it is with the node really ablated, all norms live",
    effect: true,
    paired: false,
  },
};

export interface Column {
  id: string;
  quantity: Quantity;
  side: Side;
  /** Heading below the quantity's name. */
  label: string;
  /** Whether the sign is part of the news. */
  signed: boolean;
}

/** What the three sides of a quantity are called: before and after an edit, or prompt B and this one. */
export const SIDE_NAMES = {
  untouched: { before: "before", after: "after" },
  b: { before: "B", after: "A" },
} as const;

export function columns(
  paired: boolean,
  names: { before: string; after: string } = SIDE_NAMES.untouched,
): Column[] {
  return (Object.keys(QUANTITIES) as Quantity[]).flatMap((quantity) => {
    const { effect, paired: both } = QUANTITIES[quantity];
    const sides: [Side, string][] =
      paired && both
        ? [
            ["before", names.before],
            ["after", names.after],
            ["difference", "diff."],
          ]
        : [["after", paired ? names.after : ""]];
    return sides.map(([side, label]) => ({
      id: `${quantity}.${side}`,
      quantity,
      side,
      label,
      signed: effect || side === "difference",
    }));
  });
}

/** A row's value in a column; undefined where the node does not exist in that run. */
export function value(row: NodeRowJson, { quantity, side }: Column): number | undefined {
  const after = num(row[quantity]);
  if (side === "after") return after;
  const before = quantity === "verifiedEffect" ? undefined : num(row.compare?.[quantity]);
  if (side === "before") return before;
  return difference(after, before);
}

/** After minus before; nothing where either is. */
export function difference(after?: number, before?: number): number | undefined {
  return after === undefined || before === undefined ? undefined : after - before;
}

/** The largest absolute value of a quantity over all rows and sides: the end of its colour scale. */
export function extent(
  rows: readonly NodeRowJson[],
  shown: readonly Column[],
): Map<Quantity, number> {
  const ends = new Map<Quantity, number>();
  for (const col of shown) {
    let end = ends.get(col.quantity) ?? 0;
    for (const row of rows) end = Math.max(end, Math.abs(value(row, col) ?? 0));
    ends.set(col.quantity, end);
  }
  // Estimate and exact effect are compared by colour, and a scale that grows with every value flickers.
  const estimated = ends.get("totalEffect") ?? 0;
  ends.set("verifiedEffect", Math.max(estimated, ends.get("verifiedEffect") ?? 0));
  return ends;
}

/** What the explanation of a row says, method and score included; undefined where there is none. */
export type TextOf = (row: NodeRowJson) => string | undefined;

export interface Sort {
  column: string;
  /** By absolute value, by value downwards, by value upwards. */
  by: "size" | "down" | "up";
}

/** The columns of words: which node, at which tokens, and what its component does. */
export interface Words {
  id: "node" | "at" | "says";
}

/** What a click on a column's heading does: largest first, then upside down, then the service's order. */
export function nextSort(now: Sort | null, col: Column | Words): Sort | null {
  const ways: Sort["by"][] = !("signed" in col)
    ? ["up", "down"]
    : col.signed
      ? ["size", "down", "up"]
      : ["down", "up"];
  const step = now?.column === col.id ? ways.indexOf(now.by) + 1 : 0;
  const by = ways[step];
  return by ? { column: col.id, by } : null;
}

/** Rows in the asked order; rows without a value come last; equal rows keep the service's order. */
export function sorted(
  rows: readonly NodeRowJson[],
  sort: Sort | null,
  shown: readonly Column[],
  textOf: TextOf = () => undefined,
): NodeRowJson[] {
  if (sort?.column === "says") {
    const way = sort.by === "down" ? -1 : 1;
    const told: { row: NodeRowJson; text: string }[] = [];
    const silent: NodeRowJson[] = [];
    for (const row of rows) {
      const text = textOf(row);
      if (text === undefined) silent.push(row);
      else told.push({ row, text: text.toLowerCase() });
    }
    const ordered = told.sort((a, b) => (a.text === b.text ? 0 : a.text < b.text ? -way : way));
    return [...ordered.map(({ row }) => row), ...silent];
  }
  if (sort?.column === "node" || sort?.column === "at") {
    const way = sort.by === "down" ? -1 : 1;
    const compare = sort.column === "node" ? byAddress : byPlace;
    return [...rows].sort((a, b) => way * compare(a.node ?? "", b.node ?? ""));
  }
  const col = shown.find(({ id }) => id === sort?.column);
  if (!sort || !col) return [...rows];
  const key = (row: NodeRowJson): number => {
    const x = value(row, col);
    if (x === undefined) return Infinity;
    return sort.by === "size" ? -Math.abs(x) : sort.by === "down" ? -x : x;
  };
  return rows
    .map((row) => ({ row, key: key(row) }))
    .sort((a, b) => (a.key === b.key ? 0 : a.key < b.key ? -1 : 1))
    .map(({ row }) => row);
}

const { compare: byAddress } = new Intl.Collator("en", { numeric: true });

/** By the token written at, then by the token read from. */
function byPlace(a: string, b: string): number {
  const [one, other] = [site(a), site(b)];
  return (one.position ?? -1) - (other.position ?? -1) || (one.key ?? -1) - (other.key ?? -1);
}
