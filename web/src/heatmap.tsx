/** A text coloured by a component's values: exact and normalised values one hover away. */
import { useState } from "preact/hooks";
import { full, plain } from "./numbers";
import {
  byToken,
  heat,
  pairsOf,
  type Passage,
  type Scales,
  type Side,
  type Value,
} from "./passages";
import { visible } from "./tokens";

interface HeatmapProps {
  passage: Passage;
  scales: Scales;
  side: Side;
  /** What the values are, for whoever hovers. */
  unit: string;
  /** What the passage is called. */
  label: string;
}

/** Per token; of a head the sums, and for the token that is pointed at its single pairs. */
export function Heatmap(props: HeatmapProps) {
  return props.passage.pairs ? (
    <Pairs {...props} />
  ) : (
    <Line {...props} values={props.passage.values} />
  );
}

interface LineProps extends Pick<HeatmapProps, "passage" | "unit" | "label"> {
  values: Value[];
  scales: Scales;
  side: Side;
}

function Line({ passage, values, scales, side, unit, label }: LineProps) {
  const start = passage.start ?? 0;
  return (
    <p class="passage" role="group" aria-label={label}>
      {passage.texts.map((text, at) => (
        <Cell
          key={at}
          text={text}
          at={start + at}
          x={values[at]}
          scale={scales.token[side]}
          unit={unit}
        />
      ))}
    </p>
  );
}

interface CellProps {
  text: string;
  at: number;
  x: Value;
  scale: number;
  unit: string;
  mark?: boolean;
}

function Cell({ text, at, x, scale, unit, mark }: CellProps) {
  return (
    <>
      {/^\s/.test(text) && <wbr />}
      <span
        class="token heat sequential"
        style={{ "--heat": heat(x, scale).toFixed(3) }}
        title={said(text, at, x, scale, unit)}
        data-at={at}
        data-mark={mark ? "" : undefined}
      >
        {visible(text)}
      </span>
    </>
  );
}

/** `␣Mary, token 3: activation 1.52, 0.36 of the largest`. */
export function said(text: string, at: number, x: Value, scale: number, unit: string): string {
  const token = `${visible(text)}, token ${at}`;
  if (x === undefined) return `${token}: not recorded`;
  const share = scale > 0 ? `, normalised ${plain(heat(x, scale))}` : "";
  return `${token}: ${unit} ${full(x)}${share}`;
}

/** A head: pointing at a token shows its pairs; a click, or the arrow keys, keeps it. */
function Pairs({ passage, scales, side, unit, label }: HeatmapProps) {
  const [kept, keep] = useState<number | null>(null);
  const [pointed, point] = useState<number | null>(null);
  const token = kept ?? pointed;
  const last = passage.texts.length - 1;
  const values = token === null ? byToken(passage, side) : pairsOf(passage, token, side);
  const scale = token === null ? scales.token[side] : scales.pair;
  const what = token === null ? `${unit}, summed over what it ${side}` : unit;
  const at = (event: Event): number | null => {
    const cell = (event.target as HTMLElement).closest<HTMLElement>("[data-at]");
    return cell ? Number(cell.dataset["at"]) : null;
  };
  const onKeyDown = (event: KeyboardEvent) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step !== undefined)
      keep(Math.max(0, Math.min(last, (kept ?? (step > 0 ? -1 : last + 1)) + step)));
    else if (event.key === "Escape" && kept !== null) keep(null);
    else return;
    event.preventDefault();
    event.stopPropagation();
  };
  const about =
    token === null
      ? label
      : `${label}. ${side === "reads" ? "What is read by" : "What reads"} token ${token}, ${visible(passage.texts[token] ?? "")}`;
  return (
    <p
      class="passage pairs"
      role="group"
      tabIndex={0}
      aria-label={about}
      onMouseOver={(event) => point(at(event))}
      onMouseLeave={() => point(null)}
      onBlur={() => keep(null)}
      onClick={(event) => {
        const chosen = at(event);
        keep(chosen === kept ? null : chosen);
      }}
      onKeyDown={onKeyDown}
    >
      {passage.texts.map((text, i) => (
        <Cell
          key={i}
          text={text}
          at={i}
          x={values[i]}
          scale={scale}
          unit={what}
          mark={i === token}
        />
      ))}
    </p>
  );
}

/** What the strongest colour stands for. */
export function Scale({ most, of }: { most: number; of: string }) {
  if (most <= 0) return <span class="quiet-text">{of}: never above 0, so without colour</span>;
  return (
    <span class="scale" title={`The strongest colour is ${full(most)}; 0 and less have none`}>
      <span>0</span>
      <span class="ramp" aria-hidden="true" />
      <span data-testid="scale-end">{plain(most)}</span> <span class="quiet-text">{of}</span>
    </span>
  );
}
