// A record's examples as heatmaps need them: one value per token, a head's pairs by query and key.
import { expect, test } from "vitest";
import {
  around,
  byToken,
  examples,
  heat,
  pairsOf,
  passage,
  peak,
  scales,
  triangle,
} from "../src/passages";

const head = passage({ tokenTexts: ["a", "b", "c"], pairActivations: [1, 2, 3, 4, 5, 6] });
const neuron = passage({ tokenIds: [7, 8], activations: [-2, 0.5], documentId: "d" });

test("pairs stand row by row, each query with the keys up to itself", () => {
  expect(head.pairs).toEqual([[1], [2, 3], [4, 5, 6]]);
});

test("with a width only the last keys of a query were recorded", () => {
  expect(triangle([1, 2, 3, 4, 5], 3, 2)).toEqual([[1], [2, 3], [undefined, 4, 5]]);
});

test("a head's tokens are summed over what they read, or over what reads them", () => {
  expect(byToken(head, "reads")).toEqual([1, 5, 15]);
  expect(byToken(head, "is read")).toEqual([7, 8, 6]);
  expect(byToken(neuron, "is read")).toEqual([-2, 0.5]);
});

test("one token's pairs: the keys it reads, or the queries that read it", () => {
  expect(pairsOf(head, 1, "reads")).toEqual([2, 3, undefined]);
  expect(pairsOf(head, 1, "is read")).toEqual([undefined, 3, 5]);
});

test("each form has a scale of its own, over all examples of the record", () => {
  expect(scales([head])).toEqual({ token: { reads: 15, "is read": 8 }, pair: 6 });
  expect(scales([neuron, passage({ tokenIds: [1], activations: [4] })]).pair).toBe(4);
});

test("what is not positive has no colour, and nothing is more than all", () => {
  expect([heat(-1, 4), heat(1, 4), heat(9, 4), heat(undefined, 4), heat(1, 0)]).toEqual([
    0, 0.25, 1, 0, 0,
  ]);
});

test("a token without a text is named by its id, and the peak is where it fires most", () => {
  expect(neuron.texts).toEqual(["<7>", "<8>"]);
  expect(peak(neuron)).toBe(1);
  expect(peak(head)).toBe(2);
});

test("examples keep the interval they were drawn from", () => {
  const one = { tokenIds: [1], activations: [1] };
  const found = examples({ top: [one], quantiles: [{ lower: 0, upper: 2, examples: [one, one] }] });
  expect(found.top).toHaveLength(1);
  expect(found.random).toEqual([]);
  expect(found.quantiles.map(({ interval }) => interval)).toEqual([
    { lower: 0, upper: 2, fraction: undefined },
    { lower: 0, upper: 2, fraction: undefined },
  ]);
});

test("a line shows the part around the peak, and still says where it is", () => {
  const texts = Array.from({ length: 60 }, (_, i) => `t${i}`);
  const long = passage({ tokenTexts: texts, activations: texts.map((_, i) => (i === 40 ? 1 : 0)) });
  const shown = around(long);
  expect(shown.start).toBe(26);
  expect(shown.texts[40 - 26]).toBe("t40");
  expect(shown.values[40 - 26]).toBe(1);
  expect(around(neuron).start).toBe(0);
});
