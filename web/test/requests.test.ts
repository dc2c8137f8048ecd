// The requests the page sends are those a reader of the API would write.
import { expect, test } from "vitest";
import { readNumber } from "../src/actions";
import { site } from "../src/address";
import { curl } from "../src/copy";
import { receiptWords, words } from "../src/interventions";
import { attributeRequest, likelyIds, predictionRequest } from "../src/requests";
import { typed, visible } from "../src/tokens";
import { ablation, USUAL, type Question } from "../src/url";

const question: Question = {
  model: "",
  prompt: "When Mary",
  targets: [" Mary"],
  distractors: [" John"],
  ...USUAL,
};
const edited = { ...question, interventions: [ablation("head.2.3~1-0")] };

test("without interventions there is one run and nothing to compare", () => {
  expect(attributeRequest(question, false)).toEqual({
    run: { prompt: { text: "When Mary" } },
    objective: { logitDiff: { targets: [{ text: " Mary" }], distractors: [{ text: " John" }] } },
    topK: 50,
    rankBy: "COLUMN_TOTAL_EFFECT",
  });
});

test("with interventions the untouched run is compared", () => {
  const request = attributeRequest(edited, false);
  expect(request.run?.interventions).toEqual([{ target: "head.2.3~1-0", zero: {} }]);
  expect(request.compare).toEqual({ prompt: { text: "When Mary" } });
});

test("the base of the next tokens is the untouched run", () => {
  expect(predictionRequest(edited, [3], false).run?.interventions).toHaveLength(1);
  expect(predictionRequest(edited, [3], true).run?.interventions).toBeUndefined();
  expect(predictionRequest(edited, [3, 0], true).tokens).toEqual([{ id: 3 }, { id: 0 }]);
});

test("likely tokens of both runs are named once; an id left out of the JSON is 0", () => {
  const score = (id?: number) => ({ token: id === undefined ? {} : { id }, score: 1 });
  expect(
    likelyIds({ topTokens: [score(5), score()], compareTopTokens: [score(7), score(5)] }),
  ).toEqual([5, 0, 7]);
});

test("a command for the shell survives quotes and never holds the token", () => {
  const text = curl("http://box/x", { run: { prompt: { text: "it's" } } }, true);
  expect(text).toContain(`it'\\''s`);
  expect(text).toContain("$TDB_TOKEN");
});

test("addresses say where a node sits", () => {
  expect(site("head.2.3~13-1")).toEqual({
    component: "head.2.3",
    kind: "head",
    position: 13,
    key: 1,
  });
  expect(site("neuron.3.17~5")).toEqual({ component: "neuron.3.17", kind: "neuron", position: 5 });
  expect(site("bias.read")).toEqual({ component: "bias.read", kind: "bias" });
});

test("an edit and what it did are words", () => {
  expect(words(ablation("head.2.3~13-1"))).toBe("ablate head.2.3~13-1");
  expect(words({ target: "neuron.1.2", scale: { factor: 2 } })).toBe("scale neuron.1.2 × 2");
  expect(words({ target: "neuron.1.3~2", set: { value: -0.5 } })).toBe("set neuron.1.3~2 = −0.5");
  expect(words({ target: "neuron.1.3~2", set: { value: 0 } })).toBe("set neuron.1.3~2 = 0");
  expect(words({ target: "resid_post.2", projectOut: {} })).toBe(
    "project a direction out of resid_post.2",
  );
  expect(receiptWords({ sites: 1, deltaNorm: 4.1, before: 0.83, after: 0 })).toBe(
    "1 site · Δ norm 4.10 · 0.830 → 0",
  );
});

test("white space is visible and can be typed as it is seen", () => {
  expect(visible(" a\n\tb")).toBe("␣a⏎⇥b");
  expect(typed("␣Mary")).toBe(" Mary");
});

test.each([
  ["0.5", 0.5],
  [" −2 ", -2],
  ["+1e-3", 0.001],
  [".5", 0.5],
  ["0", 0],
  ["", null],
  ["one", null],
  ["0x10", null],
  ["1e999", null],
  ["Infinity", null],
  ["1,5", null],
])("a typed %j is the number %j", (text, x) => expect(readNumber(text)).toBe(x));

test("prompt B stands beside a run without edits, or where it is chosen", () => {
  const b = { ...question, compare: "When John" };
  const prompts = (of: Question) => attributeRequest(of, false).compare?.prompt?.text;
  expect(prompts(question)).toBeUndefined();
  expect(prompts(b)).toBe("When John");
  expect(prompts({ ...edited, compare: "When John" })).toBe("When Mary");
  expect(prompts({ ...edited, compare: "When John", againstB: true })).toBe("When John");
  expect(predictionRequest(b, [], true).run).toEqual({ prompt: { text: "When John" } });
});

test("dictionaries are asked for by name", () => {
  expect(attributeRequest(question, false)).not.toHaveProperty("dictionaries");
  const latents = attributeRequest({ ...question, dictionaries: ["demo-mlp_out"] }, false);
  expect(latents.dictionaries).toEqual(["demo-mlp_out"]);
});

test("sources are asked for only of latents", () => {
  expect(attributeRequest(question, true, true).readOuts).toEqual({ tokens: 6 });
  const latents = { ...question, dictionaries: ["demo"] };
  expect(attributeRequest(latents, true, true).readOuts).toEqual({ tokens: 6, sources: 5 });
  expect(attributeRequest(latents, true, false).readOuts).toEqual({ tokens: 6 });
  expect(attributeRequest(latents, false, true)).not.toHaveProperty("readOuts");
});
