/** The buttons of an open row: ablate it, set its value, scale it, trace it, and all else in a menu. */
import { useState } from "preact/hooks";
import { editOf, isAblated, scaleBy, setValue, toggleAblation } from "./editing";
import { cannot, type Op } from "./features";
import { opening, traces, verification, type Offer } from "./offers";
import { valueForm } from "./state";
import { HEAD_INPUTS } from "./trace";

export function AblateButton({ node }: { node: string }) {
  const ablated = isAblated(node);
  const why = ablated ? undefined : cannot("ablate", node);
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

/** The number that was typed, in the spelling of any keyboard; null where it is none. */
export function readNumber(text: string): number | null {
  const plain = text.trim().replaceAll("−", "-");
  if (!/^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i.test(plain)) return null;
  const x = Number(plain);
  return Number.isFinite(x) ? x : null;
}

type Valued = Extract<Op, "set" | "scale">;

const VALUED = {
  set: { button: "set…", sign: "=", example: "0.5", apply: setValue },
  scale: { button: "scale…", sign: "×", example: "2", apply: scaleBy },
} as const;

/** All actions of an open row; set and scale unfold a field in the same line. */
export function Actions({ node }: { node: string }) {
  const open = valueForm.value?.node === node ? valueForm.value.op : null;
  const done = () => (valueForm.value = null);
  if (open) return <ValueForm key={open} op={open} node={node} done={done} />;
  return (
    <>
      <AblateButton node={node} />
      {(Object.keys(VALUED) as Valued[]).map((op) => {
        const why = cannot(op, node);
        return (
          <button
            key={op}
            type="button"
            class="small"
            disabled={why !== undefined}
            title={
              why ??
              (op === "set"
                ? "Give the node another value"
                : "Multiply the node's value by a factor")
            }
            aria-label={`${op === "set" ? "Set" : "Scale"} ${node}`}
            onClick={() => (valueForm.value = { node, op })}
          >
            {VALUED[op].button}
          </button>
        );
      })}
      <TraceButtons node={node} />
      <OfferButton offer={verification(node)} node={node} />
      <OfferButton offer={opening(node)} node={node} />
    </>
  );
}

function OfferButton({ offer, node }: { offer: Offer; node: string }) {
  const { label, hint, key, why, act } = offer;
  return (
    <button
      type="button"
      class="small"
      disabled={why !== undefined}
      title={why ?? `${label}: ${hint}${key ? ` (${key})` : ""}`}
      aria-label={`${label[0]?.toUpperCase()}${label.slice(1)} ${node}`}
      onClick={act}
    >
      {label}
    </button>
  );
}

/** One button, or for a head one per input. */
function TraceButtons({ node }: { node: string }) {
  const ways = traces(node);
  const [only] = ways;
  if (!only) return null;
  const button = ({ label, hint, why, act }: Offer, text: string) => (
    <button
      key={label}
      type="button"
      class="small"
      disabled={why !== undefined}
      title={why ?? `${label}: ${hint} (t)`}
      aria-label={label}
      onClick={act}
    >
      {text}
    </button>
  );
  if (ways.length === 1) return button(only, "trace");
  return (
    <span class="segments">
      <span class="quiet-text">trace through</span>
      {ways.map((way, i) => button(way, Object.values(HEAD_INPUTS)[i] ?? ""))}
    </span>
  );
}

function ValueForm({ op, node, done }: { op: Valued; node: string; done: () => void }) {
  const { sign, example, apply } = VALUED[op];
  const now = op === "set" ? editOf(node)?.set?.value : editOf(node)?.scale?.factor;
  const [text, setText] = useState(now === undefined ? "" : String(now));
  const [refused, setRefused] = useState(false);
  const bad =
    refused || (text.trim() !== "" && !/^[-+−.]$/.test(text) && readNumber(text) === null);
  return (
    <form
      class="value-form"
      onSubmit={(event) => {
        event.preventDefault();
        const x = readNumber(text);
        setRefused(x === null);
        if (x === null) return;
        apply(node, x);
        done();
      }}
      onKeyDown={(event) => {
        if (event.key === "Escape") done();
      }}
    >
      <label>
        {op} {sign}{" "}
        <input
          ref={(field) => {
            if (field && !field.dataset["focused"]) {
              field.dataset["focused"] = "";
              field.focus();
            }
          }}
          type="text"
          inputMode="decimal"
          autocomplete="off"
          placeholder={example}
          value={text}
          aria-label={op === "set" ? `New value of ${node}` : `Factor for ${node}`}
          aria-invalid={bad}
          onInput={(event) => {
            setText(event.currentTarget.value);
            setRefused(false);
          }}
        />
      </label>
      <button type="submit" class="small">
        apply
      </button>
      <button type="button" class="small quiet" onClick={done}>
        cancel
      </button>
      {bad && (
        <span class="error" role="alert">
          Type a number, such as {example}.
        </span>
      )}
    </form>
  );
}
