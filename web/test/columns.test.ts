// Before, after and difference; and the order of rows.
import { expect, test } from "vitest";
import { columns, extent, nextSort, sorted, value } from "../src/columns";

const both = { node: "a", totalEffect: 1, compare: { totalEffect: 3 } };
const gone = { node: "b", compare: { totalEffect: -5 } };
const born = { node: "c", totalEffect: 2 };
const zero = { node: "d", totalEffect: 0, compare: { totalEffect: 4 } };
const rows = [both, gone, born, zero];

const paired = columns(true);
const of = (id: string) => paired.find((col) => col.id === `totalEffect.${id}`)!;

test("one run has a column each, two runs show before, after and difference of three of them", () => {
  expect(columns(false).map(({ id }) => id)).toEqual([
    "activation.after",
    "writeMagnitude.after",
    "directEffect.after",
    "totalEffect.after",
    "verifiedEffect.after",
  ]);
  expect(paired).toHaveLength(11);
  expect(paired.filter(({ side }) => side === "difference").every(({ signed }) => signed)).toBe(
    true,
  );
});

test("the difference is after minus before", () => {
  expect(value(both, of("before"))).toBe(3);
  expect(value(both, of("after"))).toBe(1);
  expect(value(both, of("difference"))).toBe(-2);
});

test("an ablated node went to 0, which is not the same as not being there", () => {
  expect(value(zero, of("difference"))).toBe(-4);
  expect(value(gone, of("after"))).toBeUndefined();
  expect(value(gone, of("difference"))).toBeUndefined();
  expect(value(born, of("before"))).toBeUndefined();
  expect(value(born, of("difference"))).toBeUndefined();
});

test("one scale spans all sides of a quantity", () => {
  expect(extent(rows, paired).get("totalEffect")).toBe(5);
  expect(extent(rows, columns(false)).get("totalEffect")).toBe(2);
});

test("sorting puts rows without a value last and keeps the service's order among equals", () => {
  const order = (by: "size" | "down" | "up") =>
    sorted(rows, { column: "totalEffect.difference", by }, paired).map(({ node }) => node);
  expect(order("size")).toEqual(["d", "a", "b", "c"]);
  expect(order("down")).toEqual(["a", "d", "b", "c"]);
  expect(order("up")).toEqual(["d", "a", "b", "c"]);
  expect(sorted(rows, null, paired)).toEqual(rows);
});

test("nodes sort by number, not by letter, and places by the token written at, then read from", () => {
  const nodes = [
    "neuron.0.10~2",
    "head.0.2~13-1",
    "head.0.10~2-1",
    "neuron.0.9~13",
    "head.0.2~13-0",
  ];
  const order = (column: string, by: "up" | "down") =>
    sorted(
      nodes.map((node) => ({ node })),
      { column, by },
      paired,
    ).map(({ node }) => node);
  expect(order("node", "up")).toEqual([
    "head.0.2~13-0",
    "head.0.2~13-1",
    "head.0.10~2-1",
    "neuron.0.9~13",
    "neuron.0.10~2",
  ]);
  expect(order("at", "up")).toEqual([
    "neuron.0.10~2",
    "head.0.10~2-1",
    "neuron.0.9~13",
    "head.0.2~13-0",
    "head.0.2~13-1",
  ]);
  expect(order("at", "down")[0]).toBe("head.0.2~13-1");
  expect(nextSort(null, { id: "node" })).toEqual({ column: "node", by: "up" });
  expect(nextSort({ column: "node", by: "down" }, { id: "node" })).toBeNull();
});

test("a column that is gone sorts nothing", () => {
  expect(sorted(rows, { column: "totalEffect.before", by: "up" }, columns(false))).toEqual(rows);
});

test("a heading goes through its orders and back to the service's", () => {
  const col = of("after");
  const first = nextSort(null, col);
  expect(first?.by).toBe("size");
  expect(nextSort(first, of("before"))).toEqual({ column: "totalEffect.before", by: "size" });
  expect(nextSort(nextSort(nextSort(first, col), col), col)).toBeNull();
});
