// No explanation is shown without how it was made and what it is worth.
import { expect, test } from "vitest";
import type { ExplanationJson, ScoreJson } from "../src/gen/tdb/explainer/v1/explanation_pb";
import {
  failureWords,
  fits,
  label,
  MADE_METHODS,
  mainScore,
  mainScorer,
  scorersOf,
  scoreTitle,
} from "../src/worth";

const auc = (value: number, more: Partial<ScoreJson> = {}): ScoreJson => ({
  scorer: "SCORER_DETECTION",
  measure: "MEASURE_AUC",
  value,
  judge: "offline",
  ...more,
});
const accuracy: ScoreJson = { ...auc(0.99), measure: "MEASURE_BALANCED_ACCURACY" };
const by = (
  method: NonNullable<ExplanationJson["provenance"]>["method"] & string,
  scores: ScoreJson[] = [],
  more: object = {},
): ExplanationJson => ({ text: "names", provenance: { method, ...more }, scores });

test.each<[string, ExplanationJson]>([
  ["token pattern · AUC 0.91", by("METHOD_TOKEN_PATTERN", [accuracy, auc(0.912)])],
  ["contrastive · not scored", by("METHOD_CONTRASTIVE")],
  ["human, ana · not scored", by("METHOD_HUMAN", [], { author: "ana" })],
  [
    "imported, by gpt-4 · correlation −0.05",
    by(
      "METHOD_IMPORTED",
      [{ measure: "MEASURE_PUBLISHED", measureName: "correlation", value: -0.05 }],
      { explainerModel: "gpt-4" },
    ),
  ],
  [
    "attention head · head pairs AUC 0.70",
    by("METHOD_ATTENTION_HEAD", [auc(0.7, { scorer: "SCORER_HEAD_PAIRS" })]),
  ],
  [
    "token pattern · simulation correlation 0.30",
    by("METHOD_TOKEN_PATTERN", [
      { scorer: "SCORER_SIMULATION", measure: "MEASURE_PEARSON", value: 0.3 },
    ]),
  ],
  ["method not stated · not scored", { text: "?" }],
])("%s", (words, explanation) => expect(label(explanation)).toBe(words));

test("a language model's judgement stands before the offline one, the newest first", () => {
  const own = by("METHOD_TOKEN_PATTERN", [
    auc(0.9),
    auc(0.6, { judge: "big" }),
    auc(0.5, { judge: "big" }),
  ]);
  expect(mainScore(own)?.value).toBe(0.6);
});

test("a score that is not defined is no score", () => {
  const { value: _, ...undefinedScore } = auc(0);
  expect(mainScore(by("METHOD_TOKEN_PATTERN", [undefinedScore]))).toBeUndefined();
});

test("a title says the interval, n, chance and judge", () => {
  const title = scoreTitle(auc(0.9, { low: 0.8, high: 0.95, n: 40, chance: 0.5 }));
  expect(title).toContain("= 0.9");
  expect(title).toContain("95 % interval 0.80 to 0.95");
  expect(title).toContain("over 40 items");
  expect(title).toContain("chance 0.50");
  expect(title).toContain("judged offline");
});

test("failures are counted by kind", () => {
  const failures = [
    { kind: "rate_limited", count: 2 },
    { kind: "timeout", count: 1 },
  ];
  expect(failureWords(auc(1, { failures }))).toBe("2 rate limited, 1 timeout");
  expect(failureWords(auc(1))).toBe("");
});

test("heads and the others have methods and scorers of their own", () => {
  const heads = MADE_METHODS.filter((method) => fits(method, "head"));
  expect(heads).toEqual(["METHOD_TOKEN_PATTERN", "METHOD_ATTENTION_HEAD", "METHOD_OUTPUT_CENTRED"]);
  expect(MADE_METHODS.filter((method) => fits(method, "latent"))).not.toContain(
    "METHOD_ATTENTION_HEAD",
  );
  expect(scorersOf("head")).toEqual(["SCORER_HEAD_PAIRS", "SCORER_INTERVENTION"]);
  expect(scorersOf("neuron")).not.toContain("SCORER_HEAD_PAIRS");
  expect(mainScorer("head")).toBe("SCORER_HEAD_PAIRS");
  expect(mainScorer("latent")).toBe("SCORER_DETECTION");
});
