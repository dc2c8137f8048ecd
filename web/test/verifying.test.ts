// The verified column: filled row by row, and gone when it no longer belongs to what is shown.
import { beforeEach, expect, test, vi } from "vitest";
import { ConnectError } from "../src/connect";
import type { VerifyResponseJson } from "../src/gen/tdb/inference/v1/verify_pb";
import { USUAL, type Question } from "../src/url";

const rpc = vi.hoisted(() => ({ verify: vi.fn(), attribute: vi.fn(), run: vi.fn() }));
vi.mock("../src/inference", () => rpc);

const state = await import("../src/state");
const { allRows } = await import("../src/view");
const { cancelVerify, NOTHING_VERIFIED, stillVerified, verifying, verifyRows } =
  await import("../src/verifying");

const question: Question = {
  ...USUAL,
  model: "",
  prompt: "When Mary",
  targets: [" Mary"],
  distractors: [],
};
const rows = [
  { node: "head.0.1~1-0", activation: 1 },
  { node: "neuron.0.1~1", activation: 2 },
  { node: "embed~1" },
];
let asked: { table: object; nodes: string[] }[];
let signal: AbortSignal;

beforeEach(() => {
  asked = [];
  state.found.value = [];
  state.model.value = { supports: [{ feature: "verify", supported: true }] };
  state.asked.value = question;
  state.answer.value = {
    question,
    response: { rows },
    verified: NOTHING_VERIFIED,
    outlooks: null,
    b: null,
  };
});

function answers(...events: (VerifyResponseJson | Error)[]): void {
  rpc.verify.mockImplementation(async function* (request, options) {
    asked.push(request);
    signal = options.signal;
    for (const event of events) {
      if (event instanceof Error) throw event;
      yield event;
    }
  });
}

const effects = () => allRows.value.map(({ verifiedEffect }) => verifiedEffect);

test("effects fill the rows, and the end says how well they agree", async () => {
  answers(
    { progress: { done: 0, total: 2 } },
    { node: { node: "head.0.1~1-0", verifiedEffect: 0.5 } },
    { node: { node: "neuron.0.1~1" } },
    { summary: { nodes: 2, rankCorrelation: 0.9 } },
  );
  await verifyRows(rows);
  expect(effects()).toEqual([0.5, 0, undefined]);
  expect(state.answer.value?.verified.agreement).toEqual({ rank: 0.9, nodes: 2 });
  expect(verifying.value).toBeNull();
});

test("a node that this run has not is not asked for, and nor is anything that ranks or compares", async () => {
  answers({ summary: {} });
  await verifyRows(rows);
  expect(asked[0]?.nodes).toEqual(["head.0.1~1-0", "neuron.0.1~1"]);
  expect(Object.keys(asked[0]?.table ?? {})).toEqual(["run", "objective"]);
});

test("what came before a failure stays, and the failure is said at the table", async () => {
  answers(
    { node: { node: "head.0.1~1-0", verifiedEffect: 0.5 } },
    new ConnectError("unavailable", "draining"),
  );
  await verifyRows(rows);
  expect(effects()[0]).toBe(0.5);
  expect(state.found.value).toEqual([{ place: "verify", text: "Draining.", retry: true }]);
});

test("cancelling ends the call and keeps what came", async () => {
  rpc.verify.mockImplementation(async function* (_, options: { signal: AbortSignal }) {
    signal = options.signal;
    yield { node: { node: "head.0.1~1-0", verifiedEffect: 0.5 } };
    cancelVerify();
    options.signal.throwIfAborted();
  });
  await verifyRows(rows);
  expect(signal.aborted).toBe(true);
  expect([effects()[0], verifying.value, state.found.value]).toEqual([0.5, null, []]);
});

test("effects come along to other rows of the same run, not to another run", () => {
  const verified = { effects: new Map([["a", 1]]), agreement: { rank: 1, nodes: 3 } };
  const before = { question, response: {}, outlooks: null, verified, b: null };
  const kept = (change: Partial<Question>) =>
    stillVerified(before, { ...question, ...change }).effects.size;
  expect(kept({ rows: 200 })).toBe(1);
  expect(kept({ rankBy: "direct" })).toBe(1);
  expect(kept({ prompt: "x" })).toBe(0);
  expect(kept({ interventions: [{ target: "embed~1", zero: {} }] })).toBe(0);
  expect(kept({ trace: [{ node: "neuron.0.1~1" }] })).toBe(0);
  expect(stillVerified(before, question).agreement).toBeNull();
});

test("nothing is verified for a question that is on its way, or where the service cannot", async () => {
  answers({ summary: {} });
  state.asked.value = { ...question };
  await verifyRows(rows);
  state.asked.value = question;
  state.model.value = { supports: [] };
  await verifyRows(rows);
  expect(asked).toEqual([]);
});
