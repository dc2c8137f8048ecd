// What can be done to a node, with the reason where it cannot; and what each makes of the question.
import { beforeEach, expect, test, vi } from "vitest";
import type { InterventionJson } from "../src/gen/tdb/inference/v1/intervention_pb";
import { USUAL, type Question } from "../src/url";

const rpc = vi.hoisted(() => ({ attribute: vi.fn(), run: vi.fn(), tokenize: vi.fn() }));
vi.mock("../src/inference", () => rpc);
vi.stubGlobal("history", { replaceState: vi.fn() });

const state = await import("../src/state");
const { offers, traces } = await import("../src/offers");
const { traceBackTo, traceInto } = await import("../src/editing");
const { words } = await import("../src/interventions");

const HEAD = "head.2.0~3-1";
const question: Question = {
  ...USUAL,
  model: "m",
  prompt: "When Mary went to",
  targets: [" Mary"],
  distractors: [" John"],
  compare: "When John went to",
};
const FEATURES = ["zero", "set", "scale", "patch", "mean", "mask", "project_out"];
const tokens = (text: string) => text.split(" ").map((text, id) => ({ id, text }));

function show(change: Partial<Question> = {}): void {
  const asked = { ...question, ...change };
  state.asked.value = asked;
  state.answer.value = {
    question: asked,
    response: { tokens: tokens(asked.prompt), rows: [{ node: HEAD, activation: 1 }] },
    b: asked.compare === "" ? null : tokens(asked.compare),
    outlooks: null,
    verified: { effects: new Map(), agreement: null },
  };
}

beforeEach(() => {
  rpc.attribute.mockReset().mockReturnValue(new Promise(() => {}));
  const features = ["objective.traced_node", "target.residual", "verify"];
  state.model.value = {
    supports: [...features, ...FEATURES.map((op) => `intervention.${op}`)].map((feature) => ({
      feature,
      supported: true,
    })),
    dictionaries: [{ id: "demo-mlp_out-3", siteIn: "mlp_out.3", siteOut: "mlp_out.3" }],
  };
  show();
});

const all = (node: string) => offers(node).flatMap(({ offers }) => offers);
const offer = (node: string, label: string) => all(node).find((each) => each.label === label)!;
const edits = () =>
  (rpc.attribute.mock.lastCall?.[0] as { run: { interventions?: InterventionJson[] } }).run
    .interventions;

test("patching takes the value of prompt B and is said in words", () => {
  offer(HEAD, "patch from B").act();
  expect(edits()).toEqual([
    { target: HEAD, patch: { source: { prompt: { text: "When John went to" } } } },
  ]);
  expect(words(edits()![0]!)).toBe(`patch ${HEAD} from B`);
  state.asked.value = { ...question, compare: "" };
  expect(words(edits()![0]!)).toBe(`patch ${HEAD} from “When John went to”`);
});

test("a patch takes the place of an ablation", () => {
  show({ interventions: [{ target: HEAD, zero: {} }] });
  offer(HEAD, "patch from B").act();
  expect(edits()).toHaveLength(1);
});

test("without a prompt B, or one of other length, nothing is patched, and the reason is said", () => {
  show({ compare: "" });
  expect(offer(HEAD, "patch from B").why).toMatch(/another prompt/);
  show({ compare: "When John went" });
  expect(offer(HEAD, "patch from B").why).toMatch(/3 tokens and the first 4/);
  expect(offer(HEAD, "mean of A and B").why).toMatch(/equally long/);
  expect(offer("neuron.0.1~2", "mean of A and B").why).toBeUndefined();
});

test("a mean is by position where both prompts have the same places", () => {
  offer("neuron.0.1~2", "mean of A and B").act();
  expect(edits()?.[0]?.mean).toEqual({
    prompts: [{ text: question.prompt }, { text: question.compare }],
    perPosition: true,
  });
  show({ compare: "When John went" });
  offer("neuron.0.1~2", "mean of A and B").act();
  expect(edits()?.[0]?.mean).not.toHaveProperty("perPosition");
});

test("only pairs are masked", () => {
  offer(HEAD, "mask").act();
  expect(edits()).toEqual([{ target: HEAD, mask: {} }]);
  expect(offer("neuron.0.1~2", "mask")).toBeUndefined();
});

test("a direction is projected out where a vector is", () => {
  const made = (node: string) => {
    offer(node, "project out").act();
    return edits()?.at(-1);
  };
  const unembedding = { targets: [{ text: " Mary" }], distractors: [{ text: " John" }] };
  expect(made("neuron.1.7~2")).toEqual({
    target: "resid_post.1~2",
    projectOut: { direction: { writeOf: "neuron.1.7" } },
  });
  expect(made("latent.demo-mlp_out-3.5~2")?.target).toBe("resid_post.3~2");
  expect(made("embed~2")).toEqual({
    target: "embed~2",
    projectOut: { direction: { unembedding } },
  });
  expect(words(made(HEAD)!)).toBe("project ␣Mary − ␣John out of attn.2~3");
});

test("what is not supported says so and does nothing that a key could reach", () => {
  state.model.value = { supports: [] };
  const still = all(HEAD).filter(({ why }) => why === undefined);
  expect(still.map(({ label }) => label)).toEqual(["open"]); // which needs no model
});

test("a head is traced through one of four inputs, a neuron through its own", () => {
  expect(traces(HEAD).map(({ key }) => key)).toEqual(["q", "k", "b", "v"]);
  expect(traces("neuron.0.1~2")).toHaveLength(1);
  expect(traces("embed~2")[0]?.why).toMatch(/upstream/);
  traces(HEAD)[0]?.act();
  expect(state.asked.value?.trace).toEqual([{ node: HEAD, through: "query" }]);
  expect(traces(HEAD)[0]?.why).toMatch(/traced now/);
});

test("a latent is traced where the service can", () => {
  const latent = "latent.demo-mlp_out-3.5~2";
  expect(traces(latent)[0]?.why).toMatch(/traced_node.latent/);
  state.model.value = {
    supports: ["objective.traced_node", "objective.traced_node.latent"].map((feature) => ({
      feature,
      supported: true,
    })),
  };
  expect(traces(latent)[0]?.why).toBeUndefined();
});

test("going back along a chain asks for what was there", () => {
  const neuron = { node: "neuron.0.1~2" };
  show({ trace: [{ node: HEAD, through: "query" }, neuron] });
  traceBackTo(1);
  expect(state.asked.value?.trace).toHaveLength(1);
  traceBackTo(0);
  expect(state.asked.value?.trace).toEqual([]);
  show({ trace: [neuron] });
  traceInto(neuron);
  expect(rpc.attribute).toHaveBeenCalledTimes(2);
});
