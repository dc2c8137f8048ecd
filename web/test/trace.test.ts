// A chain of traced nodes, as the service wants it, as a link holds it, and what it cannot be.
import { expect, test } from "vitest";
import { unit } from "../src/meaning";
import { problems } from "../src/problems";
import { ConnectError } from "../src/connect";
import { attributeRequest } from "../src/requests";
import {
  decodeStep,
  encodeStep,
  stepWords,
  untraceable,
  withoutStep,
  type Step,
} from "../src/trace";
import { decode, encode, USUAL, type Question } from "../src/url";

const query: Step = { node: "head.3.1~13-1", through: "query" };
const value: Step = { node: "head.2.0~13-9", through: "value" };
const neuron: Step = { node: "neuron.1.88~1" };
const question: Question = {
  ...USUAL,
  model: "",
  prompt: "When Mary",
  targets: [" Mary"],
  distractors: [],
};
const own = { logitDiff: { targets: [{ text: " Mary" }], distractors: [] } };
const objective = (...trace: Step[]) =>
  attributeRequest({ ...question, trace }, false).objective ?? {};

test("the last node of the chain is the objective", () => {
  expect(objective()).toEqual(own);
  expect(objective(query)).toEqual({
    tracedNode: { node: "head.3.1~13-1", through: "THROUGH_QUERY" },
  });
  expect(objective(query, neuron)).toEqual({ tracedNode: { node: "neuron.1.88~1" } });
});

test("only a trace through V names what it is measured on: what comes before it in the chain", () => {
  expect(objective(value).tracedNode?.downstream).toEqual(own);
  expect(objective(query, value).tracedNode?.downstream).toEqual({
    tracedNode: { node: "head.3.1~13-1", through: "THROUGH_QUERY" },
  });
  expect(objective(value, query).tracedNode).not.toHaveProperty("downstream");
});

test("what cannot be traced is said", () => {
  expect(untraceable("embed~3", undefined, [])).toMatch(/upstream/);
  expect(untraceable(value.node, "value", [query, value])).toMatch(/through V/);
  expect(untraceable(value.node, "value", [query])).toBeUndefined();
  expect(untraceable(value.node, "query", [value])).toBeUndefined();
  expect(untraceable("latent.demo-mlp_out-0.3~4", undefined, [])).toBeUndefined();
});

test("a step is taken out of the middle, unless what follows stood on it", () => {
  expect(withoutStep([query, neuron], 0)).toEqual([neuron]);
  expect(withoutStep([value, query, value], 1)).toEqual([value]);
});

test("a chain survives the address bar in readable form", () => {
  const trace = [query, neuron];
  const hash = encode({ ...question, trace });
  expect(decodeURIComponent(hash)).toContain("trace=head.3.1~13-1:query&trace=neuron.1.88~1");
  expect(decode(hash)?.trace).toEqual(trace);
  expect(encodeStep(decodeStep("neuron.1.2~3:up"))).toBe("neuron.1.2~3:up");
});

test.each(["head.3.1~13-1:mind", "head.3.1~13-1:", "a b", ""])("a link cannot trace %j", (text) => {
  expect(() => decode(`#prompt=x&trace=${encodeURIComponent(text)}`)).toThrow(/link traces/);
});

test("words and units", () => {
  expect(stepWords(query)).toBe("head.3.1~13-1 through Q");
  expect(stepWords(neuron)).toBe("neuron.1.88~1");
  expect(unit({ trace: [] })).toBe("logits");
  expect(unit({ trace: [query] })).toBe("units of the score");
  expect(unit({ trace: [value] })).toBe("logits");
  expect(unit({ trace: [query, value] })).toBe("units of the score");
  expect(unit({ trace: [neuron] })).toBe("units of the pre-activation");
});

test.each([
  ["objective.traced_node.node", "trace", 0],
  ["objective.traced_node.downstream.traced_node.node", "trace", 1],
  ["objective.traced_node.downstream.logit_diff.targets[1]", "target", 1],
  ["compare_objective.traced_node.through", "trace", 0],
])("%s belongs to %s %i", (field, place, index) => {
  const error = new ConnectError("invalid_argument", "no", [{ field, description: "no" }]);
  expect(problems(error)).toEqual([{ place, index, text: "No.", retry: false }]);
});
