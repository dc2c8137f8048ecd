/** What is known of a component's values over a whole corpus: moments, and a histogram. */
import { useState } from "preact/hooks";
import type { HistogramJson, StatisticsJson } from "./gen/tdb/dataset/v1/record_pb";
import { bars } from "./histogram";
import { full, num, percent, plain } from "./numbers";

interface Line {
  name: string;
  meaning: string;
  value: number | undefined;
  write?: (x: number) => string;
}

/** The lines that the source states. */
export function lines(statistics: StatisticsJson, pairs: boolean): Line[] {
  const { count, variance } = statistics;
  const what = pairs ? "pairs of tokens" : "tokens";
  const spread = num(variance);
  const all: Line[] = [
    { name: "max", meaning: "Largest activation", value: num(statistics.max) },
    { name: "min", meaning: "Smallest activation", value: num(statistics.min) },
    { name: "mean", meaning: `Mean over all ${what}`, value: num(statistics.mean) },
    {
      name: "deviation",
      meaning: "Standard deviation: the root of the population variance",
      value: spread === undefined ? undefined : Math.sqrt(Math.max(0, spread)),
    },
    {
      name: "skewness",
      meaning: "Third standardised moment; 0 for a symmetric distribution",
      value: num(statistics.skewness),
    },
    {
      name: "kurtosis",
      meaning: "Fourth standardised moment; 3 for a normal distribution",
      value: num(statistics.kurtosis),
    },
    {
      name: "active",
      meaning: `Share of ${what} with an activation above 0`,
      value: num(statistics.fractionActive),
      write: percent,
    },
    {
      name: pairs ? "pairs" : "tokens",
      meaning: `How many ${what} were counted`,
      value: count === undefined ? undefined : Number(count),
      write: (x) => x.toLocaleString("en").replaceAll(",", "\u202f"),
    },
  ];
  return all.filter(({ value }) => value !== undefined);
}

export function Statistics({ statistics, pairs }: { statistics: StatisticsJson; pairs: boolean }) {
  const known = lines(statistics, pairs);
  return (
    <section class="statistics" aria-label="Statistics">
      <h2>statistics</h2>
      {known.length === 0 && (
        <p class="quiet-text">The source of these records states no statistics.</p>
      )}
      <dl>
        {known.map(({ name, meaning, value = 0, write = plain }) => (
          <div key={name}>
            <dt title={meaning}>{name}</dt>
            <dd title={full(value)}>{write(value)}</dd>
          </div>
        ))}
      </dl>
      {statistics.histogram && <Histogram histogram={statistics.histogram} pairs={pairs} />}
    </section>
  );
}

const [WIDTH, HEIGHT] = [300, 90];

function Histogram({ histogram, pairs }: { histogram: HistogramJson; pairs: boolean }) {
  const [over, setOver] = useState<number | null>(null);
  const all = bars(histogram);
  if (all.length === 0) return null;
  const [first, last] = [all[0]!, all.at(-1)!];
  const bar = over === null ? undefined : all[over];
  const what = pairs ? "pairs" : "tokens";
  const total = all.reduce((sum, { count }) => sum + count, 0);
  const onKeyDown = (event: KeyboardEvent) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    setOver((now) =>
      Math.max(0, Math.min(all.length - 1, (now ?? (step > 0 ? -1 : all.length)) + step)),
    );
  };
  return (
    <figure class="histogram">
      <svg
        viewBox={`0 0 ${WIDTH} ${HEIGHT}`}
        preserveAspectRatio="none"
        role="img"
        tabIndex={0}
        aria-label={`Histogram of ${total} ${what} in ${all.length} bins from ${plain(first.lower)} to ${plain(last.upper)}; arrow keys read the bins`}
        onMouseLeave={() => setOver(null)}
        onBlur={() => setOver(null)}
        onKeyDown={onKeyDown}
      >
        {all.map(({ left, width, height }, i) => (
          <g key={i} onMouseOver={() => setOver(i)} data-over={i === over ? "" : undefined}>
            <rect class="hit" x={left * WIDTH} y={0} width={width * WIDTH} height={HEIGHT} />
            <rect
              class="bar"
              x={left * WIDTH}
              y={(1 - height) * HEIGHT}
              width={Math.max(0.5, width * WIDTH - 0.5)}
              height={height * HEIGHT}
            />
          </g>
        ))}
      </svg>
      <div class="ends">
        <span title={full(first.lower)}>{plain(first.lower)}</span>
        <span title={full(last.upper)}>{plain(last.upper)}</span>
      </div>
      <figcaption aria-live="polite">
        {bar
          ? `${plain(bar.lower)} to ${plain(bar.upper)}: ${bar.count} ${what}, ${percent(bar.share)}`
          : `${what} by activation${histogram.activeOnly ? ", those above 0 only" : ""}; heights are logarithmic`}
      </figcaption>
    </figure>
  );
}
