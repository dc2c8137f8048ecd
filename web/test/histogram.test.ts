// Bars stand where their values are, as high as the logarithm of their count.
import { expect, test } from "vitest";
import { bars } from "../src/histogram";

test("a bin is as wide as its interval", () => {
  const [first, second] = bars({ edges: [0, 1, 4], counts: ["0", "7"] });
  expect(first).toMatchObject({ left: 0, width: 0.25, height: 0, count: 0 });
  expect(second).toMatchObject({ left: 0.25, width: 0.75, height: 1, count: 7, share: 1 });
});

test("heights are logarithmic", () => {
  const [small] = bars({ edges: [0, 1, 2], counts: ["9", "99"] });
  expect(small?.height).toBeCloseTo(0.5);
});

test("a single value makes bars side by side, and half a histogram none", () => {
  expect(bars({ edges: [1, 1], counts: ["3"] })[0]).toMatchObject({ left: 0, width: 1 });
  expect(bars({ edges: [1, 2], counts: ["3", "4"] })).toEqual([]);
  expect(bars({})).toEqual([]);
});
