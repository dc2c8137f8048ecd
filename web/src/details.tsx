/** What unfolds below a chosen row: its numbers in full, and the tokens it writes and reads. */
import { Actions } from "./actions";
import { Component, componentHeight, describable } from "./component";
import { QUANTITIES, value, type Quantity } from "./columns";
import { explainedHeight, ExplainedRow } from "./explainedrow";
import type { NodeRowJson } from "./gen/tdb/inference/v1/attribute_pb";
import { InRowExamples, inRowHeight } from "./inrow";
import { full } from "./numbers";
import { hasReadOuts, ReadOuts } from "./readouts";
import { answer, paired } from "./state";
import { Place } from "./tokens";
import { cols } from "./view";

/** Room that an open row takes, the line below included: fixed, so that the table's window can count. */
export function detailsHeight(row: NodeRowJson | undefined): number {
  const numbers = paired.value ? 118 : 82;
  const node = row?.node ?? "";
  const known = explainedHeight(node) + componentHeight(node) + inRowHeight(node);
  return numbers + known + (row && hasReadOuts(row) ? 98 : 26);
}

export function Details({ row, width }: { row: NodeRowJson; width: number }) {
  const node = row.node ?? "";
  const tokens = answer.value?.response.tokens ?? [];
  return (
    <tr class="details">
      <td colSpan={width}>
        <div class="details-box" style={{ height: `${detailsHeight(row) - 1}px` }}>
          <div class="details-head">
            <code>{node}</code>
            <span>
              <Place node={node} tokens={tokens} />
            </span>
            <Actions key={node} node={node} />
          </div>
          <dl class="numbers">
            {(Object.keys(QUANTITIES) as Quantity[]).map((quantity) => (
              <Numbers key={quantity} row={row} quantity={quantity} />
            ))}
          </dl>
          <ExplainedRow key={`${node} explained`} node={node} />
          <ReadOuts row={row} />
          {describable(node) && <InRowExamples key={`${node} examples`} node={node} />}
          {describable(node) && <Component key={node} node={node} />}
        </div>
      </td>
    </tr>
  );
}

/** One quantity in all its columns; nothing where the node has none of them. */
function Numbers({ row, quantity }: { row: NodeRowJson; quantity: Quantity }) {
  const values = cols.value
    .filter((col) => col.quantity === quantity)
    .flatMap((col) => {
      const x = value(row, col);
      return x === undefined ? [] : [{ ...col, x }];
    });
  if (values.length === 0) return null;
  return (
    <div>
      <dt title={QUANTITIES[quantity].definition}>{LONG[quantity]}</dt>
      {values.map(({ id, label, x }) => (
        <dd key={id}>
          {label && <span class="quiet-text">{label} </span>}
          {full(x)}
        </dd>
      ))}
    </div>
  );
}

const LONG: Record<Quantity, string> = {
  activation: "activation",
  writeMagnitude: "write magnitude",
  directEffect: "direct effect",
  totalEffect: "estimated total effect",
  verifiedEffect: "verified total effect",
};
