/** The foot of the table: what no row shows, so that the direct-effect column adds up in sight. */
import { signal } from "@preact/signals";
import { site } from "./address";
import { columns, difference, value, type Column } from "./columns";
import { columnShown } from "./explanations";
import { isView } from "./features";
import type { RemainderRowJson } from "./gen/tdb/inference/v1/attribute_pb";
import { count, full, num, signed } from "./numbers";
import { answer } from "./state";
import { allRows, shownRows } from "./view";

const open = signal(false);

export interface Part {
  node: string;
  title: string;
  after: number | undefined;
  before: number | undefined;
}

export function Remainder({ cols }: { cols: Column[] }) {
  const response = answer.value?.response;
  const { totals, compareTotals } = response ?? {};
  if (!response || !totals) return null;
  const parts = byComponent(response.remainder ?? []);
  const errors = parts.some(({ node }) => node.startsWith("error."));
  const hidden = allRows.value.length - shownRows.value.length;
  const unlisted: Part = {
    node: "unlisted nodes",
    title: "Direct effects of all nodes that are not in this table",
    after: num(totals.unlisted),
    before: num(compareTotals?.unlisted),
  };
  const remainder: Part = {
    node: errors ? "bias + error + rest" : "bias + rest",
    title: `Direct effects of biases and constants, ${errors ? "of what dictionaries do not reconstruct, " : ""}and what is not linear in the residual stream`,
    after: num(totals.remainder),
    before: num(compareTotals?.remainder),
  };
  return (
    <tfoot>
      {hidden > 0 && <Row part={hiddenPart()} cols={cols} />}
      <Row part={unlisted} cols={cols} />
      <Row part={remainder} cols={cols}>
        {parts.length > 0 && (
          <button
            type="button"
            class="link"
            aria-expanded={open.value}
            onClick={() => (open.value = !open.value)}
          >
            {open.value ? "▾ fewer" : `▸ ${parts.length} parts`}
          </button>
        )}
      </Row>
      {open.value && parts.map((part) => <Row key={part.node} part={part} cols={cols} inner />)}
    </tfoot>
  );
}

/** The remainder rows, those of one component at several tokens added up. */
export function byComponent(rows: readonly RemainderRowJson[]): Part[] {
  const parts = new Map<string, Part & { tokens: number }>();
  for (const { node = "", directEffect, compareDirectEffect } of rows) {
    const { component, position } = site(node);
    const part = parts.get(component);
    const sum = (a: number | undefined, b: number | undefined) =>
      a === undefined ? b : b === undefined ? a : a + b;
    const tokens = (part?.tokens ?? 0) + (position === undefined ? 0 : 1);
    parts.set(component, {
      node: component,
      title: `Direct effect of a part that no node carries${tokens > 1 ? `, over ${tokens} tokens` : ""}`,
      after: sum(part?.after, num(directEffect)),
      before: sum(part?.before, num(compareDirectEffect)),
      tokens,
    });
  }
  return [...parts.values()];
}

/** The listed rows that the filters hide: with them, and with the rest of the foot, the column adds up. */
function hiddenPart(): Part {
  const shown = new Set(shownRows.value);
  const hidden = allRows.value.filter((row) => !shown.has(row) && !isView(row.node ?? ""));
  const sum = (side: Column["side"]) => {
    const col = columns(true).find((c) => c.quantity === "directEffect" && c.side === side)!;
    return hidden.reduce((total, row) => total + (value(row, col) ?? 0), 0);
  };
  return {
    node: "hidden by filters",
    title: `Direct effects of ${count(hidden.length, "listed node")} that the filters hide`,
    after: sum("after"),
    before: sum("before"),
  };
}

interface RowProps {
  part: Part;
  cols: Column[];
  inner?: boolean;
  children?: preact.ComponentChildren;
}

function Row({ part: { node, title, after, before }, cols, inner, children }: RowProps) {
  const values = { after, before, difference: difference(after, before) };
  return (
    <tr class={inner ? "inner" : undefined} title={title}>
      <th scope="row" class="node">
        {node}
      </th>
      <td class="at">{children}</td>
      {columnShown.value && <td class="explains" />}
      {cols.map(({ id, quantity, side }) => {
        const x = quantity === "directEffect" ? values[side] : undefined;
        return (
          <td
            key={id}
            class={`figure ${side} ${quantity}`}
            title={x === undefined ? undefined : full(x)}
          >
            {x === undefined ? "" : signed(x)}
          </td>
        );
      })}
      <td class="act" />
    </tr>
  );
}
