/**
 * The node table: what made the difference, most first.
 *
 * Rows have one height, so a long table draws only what is in sight; the details below the chosen row
 * have a height of their own that the window knows. Sorting and filtering happen here; ranking - which
 * nodes are listed at all - is the service's.
 */
import { useEffect, useRef, useState } from "preact/hooks";
import { notAblatable, site, touches } from "./address";
import { isAblated, toggleAblation } from "./asking";
import { columns, extent, nextSort, QUANTITIES, sorted, value } from "./columns";
import type { Column, Quantity } from "./columns";
import { Details, DETAILS_HEIGHT } from "./details";
import type { NodeRowJson } from "./gen/tdb/inference/v1/attribute_pb";
import type { TokenJson } from "./gen/tdb/type/v1/token_pb";
import { full, plain, signed } from "./numbers";
import { Remainder } from "./remainder";
import { answer, paired, selected, sort, tokenFilter } from "./state";
import { TableBar } from "./tablebar";
import { TokenAt } from "./tokens";

const ROW_HEIGHT = 25; // as in theme.css
const WINDOWED_ABOVE = 200;
const OVERSCAN = 12;

/** The rows as shown: filtered to a token, in the chosen order. */
export function shownRows(): NodeRowJson[] {
  const rows = answer.value?.response.rows ?? [];
  const token = tokenFilter.value;
  const kept = token === null ? rows : rows.filter(({ node }) => touches(node ?? "", token));
  return sorted(kept, sort.value, columns(paired.value));
}

export function NodeTable() {
  const shown = answer.value;
  const cols = columns(paired.value);
  const rows = shownRows();
  const ends = extent(shown?.response.rows ?? [], cols);
  const body = useRef<HTMLTableSectionElement>(null);
  const window = useWindow(body, rows);
  if (!shown) return null;
  const width = cols.length + 3;
  return (
    <section class="nodes" aria-label="Nodes">
      <TableBar rows={rows.length} />
      <table class={paired.value ? "node-table paired" : "node-table"}>
        <thead>
          <Headings cols={cols} ends={ends} />
        </thead>
        <tbody ref={body}>
          {window.above > 0 && <tr class="gap" style={{ height: `${window.above}px` }} />}
          {rows.slice(window.from, window.to).map((row) => (
            <Row
              key={row.node}
              row={row}
              cols={cols}
              ends={ends}
              tokens={shown.response.tokens ?? []}
            />
          ))}
          {window.below > 0 && <tr class="gap" style={{ height: `${window.below}px` }} />}
          {rows.length === 0 && (
            <tr>
              <td class="hint" colSpan={width}>
                No listed node reads or writes at this token; click the token again to list all.
              </td>
            </tr>
          )}
        </tbody>
        <Remainder cols={cols} />
      </table>
    </section>
  );
}

function Headings({ cols, ends }: { cols: Column[]; ends: Map<Quantity, number> }) {
  const now = sort.value;
  const marks = { size: "|▾|", down: "▾", up: "▴" };
  return (
    <tr>
      <th scope="col" class="node">
        node
      </th>
      <th
        scope="col"
        class="at"
        title="The token the node writes at; for a head, ← the token it reads from"
      >
        at
      </th>
      {cols.map((col) => {
        const { name, definition, effect } = QUANTITIES[col.quantity];
        const mine = now?.column === col.id ? now.by : null;
        const end = plain(ends.get(col.quantity) ?? 0);
        const order = mine === "up" ? "ascending" : mine ? "descending" : "none";
        return (
          <th
            key={col.id}
            scope="col"
            class={`figure ${col.side} ${col.quantity}`}
            aria-sort={order}
            title={`${definition}. The colour scale ends at ${effect ? "±" : ""}${end}.`}
          >
            <button type="button" onClick={() => (sort.value = nextSort(now, col))}>
              {name}
              {mine && <span aria-hidden="true"> {marks[mine]}</span>}
              {col.label && <span class="side"> {col.label}</span>}
            </button>
            <small class="end">
              {effect ? "±" : "≤"}
              {end}
            </small>
          </th>
        );
      })}
      <th scope="col" class="act">
        <span class="unseen">actions</span>
      </th>
    </tr>
  );
}

interface RowProps {
  row: NodeRowJson;
  cols: Column[];
  ends: Map<Quantity, number>;
  tokens: TokenJson[];
}

