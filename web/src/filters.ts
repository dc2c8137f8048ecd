/**
 * Filters of the node table: one short text per column, as it stands in the field under the heading.
 *
 * A text that cannot be read filters nothing and is said; a column that is not shown (there is no before
 * without a compared run) filters nothing either. The same texts stand in the address, so that a link
 * shows the same rows.
 */
import { site } from "./address";
import { columns, QUANTITIES, value, type Column, type TextOf } from "./columns";
import type { NodeRowJson } from "./gen/tdb/inference/v1/attribute_pb";

/** Text of each filter by the id of its column; `node`, `at` and `says` are the first. */
export type Filters = Readonly<Record<string, string>>;

type Keeps = (row: NodeRowJson) => boolean;

/** A span of token positions, both ends included. */
type Span = [first: number, last: number];

interface NumberTest {
  /** As a reader writes it: `|x| ≥ 0.5`. */
  words: string;
  keeps: (x: number) => boolean;
}

export interface Filter {
  id: string;
  /** The column's name and the condition, for its chip. */
  words: string;
  /** Absent where the text cannot be read; `problem` says why. */
  keeps?: Keeps;
  problem?: string;
}

const ORDINARY = String.raw`\d+\.?\d*(?:e[+-]?\d+)?|\.\d+(?:e[+-]?\d+)?`;
const NUMBER = new RegExp(`^(>=|<=|>|<)?([+-])?(${ORDINARY})?$`, "i");

/** `0.5` is a size, `+0.5` and `-0.5` a size on one side, `+` and `-` a side, `>= 0.5` a comparison. */
export function numberTest(text: string): NumberTest | null {
  const plain = text
    .replace(/\s|\|x\|/gi, "")
    .replaceAll("−", "-")
    .replaceAll("≥", ">=")
    .replaceAll("≤", "<=");
  const [match, relation, side, digits] = NUMBER.exec(plain) ?? [];
  if (!match || plain === "") return null;
  const size = Number(digits);
  if (digits !== undefined && !Number.isFinite(size)) return null;
  if (relation) {
    if (digits === undefined) return null;
    const end = side === "-" ? -size : size;
    const tests: Record<string, NumberTest> = {
      ">=": { words: `≥ ${end}`, keeps: (x) => x >= end },
      "<=": { words: `≤ ${end}`, keeps: (x) => x <= end },
      ">": { words: `> ${end}`, keeps: (x) => x > end },
      "<": { words: `< ${end}`, keeps: (x) => x < end },
    };
    const test = tests[relation]!;
    return { ...test, words: test.words.replace("-", "−") };
  }
  if (digits === undefined) {
    return side === "-"
      ? { words: "< 0", keeps: (x) => x < 0 }
      : { words: "> 0", keeps: (x) => x > 0 };
  }
  if (side === "+") return { words: `≥ ${size}`, keeps: (x) => x >= size };
  if (side === "-") return { words: `≤ −${size}`, keeps: (x) => x <= -size };
  return { words: `|x| ≥ ${size}`, keeps: (x) => Math.abs(x) >= size };
}

/** The positions of `13`, `1, 3` and `5..8`; null where the text is something else. */
export function spans(text: string): Span[] | null {
  const parts = text.split(/[\s,]+/).filter((part) => part !== "");
  const found = parts.map((part): Span | null => {
    const [, first, last] = /^(\d{1,9})(?:\.\.(\d{1,9}))?$/.exec(part) ?? [];
    return first === undefined ? null : [Number(first), Number(last ?? first)];
  });
  return found.length > 0 && found.every((span) => span !== null && span[0] <= span[1])
    ? (found as Span[])
    : null;
}

export function within(spans: readonly Span[], position: number | undefined): boolean {
  return (
    position !== undefined && spans.some(([first, last]) => first <= position && position <= last)
  );
}

function nodeTest(text: string): Keeps {
  const parts = text
    .toLowerCase()
    .split(/[\s,]+/)
    .filter((part) => part !== "");
  return ({ node = "" }) => parts.some((part) => node.includes(part));
}

