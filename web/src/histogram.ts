/** How values are distributed, as bars: the heights are logarithmic, for most values are small. */
import type { HistogramJson } from "./gen/tdb/dataset/v1/record_pb";
import { num } from "./numbers";

export interface Bar {
  /** Within [0, 1], from the left and from the bottom. */
  left: number;
  width: number;
  height: number;
  lower: number;
  upper: number;
  count: number;
  share: number;
}

/** One bar per bin; none where the histogram is not a histogram. */
export function bars({ edges = [], counts = [] }: HistogramJson): Bar[] {
  const ends = edges.map(num);
  if (counts.length === 0 || ends.length !== counts.length + 1) return [];
  if (ends.some((x) => x === undefined)) return [];
  const [first, last] = [ends[0]!, ends.at(-1)!];
  const span = last - first;
  const numbers = counts.map(Number);
  const total = numbers.reduce((sum, each) => sum + each, 0);
  const highest = Math.log1p(Math.max(...numbers));
  return numbers.map((count, i) => {
    const [lower, upper] = [ends[i]!, ends[i + 1]!];
    return {
      left: span > 0 ? (lower - first) / span : i / numbers.length,
      width: span > 0 ? (upper - lower) / span : 1 / numbers.length,
      height: highest > 0 ? Math.log1p(count) / highest : 0,
      lower,
      upper,
      count,
      share: total > 0 ? count / total : 0,
    };
  });
}
