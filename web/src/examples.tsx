/** Examples of a record as heatmaps: the strongest, by strength, and at random, 20 at a time. */
import { useState } from "preact/hooks";
import { Heatmap, Scale } from "./heatmap";
import { percent, plain } from "./numbers";
import { debugText } from "./opening";
import {
  KINDS,
  largest,
  peak,
  type ExampleKind,
  type Listed,
  type Passage,
  type Scales,
  type Side,
} from "./passages";
import { visible } from "./tokens";

const AT_A_TIME = 20;

const NAMES: Record<ExampleKind, { name: string; meaning: string }> = {
  top: { name: "top", meaning: "The sequences with the largest activations" },
  quantiles: { name: "by strength", meaning: "Sequences sampled from each interval of strength" },
  random: { name: "random", meaning: "Sequences drawn at random from the whole corpus" },
};

/** What a kind of component's values are. */
export const UNITS = { one: "activation", pair: "write magnitude" } as const;

interface ExamplesProps {
  all: Record<ExampleKind, Listed[]>;
  scales: Scales;
  side: Side;
  /** Whether token ids are the loaded model's. */
  exact: boolean;
}

export function Examples({ all, scales, side, exact }: ExamplesProps) {
  const [kind, setKind] = useState<ExampleKind>(
    () => KINDS.find((each) => all[each].length > 0) ?? "top",
  );
  const [from, setFrom] = useState(0);
  const listed = all[kind];
  const shown = listed.slice(from, from + AT_A_TIME);
  const most = Math.min(from + AT_A_TIME, listed.length);
  return (
    <section class="examples-list" aria-label="Examples">
      <div class="bar">
        <span class="segments" role="group" aria-label="Which examples">
          {KINDS.map((each) => (
            <button
              key={each}
              type="button"
              class="small"
              aria-pressed={each === kind}
              disabled={all[each].length === 0}
              title={all[each].length === 0 ? "The dataset has none" : NAMES[each].meaning}
              onClick={() => {
                setKind(each);
                setFrom(0);
              }}
            >
              {NAMES[each].name} {all[each].length}
            </button>
          ))}
        </span>
        <Pages from={from} most={most} all={listed.length} go={setFrom} />
      </div>
      <ol>
        {shown.map((each, i) => (
          <Example
            key={`${kind} ${from + i}`}
            listed={each}
            heading={interval(each, shown[i - 1])}
            number={from + i + 1}
            scales={scales}
            side={side}
            exact={exact}
          />
        ))}
      </ol>
      {listed.length === 0 && <p class="quiet-text">The component was never active here.</p>}
    </section>
  );
}

interface PagesProps {
  from: number;
  most: number;
  all: number;
  go: (from: number) => void;
}

function Pages({ from, most, all, go }: PagesProps) {
  if (all <= AT_A_TIME) return null;
  return (
    <span class="pages">
      <button
        type="button"
        class="small"
        disabled={from === 0}
        aria-label="Previous examples"
        onClick={() => go(Math.max(0, from - AT_A_TIME))}
      >
        ‹
      </button>
      <span>
        {from + 1}–{most} of {all}
      </span>
      <button
        type="button"
        class="small"
        disabled={most >= all}
        aria-label="Next examples"
        onClick={() => go(from + AT_A_TIME)}
      >
        ›
      </button>
    </span>
  );
}

/** The heading of an interval above its first example. */
function interval({ interval: own }: Listed, before: Listed | undefined): string | null {
  const last = before?.interval;
  const same = last && own && last.lower === own.lower && last.upper === own.upper;
  if (!own || same) return null;
  const end = (x: number | undefined) => (x === undefined ? "?" : plain(x));
  const share = own.fraction === undefined ? "" : `, ${percent(own.fraction)} of the corpus`;
  return `${end(own.lower)} to ${end(own.upper)}${share}`;
}

interface ExampleProps {
  listed: Listed;
  heading: string | null;
  number: number;
  scales: Scales;
  side: Side;
  exact: boolean;
}

function Example({ listed: { passage }, heading, number, scales, side, exact }: ExampleProps) {
  const unit = passage.pairs ? UNITS.pair : UNITS.one;
  return (
    <li>
      {heading && <h3>{heading}</h3>}
      <div class="example">
        <Heatmap
          passage={passage}
          scales={scales}
          side={side}
          unit={unit}
          label={describe(passage, `Example ${number}`, unit)}
        />
        <div class="about">
          <span title={`Largest ${unit} of the text`}>{plain(strongest(passage))}</span>
          {passage.documentId !== "" && (
            <span class="quiet-text document" title={source(passage)}>
              {passage.documentId}
            </span>
          )}
          <button
            type="button"
            class="link"
            title="Put the text into the prompt field; Enter runs it"
            aria-label={`Debug the text of example ${number}`}
            onClick={() => void debugText(passage, exact)}
          >
            debug this text
          </button>
        </div>
      </div>
    </li>
  );
}

export function strongest({ values, pairs }: Passage): number {
  return pairs ? largest(pairs.map(largest)) : Math.max(...values.map((x) => x ?? -Infinity));
}

/** `Example 3: activation at most 4.1, at token 5, ␣Mary`. */
export function describe(passage: Passage, name: string, unit: string): string {
  if (passage.texts.length === 0) return `${name}: no tokens`;
  const at = peak(passage);
  return `${name}: ${unit} at most ${plain(strongest(passage))}, at token ${at}, ${visible(passage.texts[at] ?? "")}`;
}

function source({ documentId, documentOffset }: Passage): string {
  const from = documentOffset === undefined ? "" : `, from its token ${documentOffset} on`;
  return `Document ${documentId}${from}`;
}

const SIDES: Record<Side, { name: string; meaning: string }> = {
  reads: {
    name: "reads",
    meaning: "Coloured by how much each token reads in all; point at a token to see what it reads",
  },
  "is read": {
    name: "is read",
    meaning:
      "Coloured by how much each token is read in all; point at a token to see what reads it",
  },
};

interface LegendProps {
  scales: Scales;
  side: Side;
  pairs: boolean;
  onSide: (side: Side) => void;
}

/** What the colours mean; for a head also which way round its pairs are summed. */
export function Legend({ scales, side, pairs, onSide }: LegendProps) {
  return (
    <div class="legend">
      {pairs && (
        <span class="segments" role="group" aria-label="Tokens coloured by what">
          {(Object.keys(SIDES) as Side[]).map((each) => (
            <button
              key={each}
              type="button"
              class="small"
              aria-pressed={each === side}
              title={SIDES[each].meaning}
              onClick={() => onSide(each)}
            >
              {SIDES[each].name}
            </button>
          ))}
        </span>
      )}
      <Scale most={scales.token[side]} of={pairs ? `${UNITS.pair}, summed` : UNITS.one} />
      {pairs && (
        <>
          <Scale most={scales.pair} of="of one pair" />
          <span class="quiet-text">point at a token for its pairs</span>
        </>
      )}
    </div>
  );
}