/** Rows whose explanation has all of the words; `none` for those without one. */
function saysTest(text: string, textOf: TextOf): Keeps {
  const words = text.toLowerCase().trim().split(/\s+/);
  if (words.length === 1 && words[0] === "none") return (row) => textOf(row) === undefined;
  return (row) => {
    const said = textOf(row)?.toLowerCase();
    return said !== undefined && words.every((word) => said.includes(word));
  };
}

/** What the column's filter is called. */
export function columnName(id: string, shown: readonly Column[]): string {
  if (id === "says") return "what it does";
  const col = shown.find((each) => each.id === id);
  return col ? nameOf(col) : id;
}

function nameOf({ quantity, label }: Column): string {
  return `${QUANTITIES[quantity].name}${label ? ` ${label}` : ""}`;
}

const BOTH: Column[] = columns(true);

function read(id: string, text: string, shown: readonly Column[], textOf: TextOf): Filter | null {
  const filter = (words: string, keeps: Keeps): Filter => ({ id, words: `${id} ${words}`, keeps });
  if (id === "node") return filter(text.trim(), nodeTest(text));
  if (id === "at") {
    const where = spans(text);
    if (!where) {
      const problem = `“${text}” names no tokens: write positions such as 13, or 1, 3, or 5..8.`;
      return { id, words: `at ${text}`, problem };
    }
    return filter(text.trim(), ({ node = "" }) => {
      const { position, key } = site(node);
      return within(where, position) || within(where, key);
    });
  }
  if (id === "says") return filter(text.trim(), saysTest(text, textOf));
  const col = shown.find((each) => each.id === id);
  if (!col) return null;
  const name = nameOf(col);
  const test = numberTest(text);
  if (!test) {
    const problem = `“${text}” is no condition on ${name}: write 0.5 for |x| ≥ 0.5, + or - for a sign, or > 0.5.`;
    return { id, words: `${name} ${text}`, problem };
  }
  return {
    id,
    words: `${name} ${test.words}`,
    keeps: (row) => {
      const x = value(row, col);
      return x !== undefined && test.keeps(x);
    },
  };
}

/** The filters of the columns that are shown, in the columns' order. */
export function readFilters(
  filters: Filters,
  shown: readonly Column[],
  textOf: TextOf = () => undefined,
): Filter[] {
  return ["node", "at", "says", ...shown.map(({ id }) => id)].flatMap((id) => {
    const text = filters[id] ?? "";
    const filter = text.trim() === "" ? null : read(id, text, shown, textOf);
    return filter ? [filter] : [];
  });
}

export function filtered(rows: readonly NodeRowJson[], filters: readonly Filter[]): NodeRowJson[] {
  const tests = filters.flatMap(({ keeps }) => (keeps ? [keeps] : []));
  return rows.filter((row) => tests.every((keeps) => keeps(row)));
}

/** The filters with one changed; an empty text takes it away. */
export function withFilter(filters: Filters, id: string, text: string): Filters {
  const { [id]: _, ...rest } = filters;
  return text === "" ? rest : { ...rest, [id]: text };
}

/** The filters as a part of an address: `&filter=node:head&filter=totalEffect.after:0.5`. */
export function encodeFilters(filters: Filters): string {
  const query = new URLSearchParams();
  for (const { id, keeps } of readFilters(filters, BOTH))
    if (keeps) query.append("filter", `${id}:${filters[id]!.trim()}`);
  const text = query.toString();
  return text && `&${text}`;
}

/** The filters in an address; throws a sentence if one is malformed. */
export function decodeFilters(hash: string): Filters {
  const found: Record<string, string> = {};
  for (const part of new URLSearchParams(hash.replace(/^#/, "")).getAll("filter")) {
    const [, id = "", text = ""] = /^([\w.]+):(.+)$/.exec(part) ?? [];
    const filter = text.trim() === "" ? null : read(id, text, BOTH, () => undefined);
    if (!filter) throw new Error(`This link filters by “${part}”, which names no column.`);
    if (filter.problem)
      throw new Error(`This link holds a filter that cannot be read: ${filter.problem}`);
    found[id] = text;
  }
  return found;
}
