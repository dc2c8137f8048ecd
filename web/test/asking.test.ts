// One question at a time: a late answer never covers a newer one, and undo needs no server.
import { beforeEach, expect, test, vi } from "vitest";
import { ConnectError } from "../src/connect";
import { USUAL, type Question } from "../src/url";

const rpc = vi.hoisted(() => ({
  attribute: vi.fn(),
  run: vi.fn(),
  tokenize: vi.fn(),
  getModel: vi.fn(),
  listModels: vi.fn(),
}));
vi.mock("../src/inference", () => rpc);
vi.stubGlobal("location", { hash: "" });
vi.stubGlobal("history", { replaceState: vi.fn() });

const { ask, askDraft, start, undo } = await import("../src/asking");
const { isAblated, removeIntervention, scaleBy, setValue, toggleAblation } =
  await import("../src/editing");
const { setFilter } = await import("../src/view");
const state = await import("../src/state");

const question: Question = {
  model: "m",
  prompt: "When Mary",
  targets: [" Mary"],
  distractors: [],
  ...USUAL,
};

const support = (...features: string[]) =>
  features.map((feature) => ({ feature, supported: true }));
const facts = {
  model: { id: "m" },
  supports: support("intervention.zero", "intervention.set", "intervention.scale"),
};

interface Call {
  request: { run: { prompt: { text: string }; interventions?: unknown[] } };
  signal: AbortSignal;
  resolve: (value: unknown) => void;
  reject: (error: unknown) => void;
}
let calls: Call[];

beforeEach(() => {
  calls = [];
  rpc.attribute.mockImplementation(
    (request: Call["request"], { signal }: { signal: AbortSignal }) =>
      new Promise((resolve, reject) => calls.push({ request, signal, resolve, reject })),
  );
  rpc.run.mockImplementation(({ tokens }: { tokens: { id: number }[] }) =>
    Promise.resolve({
      nextTokens: [{ named: tokens.map((token) => ({ token, logit: 1, probability: 0.5 })) }],
    }),
  );
  rpc.tokenize.mockImplementation(({ prompt }: { prompt: { text: string } }) =>
    Promise.resolve({
      tokens: prompt.text
        .trim()
        .split(" ")
        .map((text) => ({ id: 1, text })),
    }),
  );
  rpc.listModels.mockResolvedValue({ models: ["m"] });
  rpc.getModel.mockResolvedValue(facts);
  state.model.value = facts;
  state.filters.value = {};
  state.asked.value = state.answer.value = state.modelProblem.value = null;
  state.past.value = state.found.value = [];
  state.editDraft({
    prompt: "",
    compare: null,
    targets: [],
    pending: { targets: "", distractors: "" },
  });
  location.hash = "";
});

const settled = () => vi.waitFor(() => expect(state.loading.value).toBe(false));

test("a late answer never covers a newer one", async () => {
  void ask({ ...question, prompt: "old" });
  void ask({ ...question, prompt: "new" });
  expect(calls.map(({ signal }) => signal.aborted)).toEqual([true, false]);
  calls[1]!.resolve({ objectiveValue: 2 });
  await settled();
  calls[0]!.resolve({ objectiveValue: 1 });
  await new Promise((done) => setTimeout(done));
  expect(state.answer.value?.response.objectiveValue).toBe(2);
  expect(state.past.value).toEqual([]);
});

test("the old answer stays, out of date, while a new one is on its way or refused", async () => {
  void ask(question);
  calls[0]!.resolve({ objectiveValue: 1 });
  await settled();
  expect(state.stale.value).toBe(false);
  void ask({ ...question, prompt: "other" });
  expect(state.stale.value).toBe(true);
  calls[1]!.reject(new ConnectError("unavailable", "draining"));
  await settled();
  expect(state.answer.value?.response.objectiveValue).toBe(1);
  expect(state.found.value).toEqual([{ place: "page", text: "Draining.", retry: true }]);
});

test("ablate, ablate another, remove one, undo", async () => {
  void ask(question);
  calls[0]!.resolve({ objectiveValue: 3 });
  await settled();
  toggleAblation("head.0.1~2-1");
  calls[1]!.resolve({ objectiveValue: 2 });
  await settled();
  toggleAblation("neuron.0.1~2");
  expect(calls[2]!.request.run.interventions).toHaveLength(2);
  calls[2]!.resolve({ objectiveValue: 1 });
  await settled();
  removeIntervention(0);
  expect(calls[3]!.request.run.interventions).toEqual([{ target: "neuron.0.1~2", zero: {} }]);
  calls[3]!.resolve({ objectiveValue: 2.5 });
  await settled();
  expect([isAblated("head.0.1~2-1"), isAblated("neuron.0.1~2")]).toEqual([false, true]);

  undo();
  expect(state.answer.value?.response.objectiveValue).toBe(1);
  expect(isAblated("head.0.1~2-1")).toBe(true);
  expect(state.stale.value).toBe(false);
  undo();
  undo();
  expect(state.answer.value?.response.objectiveValue).toBe(3);
  expect(state.past.value).toEqual([]);
  expect(calls).toHaveLength(4);
});