function Row({ row, cols, ends, tokens }: RowProps) {
  const node = row.node ?? "";
  const open = selected.value === node;
  const ablated = isAblated(node);
  const choose = () => (selected.value = open ? null : node);
  return (
    <>
      <tr class="row" data-node={node} data-chosen={open ? "" : undefined} onClick={choose}>
        <th scope="row" class="node">
          <button
            type="button"
            class="address"
            data-ablated={ablated ? "" : undefined}
            title={ablated ? "ablated" : undefined}
            aria-expanded={open}
            onClick={(event) => {
              event.stopPropagation();
              choose();
            }}
          >
            {node}
          </button>
        </th>
        <td class="at">
          <Place node={node} tokens={tokens} />
        </td>
        {cols.map((col) => (
          <Figure key={col.id} col={col} x={value(row, col)} end={ends.get(col.quantity) ?? 0} />
        ))}
        <td class="act">
          <AblateButton node={node} />
        </td>
      </tr>
      {open && <Details row={row} width={cols.length + 3} />}
    </>
  );
}

export function AblateButton({ node }: { node: string }) {
  const why = notAblatable(node);
  const ablated = isAblated(node);
  return (
    <button
      type="button"
      class="small"
      disabled={why !== undefined}
      title={
        why ?? (ablated ? `Give ${node} its value back (a)` : `Set ${node} to 0 and ask again (a)`)
      }
      aria-label={`${ablated ? "Restore" : "Ablate"} ${node}`}
      onClick={(event) => {
        event.stopPropagation();
        toggleAblation(node);
      }}
    >
      {ablated ? "restore" : "ablate"}
    </button>
  );
}

/** Where a node sits: `to ← Mary` for a pair, the token for the rest. */
export function Place({ node, tokens }: { node: string; tokens: TokenJson[] }) {
  const { position, key } = site(node);
  if (position === undefined) return null;
  return (
    <>
      <TokenAt tokens={tokens} position={position} />
      {key !== undefined && (
        <>
          <span class="arrow">←</span>
          <TokenAt tokens={tokens} position={key} />
        </>
      )}
    </>
  );
}

function Figure({ col, x, end }: { col: Column; x: number | undefined; end: number }) {
  const kind = `figure ${col.side} ${col.quantity}`;
  if (x === undefined) {
    return (
      <td class={kind} title="The node does not exist in this run">
        –
      </td>
    );
  }
  const scale = col.signed ? (x < 0 ? "negative" : "positive") : "sequential";
  const heat = end > 0 ? Math.abs(x) / end : 0;
  return (
    <td
      class={`${kind} heat ${scale}`}
      style={{ "--heat": heat.toFixed(3) }}
      data-value={x}
      title={`${QUANTITIES[col.quantity].name} ${col.label} = ${full(x)}`}
    >
      {col.signed ? signed(x) : plain(x)}
    </td>
  );
}

/** Which rows are in sight, and the space the others would take. */
function useWindow(body: { current: HTMLElement | null }, rows: NodeRowJson[]) {
  const [top, setTop] = useState(0);
  const windowed = rows.length > WINDOWED_ABOVE;
  useEffect(() => {
    const scroller = body.current?.closest<HTMLElement>("[data-scroller]");
    if (!windowed || !scroller) return;
    const measure = () => {
      const box = body.current?.getBoundingClientRect();
      if (box) setTop(Math.max(0, scroller.getBoundingClientRect().top - box.top));
    };
    measure();
    scroller.addEventListener("scroll", measure, { passive: true });
    return () => scroller.removeEventListener("scroll", measure);
  }, [windowed, rows.length]);
  if (!windowed) return { from: 0, to: rows.length, above: 0, below: 0 };

  const chosen = rows.findIndex(({ node }) => node === selected.value);
  const detailsAbove = (index: number) => (chosen >= 0 && chosen < index ? DETAILS_HEIGHT : 0);
  const offset = (index: number) => index * ROW_HEIGHT + detailsAbove(index);
  const first = Math.floor(
    Math.max(0, top - detailsAbove(Math.floor(top / ROW_HEIGHT))) / ROW_HEIGHT,
  );
  const from = Math.min(Math.max(0, first - OVERSCAN), rows.length);
  const to = Math.min(rows.length, first + Math.ceil(innerHeight / ROW_HEIGHT) + OVERSCAN);
  return { from, to, above: offset(from), below: offset(rows.length) - offset(to) };
}
