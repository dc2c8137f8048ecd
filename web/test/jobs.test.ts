// Money is said before it is spent, in the words of what is known, and a budget is what was typed.
import { expect, test } from "vitest";
import { readBudget } from "../src/budgetfield";
import { budgetOf, estimateWords, money, usageWords } from "../src/costs";
import type { JobJson } from "../src/gen/tdb/explainer/v1/job_pb";
import { suggestion } from "../src/jobform";
import { costWords, isActive, isResumable, outcomeWords, stateWords } from "../src/jobs";
import { aboutWords } from "../src/joblist";
import { wrongRange } from "../src/rangejob";
import { parts } from "../src/rowsjob";

test.each([
  [0, "$0"],
  [0.00123, "$0.0012"],
  [1e-9, "under $0.0001"],
  [0.5, "$0.50"],
  [12.345, "$12.35"],
])("money %j", (dollars, words) => expect(money(dollars)).toBe(words));

test("an estimate is in money where prices are known, and else says that they are not", () => {
  const tokens = { expectedTokens: "31000", mostTokens: "52000" };
  expect(estimateWords({ ...tokens, expectedCost: 0.0123, mostCost: 0.031 })).toBe(
    "about $0.01, at most $0.03 (about 31,000 tokens, at most 52,000 tokens)",
  );
  expect(estimateWords(tokens)).toContain("in money is not configured");
});

test("what was agreed to is the limit", () => {
  expect(budgetOf({ mostTokens: "52000", mostCost: 0.031 })).toEqual({
    maxTokens: "52000",
    maxCost: 0.031,
  });
  expect(budgetOf({ mostTokens: "7" })).toEqual({ maxTokens: "7" });
});

test.each<[string, boolean, ReturnType<typeof readBudget>]>([
  ["0.50", true, { maxCost: 0.5 }],
  [" $2", true, { maxCost: 2 }],
  ["200,000", false, { maxTokens: "200000" }],
  ["1.5", false, null],
  ["0", true, null],
  ["-1", true, null],
  ["much", true, null],
  ["", false, null],
])("budget %j", (text, inMoney, budget) => expect(readBudget(text, inMoney)).toEqual(budget));

test("the budget that is suggested is what is expected, rounded up", () => {
  expect(suggestion({ expectedCost: 0.0123 }, true)).toBe("0.013");
  expect(suggestion({ expectedCost: 0.5 }, true)).toBe("0.5");
  expect(suggestion({ expectedTokens: "30100" }, false)).toBe("31000");
  expect(suggestion({ expectedTokens: "0" }, false)).toBe("");
  expect(suggestion(null, true)).toBe("");
});

test("usage says what was paid before", () => {
  expect(usageWords({})).toBe("");
  expect(usageWords({ calls: 1, promptTokens: "1200", completionTokens: "4" })).toBe(
    "1 call, 1,204 tokens",
  );
  expect(usageWords({ calls: 0, cachedCalls: 2, cost: 0 })).toBe(
    "0 calls, 0 tokens, $0; 2 answers had been paid for before",
  );
});

const job: JobJson = {
  id: "j",
  state: "JOB_STATE_RUNNING",
  components: 30,
  explained: 12,
  skipped: 3,
};

test.each<[Partial<JobJson>, string]>([
  [{}, "15 of 30 components"],
  [{ rate: 3.2, secondsLeft: 5 }, "15 of 30 components, 3.20/s, 5 seconds left"],
  [{ state: "JOB_STATE_QUEUED" }, "waits for another job to end"],
  [{ state: "JOB_STATE_PAUSED" }, "paused at 15 of 30 components"],
  [
    { state: "JOB_STATE_WAITING", message: "no endpoint" },
    "15 of 30 components; it waits: No endpoint.",
  ],
  [{ state: "JOB_STATE_DONE" }, "done: 30 components"],
])("state %j", (more, words) => expect(stateWords({ ...job, ...more })).toBe(words));

test("which jobs go on, and which can be gone on with", () => {
  const states: JobJson["state"][] = ["JOB_STATE_QUEUED", "JOB_STATE_RUNNING", "JOB_STATE_WAITING"];
  for (const state of states) expect(isActive({ state: state! })).toBe(true);
  expect(isActive({ state: "JOB_STATE_PAUSED" })).toBe(false);
  expect(isResumable({ state: "JOB_STATE_OUT_OF_BUDGET" })).toBe(true);
  expect(isResumable({ state: "JOB_STATE_CANCELLED" })).toBe(false);
});

test("why components were skipped", () => {
  const reasons = [{ reason: "TOO_FEW_DOCUMENTS", count: 3 }];
  expect(outcomeWords({ ...job, reasons })).toBe("12 explained, 3 skipped (3 too few documents)");
});

test("the cost so far, the budget and the forecast", () => {
  const request = { budget: { maxCost: 0.5 } };
  expect(costWords({ ...job, request, usage: { cost: 0.04 }, forecastCost: 0.31 })).toBe(
    "$0.04 of at most $0.50, $0.31 in all by forecast",
  );
  expect(costWords(job)).toBe("");
  const tokens = { ...job, request: { budget: { maxTokens: "9000" } }, forecastTokens: "8000" };
  expect(costWords(tokens)).toBe(
    "0 tokens of at most 9,000 tokens, 8,000 tokens in all by forecast",
  );
});

test("what a job is about", () => {
  expect(aboutWords({ range: { first: "neuron.1.0", last: "neuron.1.9" } }, 10)).toBe(
    "neuron.1.0 to neuron.1.9",
  );
  expect(aboutWords({ list: { components: ["head.1.0", "head.1.1", "head.1.2"] } }, 3)).toBe(
    "head.1.0, head.1.1 and 1 more",
  );
  expect(aboutWords({}, 5)).toBe("5 components");
});

test.each([
  ["0", "29", undefined],
  ["3", "3", undefined],
  ["5", "4", "ends before it begins"],
  ["0", "30", "holds 0 to 29"],
  ["x", "3", "whole numbers"],
])("range %j to %j", (from, to, wrong) => {
  const said = wrongRange(from, to, 0, 29);
  if (wrong === undefined) expect(said).toBeUndefined();
  else expect(said).toContain(wrong);
});

test("rows are explained in parts: by dataset, and heads by themselves", () => {
  const all = ["head.1.0", "neuron.1.0", "latent.d.3", "head.2.0", "neuron.1.4", "neuron.9.0"];
  const found = parts(all, (component) => (component === "neuron.9.0" ? "" : "demo"));
  expect(found).toEqual([
    {
      dataset: "demo",
      words: "3 neurons and latents of demo",
      components: ["neuron.1.0", "latent.d.3", "neuron.1.4"],
    },
    { dataset: "demo", words: "2 heads of demo", components: ["head.1.0", "head.2.0"] },
    { dataset: "", words: "1 neuron of ", components: ["neuron.9.0"] },
  ]);
});
