// A table asks once for its rows, each model's weights for themselves, and never again for what is known.
import { beforeEach, expect, test, vi } from "vitest";
import { ConnectError } from "../src/connect";
import type { ListExplanationsRequestJson } from "../src/gen/tdb/explainer/v1/explanation_pb";

const list = vi.hoisted(() => vi.fn());
const capable = vi.hoisted(() => vi.fn());
vi.mock("../src/explainer", () => ({ listExplanations: list, getCapabilities: capable }));

import * as explanations from "../src/explanations";
import { model } from "../src/state";

const rows = [
  { node: "head.1.2~13-9" },
  { node: "head.1.2~13-3" },
  { node: "embed~3" },
  { node: "latent.d.7~1" },
];
const of = (weightsHash: string) => ({ model: { id: "m", weightsHash } });
const asked = (call: number) => list.mock.calls[call]![0] as ListExplanationsRequestJson;

let hash = 0;
beforeEach(() => {
  vi.useRealTimers();
  list.mockReset();
  list.mockResolvedValue({
    explanations: [{ id: "a", component: "head.1.2", text: "copies a name" }],
  });
  explanations.awayProblem.value = null;
  explanations.absent.value = false;
  hash += 1;
  model.value = of(`h${hash}`);
});

test("each component once, and only what can be explained", () => {
  expect(explanations.componentsOf(rows)).toEqual(["head.1.2", "latent.d.7"]);
});

test("one call for all rows; then nothing is asked again", async () => {
  const components = explanations.componentsOf(rows);
  expect(explanations.bestOf("head.1.2")).toBeUndefined();
  await explanations.lookUp(components);
  expect(list).toHaveBeenCalledTimes(1);
  expect(asked(0)).toEqual({
    model: { id: "m", weightsHash: `h${hash}`, dictionaries: [] },
    components,
    bestOnly: true,
  });
  expect(explanations.bestOf("head.1.2")?.text).toBe("copies a name");
  expect(explanations.bestOf("latent.d.7")).toBeNull();
  await explanations.lookUp([...components, "head.0.0"]);
  expect(asked(1).components).toEqual(["head.0.0"]);
  await explanations.lookUp(components);
  expect(list).toHaveBeenCalledTimes(2);
});

test("what is known of other weights is not shown for these", async () => {
  await explanations.lookUp(["head.1.2"]);
  model.value = of("other");
  expect(explanations.bestOf("head.1.2")).toBeUndefined();
  await explanations.lookUp(["head.1.2"]);
  expect(asked(1).model?.weightsHash).toBe("other");
  model.value = of(`h${hash}`);
  expect(explanations.bestOf("head.1.2")?.id).toBe("a");
});

test("what has aged is asked for again, and stays in sight meanwhile", async () => {
  vi.useFakeTimers();
  await explanations.lookUp(["head.1.2"]);
  vi.advanceTimersByTime(60_000);
  await explanations.lookUp(["head.1.2"]);
  expect(list).toHaveBeenCalledTimes(1);
  vi.advanceTimersByTime(61_000);
  const again = explanations.lookUp(["head.1.2"]);
  expect(explanations.bestOf("head.1.2")?.id).toBe("a");
  await again;
  expect(list).toHaveBeenCalledTimes(2);
});

test("more than ten thousand are asked for in parts", async () => {
  const many = Array.from({ length: 10_001 }, (_, i) => `neuron.0.${i}`);
  await explanations.lookUp(many);
  expect(list.mock.calls.map((_, i) => asked(i).components?.length)).toEqual([10_000, 1]);
});

test("a failure is said, and what was not answered is asked for the next time", async () => {
  list.mockRejectedValueOnce(new ConnectError("unavailable", "it starts"));
  await explanations.lookUp(["head.1.2"]);
  expect(explanations.awayProblem.value?.text).toBe("It starts.");
  expect(explanations.bestOf("head.1.2")).toBeUndefined();
  await explanations.lookUp(["head.1.2"]);
  expect(explanations.bestOf("head.1.2")?.id).toBe("a");
});

test("a deployment without the service is no problem", async () => {
  capable.mockRejectedValueOnce(new ConnectError("unimplemented", "no such service"));
  await explanations.refreshCapabilities();
  expect(explanations.absent.value).toBe(true);
  expect(explanations.awayProblem.value).toBeNull();
  expect(explanations.columnShown.value).toBe(false);
});

test("a component's history brings its best along", async () => {
  list.mockResolvedValueOnce({
    explanations: [
      { id: "b", component: "head.1.2", text: "the best" },
      { id: "a", component: "head.1.2", text: "copies a name" },
    ],
  });
  await explanations.refresh("head.1.2");
  expect(asked(0).bestOnly).toBeUndefined();
  expect(explanations.allOf("head.1.2")?.map(({ id }) => id)).toEqual(["b", "a"]);
  expect(explanations.bestOf("head.1.2")?.id).toBe("b");
  await explanations.lookUp(["head.1.2"]);
  expect(list).toHaveBeenCalledTimes(1);
});
