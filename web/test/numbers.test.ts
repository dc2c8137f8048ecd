import { expect, test } from "vitest";
import { brief, count, full, num, percent, plain, signed } from "../src/numbers";

test.each([
  [0, "0"],
  [3.14159, "3.14"],
  [11.0849, "11.1"],
  [0.031249, "0.0312"],
  [0.0011, "0.00110"],
  [0.00011, "1.10e−4"],
  [999.4, "999"],
  [999.6, "1000"],
  [123456, "123456"],
  [1.5e7, "1.50e+7"],
  [-2.5, "−2.50"],
])("%d is written %s", (x, text) => expect(plain(x)).toBe(text));

test.each([
  [2.913, "+2.91"],
  [-0.704, "−0.704"],
  [0, "0"],
  [-0, "0"],
  [-4.1e-7, "−4.10e−7"],
])("%d is written %s where the sign matters", (x, text) => expect(signed(x)).toBe(text));

test.each([
  [0.004, "·"],
  [0.005, "+0.01"],
  [-0.5, "−0.50"],
  [12.34, "+12.3"],
  [-1234, "−1234"],
])("%d is briefly %s", (x, text) => expect(brief(x)).toBe(text));

test("full precision is really full", () => {
  expect(full(0.1 + 0.2)).toBe("0.30000000000000004");
  expect(full(-1.5)).toBe("−1.5");
});

test.each([
  [0, "0 %"],
  [0.00001, "<0.01 %"],
  [0.0018, "0.18 %"],
  [0.469, "46.9 %"],
  [0.99999, ">99.9 %"],
  [1, "100.0 %"],
])("a probability of %d is %s", (p, text) => expect(percent(p)).toBe(text));

test("an absent or non-finite double is no number, and an absent one is not 0", () => {
  expect(num(undefined)).toBeUndefined();
  expect(num("NaN")).toBeUndefined();
  expect(num(0)).toBe(0);
});

test("nouns agree", () => {
  expect([count(1, "token"), count(14, "token")]).toEqual(["1 token", "14 tokens"]);
});
