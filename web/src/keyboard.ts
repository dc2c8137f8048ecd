/**
 * Keys that work anywhere but in a field: j k move, a ablates, t traces, v verifies (V all), m opens the
 * menu, o opens the component, e explains it, g generates, u undoes, f filters, / goes to the prompt. While a component
 * is open, Escape closes it.
 */
import { site } from "./address";
import { undo } from "./asking";
import { toggleAblation } from "./editing";
import { continuePrompt } from "./generating";
import { explainOffline } from "./explaining";
import { bestOf, capabilities, explainable } from "./explanations";
import { openMenuOf, openTraces } from "./menu";
import { closeComponent, openComponent, openNode } from "./opening";
import { opened, selected } from "./state";
import { verifyRows } from "./verifying";
import { shownRows } from "./view";

export function onKey(event: KeyboardEvent): void {
  const { target } = event;
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  if (target instanceof HTMLElement && target.closest("input, textarea, select")) return;
  const act = (opened.value ? WHILE_OPEN : ACTIONS)[event.key];
  if (!act) return;
  event.preventDefault();
  act();
}

const ACTIONS: Record<string, () => void> = {
  j: () => move(1),
  k: () => move(-1),
  a: () => {
    const node = selected.value;
    if (node !== null) toggleAblation(node);
  },
  t: () => {
    const node = selected.value;
    if (node !== null) openTraces(node);
  },
  v: () => {
    const row = shownRows.value.find(({ node }) => node === selected.value);
    if (row) void verifyRows([row]);
  },
  V: () => void verifyRows(shownRows.value),
  m: () => {
    const node = selected.value;
    if (node !== null) openMenuOf(node);
  },
  o: () => {
    const node = selected.value;
    if (node !== null) openNode(node);
  },
  e: () => {
    const node = selected.value;
    if (node !== null && explainable(node)) explainSelected(site(node).component);
  },
  g: () => void continuePrompt(),
  u: undo,
  f: () => document.getElementById("filter-node")?.focus(),
  "/": () => document.getElementById("prompt")?.focus(),
  Escape: () => (selected.value = null),
};

/** The table is out of sight then, and nothing may happen to it. */
const WHILE_OPEN: Record<string, () => void> = {
  Escape: closeComponent,
  o: closeComponent,
  "/": () => document.getElementById("prompt")?.focus(),
};

/** Explains what has no explanation; what has one is opened. */
function explainSelected(component: string): void {
  if (bestOf(component)) openComponent(component);
  else if (capabilities.value) explainOffline(component);
}

function move(step: number): void {
  const rows = shownRows.value;
  if (rows.length === 0) return;
  const now = rows.findIndex(({ node }) => node === selected.value);
  const next = now < 0 ? 0 : Math.max(0, Math.min(rows.length - 1, now + step));
  selected.value = rows[next]?.node ?? null;
  requestAnimationFrame(() =>
    document.querySelector("[data-chosen]")?.scrollIntoView({ block: "nearest" }),
  );
}
