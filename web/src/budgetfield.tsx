/** The most that may be spent: in dollars where prices are known, else in tokens. */
import { readNumber } from "./actions";
import type { BudgetJson } from "./gen/tdb/explainer/v1/explain_pb";

/** The budget that was typed; null where it is none. */
export function readBudget(text: string, inMoney: boolean): BudgetJson | null {
  const x = readNumber(text.replaceAll(",", "").replace(/^\s*\$/, ""));
  if (x === null || x <= 0) return null;
  if (inMoney) return { maxCost: x };
  return Number.isSafeInteger(x) ? { maxTokens: String(x) } : null;
}

interface BudgetProps {
  text: string;
  inMoney: boolean;
  onInput: (text: string) => void;
}

export function BudgetField({ text, inMoney, onInput }: BudgetProps) {
  const bad = text.trim() !== "" && readBudget(text, inMoney) === null;
  return (
    <label>
      at most {inMoney && "$ "}
      <input
        class="field number"
        type="text"
        inputMode="decimal"
        autocomplete="off"
        aria-label={inMoney ? "Budget in dollars" : "Budget in tokens"}
        aria-invalid={bad}
        title={
          inMoney ? "A number of dollars, such as 0.50" : "A whole number of tokens, such as 200000"
        }
        value={text}
        onInput={(event) => onInput(event.currentTarget.value)}
      />
      {!inMoney && " tokens"}
    </label>
  );
}
