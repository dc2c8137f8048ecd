/** The table as it is looked at: which rows of the answer are shown, in which order. */
import { batch, computed } from "@preact/signals";
import { columns, extent, SIDE_NAMES, sorted } from "./columns";
import { site } from "./address";
import { supports } from "./features";
import { bestOf, columnShown } from "./explanations";
import {
  encodeFilters,
  filtered,
  readFilters,
  spans,
  within,
  withFilter,
  type Filters,
} from "./filters";
import type { ExplanationJson } from "./gen/tdb/explainer/v1/explanation_pb";
import type { NodeRowJson } from "./gen/tdb/inference/v1/attribute_pb";
import { sampling } from "./generating";
import { encodeSampling } from "./sampling";
import * as state from "./state";
import { encode, encodeOpened } from "./url";
import { label } from "./worth";

export const cols = computed(() =>
  columns(state.paired.value, SIDE_NAMES[state.compared.value ?? "untouched"]).filter(
    ({ quantity }) => quantity !== "verifiedEffect" || supports("verify"),
  ),
);
/** The answer's rows, with what has been verified of them. */
export const allRows = computed(() => {
  const { response, verified } = state.answer.value ?? {};
  const rows = response?.rows ?? [];
  if (!verified || verified.effects.size === 0) return rows;
  return rows.map((row) => {
    const verifiedEffect = verified.effects.get(row.node ?? "");
    return verifiedEffect === undefined ? row : { ...row, verifiedEffect };
  });
});
export const ends = computed(() => extent(allRows.value, cols.value));
/** How many columns the table has, those of words and of actions included. */
export const width = computed(() => cols.value.length + (columnShown.value ? 4 : 3));
export const activeFilters = computed(() =>
  readFilters(withoutHidden(state.filters.value), cols.value, textOf),
);
const kept = computed(() => filtered(allRows.value, activeFilters.value));
export const shownRows = computed(() => sorted(kept.value, state.sort.value, cols.value, textOf));

/** What the row's explanation says, with its method and score. */
function textOf({ node = "" }: NodeRowJson): string | undefined {
  const found = bestOf(site(node).component);
  if (!found) return undefined;
  const known = texts.get(found) ?? `${found.text} ${label(found)}`;
  texts.set(found, known);
  return known;
}

const texts = new WeakMap<ExplanationJson, string>();

/** A column that is hidden filters nothing. */
function withoutHidden(filters: Filters): Filters {
  return columnShown.value ? filters : withFilter(filters, "says", "");
}

const places = computed(() => spans(state.filters.value["at"] ?? "") ?? []);

/** The one token that the table is filtered to, if it is one. */
export const onePlace = computed(() => {
  const [span, ...more] = places.value;
  return span && more.length === 0 && span[0] === span[1] ? span[0] : null;
});

/** Whether the table is filtered to the token, alone or among others. */
export function isPlace(position: number): boolean {
  return within(places.value, position);
}

/** Filters to the token, or no longer; with `more` beside those already chosen. */
export function choosePlace(position: number, more: boolean): void {
  const listed = (state.filters.value["at"] ?? "").split(/[\s,]+/).filter((part) => part !== "");
  const others = listed.filter((part) => part !== String(position));
  const on = others.length < listed.length;
  if (more) setFilter("at", [...others, ...(on ? [] : [position])].join(", "));
  else setFilter("at", on && others.length === 0 ? "" : String(position));
}

const WRITE_MS = 200;
let writing: ReturnType<typeof setTimeout> | undefined;

/** Takes a filter's text; the address follows when typing pauses, for browsers count its changes. */
export function setFilter(id: string, text: string): void {
  state.filters.value = withFilter(state.filters.value, id, text);
  clearTimeout(writing);
  writing = setTimeout(() => writeAddress(), WRITE_MS);
}

export function clearFilters(): void {
  state.filters.value = {};
  writeAddress();
}

/** Another prompt has other tokens: what was about a place of the old one goes. */
export function leavePlaces(): void {
  batch(() => {
    state.selected.value = null;
    state.filters.value = withFilter(state.filters.value, "at", "");
  });
}

/**
 * The question, the filters and the open component as the address: all that a colleague needs to see the
 * same. What the back button should come back from is a `place` of its own.
 */
export function writeAddress(place = false): void {
  clearTimeout(writing);
  const question = state.asked.value;
  if (!question && !state.opened.value) return;
  const asked = question
    ? `${encode(question)}${encodeFilters(state.filters.value)}${encodeSampling(sampling.value)}${state.lens.value ? "&lens" : ""}`
    : "";
  const hash = `#${asked}${encodeOpened(state.opened.value)}`;
  if (place && hash !== location.hash) history.pushState(null, "", hash);
  else history.replaceState(null, "", hash);
}
