/**
 * How numbers are written: three significant digits, a true minus, a sign where the sign is the news.
 * Full precision is one hover away (`full`), so nothing here has to be exact - only never misleading.
 */

/** A proto3 JSON double. Results are never non-finite; anything else counts as absent. */
export function num(value: number | string | undefined): number | undefined {
  return typeof value === "number" && Number.isFinite(value) ? value : undefined;
}

const MINUS = "\u2212";

/** Three significant digits: `11.1`, `0.0312`, `1234`, `4.10e−7`. */
export function plain(x: number): string {
  return withMinus(digits(x));
}

/** The same, always signed; a zero has no sign. */
export function signed(x: number): string {
  const text = digits(x);
  return Number(text) === 0 ? "0" : withMinus(x > 0 ? `+${text}` : text);
}

/** Signed and short, for a narrow cell: two decimals at most; what rounds to nothing is a dot. */
export function brief(x: number): string {
  const size = Math.abs(x);
  if (size < 0.005) return "·";
  const text = x.toFixed(size < 9.995 ? 2 : size < 99.95 ? 1 : 0);
  return withMinus(x > 0 ? `+${text}` : text);
}

/** As many digits as the number has. */
export function full(x: number): string {
  return withMinus(String(x));
}

/** A probability as a percentage. */
export function percent(p: number): string {
  const x = 100 * p;
  if (x === 0) return "0 %";
  if (x < 0.01) return "<0.01 %";
  if (x >= 99.95 && x < 100) return ">99.9 %";
  return `${x < 1 ? x.toFixed(2) : x.toFixed(1)} %`;
}

function digits(x: number): string {
  if (x === 0) return "0";
  const size = Math.abs(x);
  if (size < 1e-3 || size >= 1e6) return x.toExponential(2);
  if (size >= 999.5) return x.toFixed(0);
  return x.toPrecision(3);
}

/** The text with true minus signs. */
export function withMinus(text: string): string {
  return text.replaceAll("-", MINUS);
}

/** `1 token`, `2 tokens`. */
export function count(n: number, noun: string): string {
  return `${n} ${noun}${n === 1 ? "" : "s"}`;
}
