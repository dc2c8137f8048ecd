// Which dataset is about a component of the loaded model, and why another is not.
import { expect, test } from "vitest";
import { chosen, groupOf, holds, otherDictionary, otherModel } from "../src/datasets";

const loaded = {
  model: { id: "gpt2", weightsHash: "aa" },
  dictionaries: [{ id: "sae-3", weightsHash: "d1" }],
};
const group = { name: "neuron.3", first: 0, last: 9 };
const of = (id: string, weightsHash = "", groups = [group]) => ({
  name: `${id}-${weightsHash}`,
  header: { model: { id, weightsHash } },
  groups,
});

test("equal weights are the same model, whatever it is called", () => {
  expect(otherModel(of("gpt2-small", "aa"), loaded)).toBeUndefined();
  expect(otherModel(of("gpt2", "bb"), loaded)).toBe("other weights of gpt2");
  expect(otherModel(of("pythia", "bb"), loaded)).toBe("the model pythia");
});

test("without a hash the name decides", () => {
  expect(otherModel(of("gpt2"), loaded)).toBeUndefined();
  expect(otherModel(of("gpt2-xl"), loaded)).toBe("the model gpt2-xl");
  expect(otherModel(of(""), loaded)).toBe("a model that it does not name");
});

test("the latents of another dictionary of the same name are others", () => {
  const dictionaries = [{ id: "sae-3", weightsHash: "d2" }];
  const dataset = { header: { model: { id: "gpt2", dictionaries } } };
  expect(otherDictionary(dataset, "latent.sae-3.5", loaded)).toBe("other weights of sae-3");
  expect(otherDictionary(dataset, "neuron.3.5", loaded)).toBeUndefined();
});

test("the first that is about the model and holds the component is read, or the one named", () => {
  const all = [of("pythia", "bb"), of("gpt2", "aa", []), of("gpt2", "aa"), of("gpt2")];
  expect(chosen(all, "neuron.3.9", loaded, null)).toBe(all[2]);
  expect(chosen(all, "neuron.3.10", loaded, null)).toBeNull();
  expect(chosen(all, "neuron.3.9", loaded, "pythia-bb")).toBe(all[0]);
  expect(chosen(all, "neuron.3.9", loaded, "gone")).toBeNull();
});

test("a group's name is the address without its last number", () => {
  expect(groupOf("latent.a-b.12")).toEqual({ group: "latent.a-b", index: 12 });
  expect(holds(of("gpt2"), "neuron.3.9")).toBe(true);
  expect(holds(of("gpt2"), "neuron.4.9")).toBe(false);
});
