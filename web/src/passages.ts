/**
 * Texts with a component's values on them, as heatmaps need them: one value per token, and of a head one
 * per pair of tokens. An example of a dataset and a text that the user typed are the same here.
 */
import type { ComponentRecordJson, ExampleJson } from "./gen/tdb/dataset/v1/record_pb";
import { num } from "./numbers";

/** A value that was not recorded is undefined. */
export type Value = number | undefined;

export interface Passage {
  /** Text of each token. */
  texts: string[];
  /** Vocabulary index of each token; empty where only the text is known. */
  ids: number[];
  /** Of a neuron or latent, one per token; of a head empty. */
  values: Value[];
  /** Position of the first token, where only a part of the text is shown. */
  start?: number;
  /** Of a head, for each query the values of keys 0 .. query; else null. */
  pairs: Value[][] | null;
  documentId: string;
  documentOffset: number | undefined;
}

/** How a head's pairs become one value per token: summed over what a token reads, or over what reads it. */
export type Side = "reads" | "is read";

export function passage(example: ExampleJson): Passage {
  const {
    tokenTexts = [],
    tokenIds = [],
    activations = [],
    pairActivations = [],
    pairWidth,
    documentId = "",
    documentOffset,
  } = example;
  const texts = tokenTexts.length > 0 ? tokenTexts : tokenIds.map((id) => `<${id}>`);
  return {
    texts,
    ids: tokenIds,
    values: activations.map(num),
    pairs: pairActivations.length > 0 ? triangle(pairActivations, texts.length, pairWidth) : null,
    documentId,
    documentOffset,
  };
}

/** The recorded pairs by query and key: of query q the keys max(0, q - width + 1) .. q. */
export function triangle(
  flat: readonly (number | string)[],
  tokens: number,
  width = tokens,
): Value[][] {
  let at = 0;
  return Array.from({ length: tokens }, (_, query) => {
    const first = Math.max(0, query - width + 1);
    return Array.from({ length: query + 1 }, (_, key) =>
      key < first ? undefined : num(flat[at++]),
    );
  });
}

/** One value per token; of a head the sum over the token's pairs on that side. */
export function byToken({ texts, values, pairs }: Passage, side: Side): Value[] {
  if (!pairs) return values;
  const sums: number[] = texts.map(() => 0);
  pairs.forEach((row, query) =>
    row.forEach((x, key) => (sums[side === "reads" ? query : key]! += x ?? 0)),
  );
  return sums;
}

/** The pairs of one token: what a query reads of each key, or how much each query reads of a key. */
export function pairsOf({ texts, pairs }: Passage, token: number, side: Side): Value[] {
  return texts.map((_, other) =>
    side === "reads" ? pairs?.[token]?.[other] : pairs?.[other]?.[token],
  );
}

export function largest(values: Iterable<Value>): number {
  let most = 0;
  for (const x of values) if (x !== undefined && x > most) most = x;
  return most;
}

/** What values are divided by for display; 0 where nothing is positive. */
export interface Scales {
  /** Of values per token: the largest in the record in the same form. */
  token: Record<Side, number>;
  /** Of a head's pairs; of the others the same as per token. */
  pair: number;
}

export function scales(passages: readonly Passage[]): Scales {
  const over = (side: Side) => largest(passages.map((each) => largest(byToken(each, side))));
  const token = { reads: over("reads"), "is read": over("is read") };
  const pair = passages.some(({ pairs }) => pairs)
    ? largest(passages.flatMap(({ pairs }) => pairs?.map(largest) ?? []))
    : token.reads;
  return { token, pair };
}

/** Within [0, 1]: how strong a value is beside the largest; what is not positive has no colour. */
export function heat(x: Value, scale: number): number {
  return x === undefined || scale <= 0 ? 0 : Math.min(1, Math.max(0, x / scale));
}

/** A set of examples, with what is known of the interval they come from. */
export interface Listed {
  passage: Passage;
  /** Said above the example; the same for those of one interval. */
  interval?: { lower: number | undefined; upper: number | undefined; fraction: number | undefined };
}

export const KINDS = ["top", "quantiles", "random"] as const;
export type ExampleKind = (typeof KINDS)[number];

export function examples(record: ComponentRecordJson): Record<ExampleKind, Listed[]> {
  const plainly = (each: ExampleJson): Listed => ({ passage: passage(each) });
  return {
    top: (record.top ?? []).map(plainly),
    random: (record.random ?? []).map(plainly),
    quantiles: (record.quantiles ?? []).flatMap(({ lower, upper, fraction, examples = [] }) => {
      const interval = { lower: num(lower), upper: num(upper), fraction: num(fraction) };
      return examples.map((each): Listed => ({ passage: passage(each), interval }));
    }),
  };
}

/** Where the passage is strongest: a token, of a head the query of its strongest pair. */
export function peak({ values, pairs }: Passage): number {
  const strength = pairs ? pairs.map((row) => largest(row)) : values;
  let at = 0;
  strength.forEach((x, i) => {
    if ((x ?? -Infinity) > (strength[at] ?? -Infinity)) at = i;
  });
  return at;
}

const BEFORE = 14;
const AFTER = 24;

/** The part of a passage around its peak that fits a line; not for pairs. */
export function around(whole: Passage): Passage {
  const from = Math.max(0, peak(whole) - BEFORE);
  const to = from + BEFORE + AFTER;
  return {
    ...whole,
    texts: whole.texts.slice(from, to),
    ids: whole.ids.slice(from, to),
    values: whole.values.slice(from, to),
    start: from,
  };
}
