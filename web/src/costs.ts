/** What a language model costs, and who is asked: in words, before anything is sent. */
import type { EstimateCostResponseJson, UsageJson } from "./gen/tdb/explainer/v1/explain_pb";
import type { BudgetJson } from "./gen/tdb/explainer/v1/explain_pb";
import { count, num } from "./numbers";

/** `$0.0012`, `$4.20`. */
export function money(dollars: number): string {
  if (dollars === 0) return "$0";
  if (dollars < 0.01) {
    const text = dollars.toPrecision(2);
    return text.includes("e") ? "under $0.0001" : `$${text}`;
  }
  return `$${dollars.toFixed(2)}`;
}

/** `1,204 tokens`. */
export function tokenCount(tokens: number): string {
  return `${tokens.toLocaleString("en")} token${tokens === 1 ? "" : "s"}`;
}

/** `12 calls, 3,204 tokens, $0.0021; 4 answers were paid for before`. Empty where nobody was asked. */
export function usageWords(usage: UsageJson | undefined): string {
  const { calls = 0, cachedCalls = 0, promptTokens = 0, completionTokens = 0 } = usage ?? {};
  if (calls === 0 && cachedCalls === 0) return "";
  const tokens = Number(promptTokens) + Number(completionTokens);
  const cost = num(usage?.cost);
  const spent = [
    count(calls, "call"),
    tokenCount(tokens),
    ...(cost === undefined ? [] : [money(cost)]),
  ].join(", ");
  return cachedCalls === 0
    ? spent
    : `${spent}; ${count(cachedCalls, "answer")} had been paid for before`;
}

/** `about $0.002, at most $0.01`, or the same in tokens where prices are not known. */
export function estimateWords(estimate: EstimateCostResponseJson): string {
  const [expected, most] = [num(estimate.expectedCost), num(estimate.mostCost)];
  const tokens = `about ${tokenCount(Number(estimate.expectedTokens ?? 0))}, at most ${tokenCount(Number(estimate.mostTokens ?? 0))}`;
  if (expected === undefined || most === undefined)
    return `${tokens}; what they cost in money is not configured`;
  return `about ${money(expected)}, at most ${money(most)} (${tokens})`;
}

/** The most that the estimate allows for, as a limit: what was agreed to cannot be passed. */
export function budgetOf(estimate: EstimateCostResponseJson): BudgetJson {
  const most = num(estimate.mostCost);
  return {
    maxTokens: String(estimate.mostTokens ?? 0),
    ...(most === undefined ? {} : { maxCost: most }),
  };
}
