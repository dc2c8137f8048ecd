/** One row of the node table, in two lines where the service tells what the node writes. */
import { AblateButton } from "./actions";
import { QUANTITIES, value, type Column, type Quantity } from "./columns";
import { Details } from "./details";
import { isAblated } from "./editing";
import { ExplanationCell } from "./explanationcell";
import { columnShown } from "./explanations";
import { isView } from "./features";
import type { NodeRowJson } from "./gen/tdb/inference/v1/attribute_pb";
import type { TokenJson } from "./gen/tdb/type/v1/token_pb";
import { full, plain, signed } from "./numbers";
import { MenuButton } from "./menu";
import { InLine } from "./readouts";
import { selected } from "./state";
import { Place } from "./tokens";
import { width } from "./view";

interface RowProps {
  row: NodeRowJson;
  cols: Column[];
  ends: Map<Quantity, number>;
  tokens: TokenJson[];
  /** Whether rows have a second line, for the tokens they promote and demote. */
  told: boolean;
}

export function Row({ row, cols, ends, tokens, told }: RowProps) {
  const node = row.node ?? "";
  const open = selected.value === node;
  const ablated = isAblated(node);
  const choose = () => (selected.value = open ? null : node);
  const chosen = open ? "" : undefined;
  const lines = told ? 2 : 1;
  return (
    <>
      <tr class={told ? "row told" : "row"} data-node={node} data-chosen={chosen} onClick={choose}>
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
          {isView(node) && (
            <small
              class="quiet-text"
              title="A latent of the residual stream: a view, outside the table's sum of direct effects"
            >
              view
            </small>
          )}
        </th>
        <td class="at">
          <Place node={node} tokens={tokens} />
        </td>
        {columnShown.value && <ExplanationCell node={node} lines={lines} />}
        {cols.map((col) => (
          <Figure
            key={col.id}
            col={col}
            x={value(row, col)}
            end={ends.get(col.quantity) ?? 0}
            lines={lines}
          />
        ))}
        <td class="act" rowSpan={lines}>
          <AblateButton node={node} />
          <MenuButton node={node} />
        </td>
      </tr>
      {told && (
        <tr class="does" data-below={chosen} onClick={choose}>
          <td colSpan={2}>
            <InLine row={row} />
          </td>
        </tr>
      )}
      {open && <Details row={row} width={width.value} />}
    </>
  );
}

interface FigureProps {
  col: Column;
  x: number | undefined;
  end: number;
  lines: number;
}

function Figure({ col, x, end, lines }: FigureProps) {
  const kind = `figure ${col.side} ${col.quantity}`;
  if (x === undefined) {
    const unverified = col.quantity === "verifiedEffect";
    const title = unverified ? "Not verified: press v" : "The node does not exist in this run";
    return (
      <td class={kind} rowSpan={lines} title={title}>
        {unverified ? "" : "–"}
      </td>
    );
  }
  const scale = col.signed ? (x < 0 ? "negative" : "positive") : "sequential";
  const heat = end > 0 ? Math.abs(x) / end : 0;
  return (
    <td
      class={`${kind} heat ${scale}`}
      rowSpan={lines}
      style={{ "--heat": heat.toFixed(3) }}
      data-value={x}
      title={`${QUANTITIES[col.quantity].name} ${col.label} = ${full(x)}`}
    >
      {col.signed ? signed(x) : plain(x)}
    </td>
  );
}
