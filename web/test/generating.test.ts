// Continuations: what is asked, how tokens are sorted to their branch, and what a link holds.
import { beforeEach, expect, test, vi } from "vitest";
import type { GenerateResponseJson } from "../src/gen/tdb/inference/v1/generate_pb";
import { curl, python } from "../src/copy";
import { generateRequest } from "../src/requests";
import { decodeSampling, DEFAULT_SAMPLING, encodeSampling } from "../src/sampling";
import { ablation, USUAL, type Question } from "../src/url";

const rpc = vi.hoisted(() => ({ generate: vi.fn() }));
vi.mock("../src/inference", () => rpc);

const state = await import("../src/state");
const { cancelGeneration, continuePrompt, differing, generating, generation, outdated } =
  await import("../src/generating");

const question: Question = {
  ...USUAL,
  model: "m",
  prompt: "When Mary",
  targets: [" Mary"],
  distractors: [],
};
const edited = { ...question, interventions: [ablation("head.0.0~1-0")] };

beforeEach(() => {
  state.found.value = [];
  state.model.value = { supports: [{ feature: "generate", supported: true }] };
  state.asked.value = edited;
  generation.value = null;
});

function token(branch: "EDITED" | "TWIN", id?: number): GenerateResponseJson {
  return { token: { branch: `BRANCH_${branch}`, token: id === undefined ? {} : { id } } };
}

test("a twin is asked for where there are interventions, a seed where something is drawn", () => {
  expect(generateRequest(question, DEFAULT_SAMPLING)).toEqual({
    model: "m",
    run: { prompt: { text: "When Mary" } },
    maxNewTokens: 24,
    topLogProbs: 4,
  });
  const hot = { tokens: 3, temperature: 0.8, seed: 7, pastEnd: true };
  expect(generateRequest(edited, hot)).toMatchObject({
    run: { interventions: [{ target: "head.0.0~1-0", zero: {} }] },
    twin: true,
    temperature: 0.8,
    seed: 7,
    pastEnd: true,
  });
  expect(generateRequest(edited, { ...hot, temperature: 0 })).not.toHaveProperty("seed");
});

test("tokens go to their branch as they come, and the end tells the seed", async () => {
  rpc.generate.mockImplementation(async function* () {
    yield token("EDITED", 5);
    yield token("TWIN");
    yield token("EDITED", 6);
    yield { summary: { continuations: [], manifest: { requestJson: '{"seed": 42}' } } };
  });
  await continuePrompt();
  const { tokens, seed } = generation.value!;
  expect(tokens.edited.map((each) => each.token?.id)).toEqual([5, 6]);
  expect(tokens.twin).toHaveLength(1);
  expect(seed).toBe(42);
  expect(generating.value).toBe(false);
});

test("a continuation of another run is out of date; another table of the same run is not", async () => {
  rpc.generate.mockImplementation(async function* () {
    yield token("EDITED", 5);
  });
  await continuePrompt();
  state.asked.value = { ...edited, rows: 20, trace: [{ node: "neuron.0.1~1" }] };
  expect(outdated.value).toBe(false);
  state.asked.value = question;
  expect(outdated.value).toBe(true);
});

test("cancelling keeps what came, and nothing goes wrong", async () => {
  rpc.generate.mockImplementation(async function* (_, { signal }: { signal: AbortSignal }) {
    yield token("EDITED", 5);
    cancelGeneration();
    signal.throwIfAborted();
  });
  await continuePrompt();
  expect(generation.value?.tokens.edited).toHaveLength(1);
  expect([generating.value, state.found.value]).toEqual([false, []]);
});

test("tokens differ by place; what has no counterpart yet does not", () => {
  const own = [{ token: { id: 1 } }, { token: { id: 2 } }, { token: { id: 3 } }];
  expect(differing(own, [{ token: { id: 1 } }, { token: {} }])).toEqual([false, true, false]);
});

test("how a prompt is continued survives the address bar", () => {
  for (const how of [
    DEFAULT_SAMPLING,
    { tokens: 5, temperature: 0.8, seed: 7, pastEnd: true },
    { tokens: 5, temperature: 1, seed: null, pastEnd: false },
  ]) {
    expect(decodeSampling(`#prompt=x${encodeSampling(how)}`)).toEqual(how);
  }
  expect(encodeSampling(DEFAULT_SAMPLING)).toBe("");
  for (const wrong of ["many,1", "0,1", "5", "5,1,x"])
    expect(() => decodeSampling(`#prompt=x&continue=${wrong}`)).toThrow(/link continues/);
});

test("a stream is copied as a command and a program that read it to the end", () => {
  expect(curl("http://box/x", {}, false, true)).toContain("curl -sSN");
  expect(curl("http://box/x", {}, false, true)).toContain("accept: text/event-stream");
  expect(curl("http://box/x", {}, false)).not.toContain("event-stream");
  const program = python("http://box/x", { text: `it's "é"\n` }, true, true);
  expect(program).toContain("for line in answer");
  expect(program).toContain('os.environ["TDB_TOKEN"]');
});
