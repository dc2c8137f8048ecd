/** What unfolds below a chosen row: its numbers in full, in both runs where there are two. */
import { columns, QUANTITIES, value, type Quantity } from "./columns";
import type { NodeRowJson } from "./gen/tdb/inference/v1/attribute_pb";
import { full } from "./numbers";
import { answer, paired } from "./state";
import { AblateButton, Place } from "./table";

/** As in theme.css: the table's window must know how much room an open row takes. */
export const DETAILS_HEIGHT = 122;

export function Details({ row, width }: { row: NodeRowJson; width: number }) {
  const cols = columns(paired.value);
  const node = row.node ?? "";
  const tokens = answer.value?.response.tokens ?? [];
  return (
    <tr class="details">
      <td colSpan={width}>
        <div class="details-box">
          <div class="details-head">
            <code>{node}</code>
            <span>
              <Place node={node} tokens={tokens} />
            </span>
            <AblateButton node={node} />
          </div>
          <dl>
            {(Object.keys(QUANTITIES) as Quantity[]).map((quantity) => (
              <div key={quantity}>
                <dt title={QUANTITIES[quantity].definition}>{LONG[quantity]}</dt>
                {cols
                  .filter((col) => col.quantity === quantity)
                  .map((col) => {
                    const x = value(row, col);
                    return (
                      <dd key={col.id}>
                        {col.label && <span class="quiet-text">{col.label} </span>}
                        {x === undefined ? "–" : full(x)}
                      </dd>
                    );
                  })}
              </div>
            ))}
          </dl>
        </div>
      </td>
    </tr>
  );
}

const LONG: Record<Quantity, string> = {
  activation: "activation",
  writeMagnitude: "write magnitude",
  directEffect: "direct effect",
  totalEffect: "estimated total effect",
};
