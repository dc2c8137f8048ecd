// A filter shows exactly the rows that its text describes, and a text that describes nothing says so.
import { expect, test } from "vitest";
import { columns, sorted } from "../src/columns";
import {
  decodeFilters,
  encodeFilters,
  filtered,
  numberTest,
  readFilters,
  spans,
  withFilter,
  type Filters,
} from "../src/filters";

const paired = columns(true);
const rows = [
  { node: "embed~1", directEffect: 0.5, totalEffect: -0.6 },
  { node: "head.2.3~13-1", directEffect: -0.2, totalEffect: 2, compare: { totalEffect: 3 } },
  { node: "head.12.3~11-3", directEffect: 0, totalEffect: 0.5, compare: { totalEffect: -0.5 } },
  { node: "neuron.3.13~5", compare: { totalEffect: 1 } },
];
const kept = (filters: Filters, shown = paired) =>
  filtered(rows, readFilters(filters, shown)).map(({ node }) => node?.split("~")[0]);

test.each([
  ["head", ["head.2.3", "head.12.3"]],
  ["HEAD.2", ["head.2.3"]],
  ["embed neuron", ["embed", "neuron.3.13"]],
  ["neuron, ~13-1", ["head.2.3", "neuron.3.13"]],
  [" ", ["embed", "head.2.3", "head.12.3", "neuron.3.13"]],
  ["mlp", []],
])("node %j", (text, nodes) => expect(kept({ node: text })).toEqual(nodes));

test.each([
  ["1", ["embed", "head.2.3"]],
  ["13", ["head.2.3"]],
  ["3, 5", ["head.12.3", "neuron.3.13"]],
  ["4..11", ["head.12.3", "neuron.3.13"]],
  ["99", []],
])("at %j, read or written", (text, nodes) => expect(kept({ at: text })).toEqual(nodes));

test.each([
  ["0.5", "|x| ≥ 0.5", [true, true, true, true, false]],
  ["|x| ≥ .5", "≥ 0.5", [false, false, true, true, false]],
  ["+0.5", "≥ 0.5", [false, false, true, true, false]],
  ["−0.5", "≤ −0.5", [true, true, false, false, false]],
  ["+", "> 0", [false, false, true, true, false]],
  ["-", "< 0", [true, true, false, false, false]],
  [">0.5", "> 0.5", [false, false, false, true, false]],
  ["<= -5e-1", "≤ −0.5", [true, true, false, false, false]],
  ["> -0.5", "> −0.5", [false, false, true, true, true]],
  ["<0", "< 0", [true, true, false, false, false]],
])("%j reads %s", (text, words, expected) => {
  const read = numberTest(text);
  expect(read?.words).toBe(words);
  expect([-0.6, -0.5, 0.5, 0.6, 0].map((x) => read?.keeps(x))).toEqual(expected);
});

test.each(["", "x", ">", "1 2x", "--1", "1e999", "|x|", "=>3"])("%j is no condition", (text) =>
  expect(numberTest(text)).toBeNull(),
);

test.each(["", ",", "x", "-1", "5..", "8..5", "1.5"])("%j names no tokens", (text) =>
  expect(spans(text)).toBeNull(),
);

test("a row without a value in a column passes no filter on it", () => {
  expect(kept({ "totalEffect.after": "0" })).toEqual(["embed", "head.2.3", "head.12.3"]);
  expect(kept({ "totalEffect.difference": "+" })).toEqual(["head.12.3"]);
  expect(kept({ "totalEffect.before": "-" })).toEqual(["head.12.3"]);
});

test("filters hold together; one that cannot be read filters nothing and says why", () => {
  expect(kept({ node: "head", "directEffect.after": "-" })).toEqual(["head.2.3"]);
  const broken = { node: "head", "directEffect.after": "much" };
  expect(kept(broken)).toEqual(["head.2.3", "head.12.3"]);
  expect(readFilters(broken, paired)[1]?.problem).toMatch(/“much” is no condition on direct after/);
});

test("a column that is gone filters nothing until it is back", () => {
  const filters = { "totalEffect.before": "-" };
  expect(kept(filters, columns(false))).toHaveLength(rows.length);
  expect(readFilters(filters, columns(false))).toEqual([]);
});

test("filters survive the address bar, those that cannot be read stay out of it", () => {
  const filters = { node: "head 2&3", at: "1, 3", "totalEffect.difference": "> 0.5" };
  const text = encodeFilters({ ...filters, "totalEffect.after": "?" });
  expect(decodeFilters(`#prompt=x${text}`)).toEqual(filters);
  expect(encodeFilters({})).toBe("");
  expect(decodeFilters("#prompt=x")).toEqual({});
});

test.each([
  ["filter=beauty:1", /beauty/],
  ["filter=node:", /node/],
  ["filter=at:here", /here.*positions/],
  ["filter=totalEffect.after:much", /much/],
])("%s is refused with a sentence", (part, sentence) => {
  expect(() => decodeFilters(`#prompt=x&${part}`)).toThrow(sentence);
});

test("an emptied filter is gone", () => {
  expect(withFilter({ node: "a", at: "1" }, "node", "")).toEqual({ at: "1" });
});

test("a thousand rows are filtered and sorted at once", () => {
  const many = Array.from({ length: 1000 }, (_, i) => ({
    node: `neuron.${i % 7}.${i}~${i % 13}`,
    activation: Math.sin(i),
    totalEffect: Math.cos(i),
    compare: { totalEffect: Math.sin(2 * i) },
  }));
  const filters = readFilters(
    { node: "neuron", at: "0..12", "totalEffect.difference": "0" },
    paired,
  );
  const began = performance.now();
  const found = sorted(filtered(many, filters), { column: "node", by: "down" }, paired);
  expect(performance.now() - began).toBeLessThan(100);
  expect(found).toHaveLength(1000);
});

test("explanations are filtered by all of the words, rows without one by none, and sorted by text", () => {
  const texts: Record<string, string> = {
    "embed~1": "Names of people token pattern · AUC 0.91",
    "neuron.3.13~5": "copies names human · not scored",
  };
  const textOf = ({ node = "" }) => texts[node];
  const says = (text: string) =>
    filtered(rows, readFilters({ says: text }, paired, textOf)).map(({ node }) => node);
  expect(says("names")).toEqual(["embed~1", "neuron.3.13~5"]);
  expect(says("NAMES auc")).toEqual(["embed~1"]);
  expect(says("human")).toEqual(["neuron.3.13~5"]);
  expect(says("none")).toEqual(["head.2.3~13-1", "head.12.3~11-3"]);
  const order = (by: "up" | "down") =>
    sorted(rows, { column: "says", by }, paired, textOf).map(({ node }) => node?.split("~")[0]);
  expect(order("up")).toEqual(["neuron.3.13", "embed", "head.2.3", "head.12.3"]);
  expect(order("down")).toEqual(["embed", "neuron.3.13", "head.2.3", "head.12.3"]);
  expect(decodeFilters(`#a${encodeFilters({ says: "names auc" })}`)).toEqual({ says: "names auc" });
});
