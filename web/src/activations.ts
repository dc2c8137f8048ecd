/**
 * A component's values on a text that was typed: the model runs it, and out of the tensor of its layer the
 * page keeps what belongs to the component.
 */
import { groupOf } from "./datasets";
import { dictionaryOf } from "./features";
import type { StreamActivationsRequestJson } from "./gen/tdb/inference/v1/run_pb";
import type { DataTypeJson } from "./gen/tdb/type/v1/tensor_pb";
import { streamActivations } from "./inference";
import type { Passage, Value } from "./passages";
import { tokens } from "./tokenise";

/** The point whose tensor holds the component, and the component's place in it. */
export interface Whereabouts {
  point: string;
  index: number;
  /** Whether the values are pairs: the tensor is [head, query, key], not [token, index]. */
  pairs: boolean;
}

/** Undefined for a component that has no value at a token. */
export function whereabouts(component: string): Whereabouts | undefined {
  const { group, index } = groupOf(component);
  const [kind, name = ""] = group.split(".");
  if (kind === "neuron") return { point: `mlp_act.${name}`, index, pairs: false };
  if (kind === "head") return { point: `attn_probs.${name}`, index, pairs: true };
  if (kind === "latent" && dictionaryOf(component))
    return { point: `latents.${name}`, index, pairs: false };
  return undefined;
}

const SIZES: Partial<Record<DataTypeJson, number>> = {
  DATA_TYPE_FLOAT32: 4,
  DATA_TYPE_FLOAT64: 8,
  DATA_TYPE_FLOAT16: 2,
  DATA_TYPE_BFLOAT16: 2,
};

/** The number at `at`, little-endian. */
export function element(view: DataView, at: number, type: DataTypeJson): number {
  switch (type) {
    case "DATA_TYPE_FLOAT64":
      return view.getFloat64(at, true);
    case "DATA_TYPE_FLOAT16":
      return half(view.getUint16(at, true));
    case "DATA_TYPE_BFLOAT16": {
      const wide = new DataView(new ArrayBuffer(4));
      wide.setUint16(2, view.getUint16(at, true), true);
      return wide.getFloat32(0, true);
    }
    default:
      return view.getFloat32(at, true);
  }
}

function half(bits: number): number {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 0x1f;
  const fraction = bits & 0x3ff;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}

/** Keeps the wanted elements of a tensor that comes in pieces, wherever the pieces end. */
export class Picker {
  private readonly size: number;
  private readonly wanted: (flat: number) => number | null;
  private rest = new Uint8Array(0);
  private flat = 0;
  readonly values: Value[];

  constructor(
    { index, pairs }: Whereabouts,
    shape: readonly number[],
    private readonly type: DataTypeJson,
  ) {
    const size = SIZES[type];
    if (size === undefined) throw new Error(`The activations came as ${type}, which is no float.`);
    this.size = size;
    if (pairs) {
      const [, queries = 0, keys = 0] = shape;
      const start = index * queries * keys;
      this.values = new Array<Value>(queries * keys);
      this.wanted = (flat) =>
        flat >= start && flat < start + queries * keys ? flat - start : null;
    } else {
      const [rows = 0, width = 0] = shape;
      this.values = new Array<Value>(rows);
      this.wanted = (flat) => (flat % width === index ? Math.floor(flat / width) : null);
    }
  }

  add(piece: Uint8Array): void {
    const bytes = this.rest.length > 0 ? joined(this.rest, piece) : piece;
    const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    const whole = Math.floor(bytes.length / this.size);
    for (let i = 0; i < whole; i += 1) {
      const place = this.wanted(this.flat + i);
      if (place !== null) this.values[place] = element(view, i * this.size, this.type);
    }
    this.flat += whole;
    this.rest = bytes.slice(whole * this.size);
  }
}

function joined(one: Uint8Array, other: Uint8Array): Uint8Array<ArrayBuffer> {
  const both = new Uint8Array(one.length + other.length);
  both.set(one);
  both.set(other, one.length);
  return both;
}

function bytesOf(base64: string): Uint8Array {
  return Uint8Array.from(atob(base64), (each) => each.charCodeAt(0));
}

export function activationsRequest(
  model: string,
  component: string,
  text: string,
): StreamActivationsRequestJson {
  return { model, run: { prompt: { text } }, points: [whereabouts(component)?.point ?? ""] };
}

/** The component's values on the text; of a head how it spreads its attention, in [0, 1]. */
export async function valuesOn(
  model: string,
  component: string,
  text: string,
  signal: AbortSignal,
): Promise<Passage> {
  const where = whereabouts(component);
  if (!where) throw new Error(`${component} has no value at a token.`);
  const seen = tokens(model, text, { signal });
  let picker: Picker | null = null;
  for await (const message of streamActivations(activationsRequest(model, component, text), {
    signal,
    timeoutMs: 120_000,
  })) {
    if (message.point) {
      const { shape = [], dataType = "DATA_TYPE_UNSPECIFIED" } = message.point;
      picker = new Picker(where, shape, dataType);
    }
    if (message.chunk) picker?.add(bytesOf(message.chunk));
  }
  const found = await seen;
  const texts = found.map(({ text: own = "" }) => own);
  const values = picker?.values ?? [];
  const square = () =>
    texts.map((_, query) => values.slice(query * texts.length, query * texts.length + query + 1));
  return {
    texts,
    ids: found.map(({ id = 0 }) => id),
    values: where.pairs ? [] : values,
    pairs: where.pairs ? square() : null,
    documentId: "",
    documentOffset: undefined,
  };
}