test("ablating a row of the shown answer never lands on a prompt that was refused", async () => {
  void ask(question);
  calls[0]!.resolve({});
  await settled();
  void ask({ ...question, prompt: "refused" });
  calls[1]!.reject(new ConnectError("invalid_argument", "no"));
  await settled();
  toggleAblation("head.0.1~2-1");
  expect(calls[2]!.request.run.prompt.text).toBe("When Mary");
});

test("Enter asks nothing while a target is not one token", async () => {
  await start();
  state.editDraft({ prompt: "x", pending: { targets: " Mary Anne", distractors: "" } });
  await askDraft();
  expect(calls).toEqual([]);
  expect(state.draft.value.pending.targets).toBe(" Mary Anne");
});

test("Enter says what is missing", async () => {
  await start();
  await askDraft();
  expect(state.found.value.map(({ place }) => place)).toEqual(["prompt", "target"]);
});

test("a link that cannot be read is said, and nothing else is asked in its place", async () => {
  rpc.getModel.mockResolvedValue({ model: { id: "m" }, examples: [{ prompt: "e", target: " t" }] });
  location.hash = "#prompt=x&edit=nonsense";
  await start();
  expect(calls).toEqual([]);
  expect(state.found.value[0]?.text).toMatch(/link/);
});

test("a service that wants a token locks the page instead of showing an error", async () => {
  rpc.getModel.mockRejectedValue(new ConnectError("unauthenticated", "no token"));
  await start();
  expect(state.locked.value).toBe(true);
  expect(state.modelProblem.value).toBeNull();
});

test("a row has one edit: a new one takes the old one's place, other edits stay", async () => {
  const steered = { target: "neuron.0.1~2", add: { value: 1 } };
  void ask({ ...question, interventions: [steered] });
  const edits = () => calls.at(-1)!.request.run.interventions;
  setValue("neuron.0.1~2", 0);
  scaleBy("head.0.1~2-1", -2);
  toggleAblation("neuron.0.1~2");
  expect(edits()).toEqual([
    steered,
    { target: "neuron.0.1~2", zero: {} },
    { target: "head.0.1~2-1", scale: { factor: -2 } },
  ]);
  setValue("neuron.0.1~2", 0.5);
  expect(edits()?.[1]).toEqual({ target: "neuron.0.1~2", set: { value: 0.5 } });
});

test("what the service cannot ablate is not asked for by a key either", async () => {
  void ask(question);
  toggleAblation("embed~1");
  expect(calls).toHaveLength(1);
  state.model.value = { ...facts, supports: [...facts.supports, ...support("target.residual")] };
  toggleAblation("embed~1");
  expect(calls[1]!.request.run.interventions).toEqual([{ target: "embed~1", zero: {} }]);
});

test("read-outs are asked for only where the service makes them", async () => {
  void ask(question);
  expect(calls[0]!.request).not.toHaveProperty("readOuts");
  state.model.value = { ...facts, supports: support("attribute.read_outs") };
  void ask(question);
  expect(calls[1]!.request).toHaveProperty("readOuts", { tokens: 6 });
});

test("filters stand in the address; another prompt keeps those that are not about its tokens", async () => {
  vi.mocked(history.replaceState).mockClear();
  location.hash = "#prompt=When&target=+Mary&filter=node:head&filter=at:3";
  void start();
  await vi.waitFor(() => expect(calls).toHaveLength(1));
  expect(state.filters.value).toEqual({ node: "head", at: "3" });
  setFilter("totalEffect.after", "0.5");
  const written = () =>
    decodeURIComponent(String(vi.mocked(history.replaceState).mock.lastCall?.[2]));
  await vi.waitFor(() => expect(written()).toMatch(/filter=totalEffect.after:0.5$/));
  state.editDraft({ prompt: "Then", targets: [" Mary"] });
  void askDraft();
  await vi.waitFor(() => expect(calls).toHaveLength(2));
  expect(state.filters.value).toEqual({ node: "head", "totalEffect.after": "0.5" });
});
