// Out of a layer's tensor, which comes in pieces, the values of one component.
import { expect, test } from "vitest";
import { element, Picker, whereabouts } from "../src/activations";

function floats(...values: number[]): Uint8Array {
  return new Uint8Array(Float32Array.from(values).buffer);
}

test("a neuron is a column, wherever the pieces end", () => {
  const all = floats(0, 1, 2, 10, 11, 12);
  const where = { point: "mlp_act.0", index: 1, pairs: false };
  for (const cut of [0, 1, 6, 13, 24]) {
    const picker = new Picker(where, [2, 3], "DATA_TYPE_FLOAT32");
    picker.add(all.slice(0, cut));
    picker.add(all.slice(cut));
    expect(picker.values).toEqual([1, 11]);
  }
});

test("a head is a plane", () => {
  const picker = new Picker(
    { point: "attn_probs.0", index: 1, pairs: true },
    [2, 2, 2],
    "DATA_TYPE_FLOAT32",
  );
  picker.add(floats(0, 1, 2, 3, 4, 5, 6, 7));
  expect(picker.values).toEqual([4, 5, 6, 7]);
});

test("half precision is read as the number it is", () => {
  const view = new DataView(new ArrayBuffer(2));
  const as = (bits: number, type: "DATA_TYPE_FLOAT16" | "DATA_TYPE_BFLOAT16") => {
    view.setUint16(0, bits, true);
    return element(view, 0, type);
  };
  expect(as(0x3e00, "DATA_TYPE_FLOAT16")).toBe(1.5);
  expect(as(0xc000, "DATA_TYPE_FLOAT16")).toBe(-2);
  expect(as(0x0001, "DATA_TYPE_FLOAT16")).toBe(2 ** -24);
  expect(as(0x3fc0, "DATA_TYPE_BFLOAT16")).toBe(1.5);
});

test("whole numbers are no activations", () => {
  const where = { point: "mlp_act.0", index: 0, pairs: false };
  expect(() => new Picker(where, [1, 1], "DATA_TYPE_INT32")).toThrow("no float");
});

test("a component's point is found by its address; a latent's only where its dictionary is served", () => {
  expect(whereabouts("neuron.3.17")).toEqual({ point: "mlp_act.3", index: 17, pairs: false });
  expect(whereabouts("head.2.1")).toEqual({ point: "attn_probs.2", index: 1, pairs: true });
  expect(whereabouts("latent.gone-0.1")).toBeUndefined();
});
