/**
 * The node table: what made the difference, most first.
 *
 * Rows have one height, so a long table draws only what is in sight; the details below the chosen row
 * have a height of their own that the window knows. Sorting and filtering happen here; ranking - which
 * nodes are listed at all - is the service's.
 */
import { useEffect, useRef, useState } from "preact/hooks";
import { detailsHeight } from "./details";
import type { NodeRowJson } from "./gen/tdb/inference/v1/attribute_pb";
import { Headings } from "./headings";
import { hasReadOuts } from "./readouts";
import { Remainder } from "./remainder";
import { Row } from "./row";
import { answer, paired, selected } from "./state";
import { TableBar } from "./tablebar";
import { Views } from "./views";
import { allRows, clearFilters, cols, ends, shownRows, width } from "./view";

const ROW_HEIGHT = 25; // as in theme.css
const TOLD_ROW_HEIGHT = 42; // as in theme.css
const WINDOWED_ABOVE = 200;
const OVERSCAN = 12;

export function NodeTable() {
  const shown = answer.value;
  const rows = shownRows.value;
  const body = useRef<HTMLTableSectionElement>(null);
  const told = allRows.value.some(hasReadOuts);
  const window = useWindow(body, rows, told ? TOLD_ROW_HEIGHT : ROW_HEIGHT);
  if (!shown) return null;
  return (
    <section class="nodes" aria-label="Nodes">
      <TableBar />
      <table class={paired.value ? "node-table paired" : "node-table"}>
        <thead>
          <Headings />
        </thead>
        <tbody ref={body}>
          {window.above > 0 && <tr class="gap" style={{ height: `${window.above}px` }} />}
          {rows.slice(window.from, window.to).map((row) => (
            <Row
              key={row.node}
              row={row}
              cols={cols.value}
              ends={ends.value}
              tokens={shown.response.tokens ?? []}
              told={told}
            />
          ))}
          {window.below > 0 && <tr class="gap" style={{ height: `${window.below}px` }} />}
          {rows.length === 0 && (
            <tr class="nothing">
              <td class="hint" colSpan={width.value}>
                <Nothing />
              </td>
            </tr>
          )}
        </tbody>
        <Remainder cols={cols.value} />
      </table>
      <Views />
    </section>
  );
}

/** Why there is no row to see, and what to do about it. */
function Nothing() {
  if (allRows.value.length === 0) return <>No node has an effect on this objective.</>;
  return (
    <>
      No row passes the filters.{" "}
      <button type="button" class="link" onClick={clearFilters}>
        clear filters
      </button>
    </>
  );
}

/** Which rows are in sight, and the space the others would take. */
function useWindow(
  body: { current: HTMLElement | null },
  rows: readonly NodeRowJson[],
  height: number,
) {
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
  const details = detailsHeight(rows[chosen]);
  const detailsAbove = (index: number) => (chosen >= 0 && chosen < index ? details : 0);
  const offset = (index: number) => index * height + detailsAbove(index);
  const first = Math.floor(Math.max(0, top - detailsAbove(Math.floor(top / height))) / height);
  const from = Math.min(Math.max(0, first - OVERSCAN), rows.length);
  const to = Math.min(rows.length, first + Math.ceil(innerHeight / height) + OVERSCAN);
  return { from, to, above: offset(from), below: offset(rows.length) - offset(to) };
}
