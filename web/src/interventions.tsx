/** What is done to the run, always in sight: each edit with what it really did, removable on its own. */
import { undo } from "./asking";
import { change, removeIntervention } from "./editing";
import type { InterventionJson, ReceiptJson } from "./gen/tdb/inference/v1/intervention_pb";
import type { DirectionJson } from "./gen/tdb/inference/v1/objective_pb";
import type { PromptJson, TokenRefJson } from "./gen/tdb/type/v1/token_pb";
import { count, num, plain, withMinus } from "./numbers";
import { answer, asked, loading, past, problemsAt, stale } from "./state";
import { visible } from "./tokens";
import { isAblation } from "./url";

/** The edit in words: `ablate head.2.3~13-1`. */
export function words(edit: InterventionJson): string {
  if (isAblation(edit)) return `ablate ${edit.target}`;
  if (edit.scale) return `scale ${edit.target} × ${withMinus(String(edit.scale.factor ?? 0))}`;
  if (edit.set) return `set ${edit.target} = ${withMinus(String(edit.set.value ?? "vector"))}`;
  if (edit.mask) return `mask ${edit.target}`;
  if (edit.patch) return `patch ${edit.target} from ${sourceWords(edit.patch.source?.prompt)}`;
  if (edit.mean) {
    const prompts = count(edit.mean.prompts?.length ?? 0, "prompt");
    return `mean ${edit.target} over ${prompts}${edit.mean.perPosition ? ", by position" : ""}`;
  }
  if (edit.projectOut)
    return `project ${directionWords(edit.projectOut.direction)} out of ${edit.target}`;
  const rest: Partial<InterventionJson> = { ...edit };
  delete rest.target;
  delete rest.positions;
  const op = Object.keys(rest)[0] ?? "edit";
  return `${op.replace(/[A-Z]/g, (c) => ` ${c.toLowerCase()}`)} ${edit.target}`;
}

/** Where a patched value comes from: B while it is the prompt compared with, else the prompt's first words. */
function sourceWords(prompt: PromptJson | undefined): string {
  const text = prompt?.text ?? "another run";
  if (text === asked.value?.compare) return "B";
  return `“${text.length > 24 ? `${text.slice(0, 24)}…` : text}”`;
}

function directionWords(direction: DirectionJson | undefined): string {
  if (direction?.writeOf) return direction.writeOf;
  const { targets = [], distractors = [] } = direction?.unembedding ?? {};
  const names = (refs: TokenRefJson[]) =>
    refs.map(({ text, id }) => (text === undefined ? `<${id}>` : visible(text))).join(", ");
  if (targets.length === 0) return "a direction";
  return `${names(targets)}${distractors.length > 0 ? ` − ${names(distractors)}` : ""}`;
}

/** Whether the edited run stands beside itself without the edits, or beside prompt B. */
function Beside() {
  const againstB = asked.value?.againstB ?? false;
  return (
    <label class="beside">
      beside{" "}
      <select
        value={againstB ? "b" : "untouched"}
        title="What the edited run is compared with. Choosing asks again"
        onChange={(event) => {
          const b = event.currentTarget.value === "b";
          change(() => ({ againstB: b }));
        }}
      >
        <option value="untouched">itself without edits</option>
        <option value="b">prompt B</option>
      </select>
    </label>
  );
}

/** A receipt in words: how many sites were edited, how far, and from what to what. */
export function receiptWords(receipt: ReceiptJson): string {
  const [before, after] = [num(receipt.before), num(receipt.after)];
  return [
    count(receipt.sites ?? 0, "site"),
    `Δ norm ${plain(num(receipt.deltaNorm) ?? 0)}`,
    ...(before !== undefined && after !== undefined ? [`${plain(before)} → ${plain(after)}`] : []),
  ].join(" · ");
}

export function Interventions() {
  const edits = asked.value?.interventions ?? [];
  const receipts = stale.value ? [] : (answer.value?.response.receipts ?? []);
  return (
    <section class="bar" aria-label="Interventions">
      <span class="name">interventions</span>
      <ul class="edits">
        {edits.length === 0 && (
          <li class="hint">none: this is the model as it is; ablate a row below to change it</li>
        )}
        {edits.map((edit, index) => {
          const wrong = problemsAt("edit", index)[0]?.text;
          const receipt = receipts[index];
          return (
            <li key={`${index} ${edit.target}`}>
              <span
                class="chip edit"
                data-wrong={wrong ? "" : undefined}
                title={wrong ?? (receipt ? receiptWords(receipt) : "no receipt yet")}
              >
                {words(edit)}
                {receipt && !wrong && <small class="receipt">{receiptWords(receipt)}</small>}
                <button
                  type="button"
                  class="remove"
                  aria-label={`Remove: ${words(edit)}`}
                  onClick={() => removeIntervention(index)}
                >
                  ×
                </button>
              </span>
              {wrong && (
                <span class="error" role="alert">
                  {wrong}
                </span>
              )}
            </li>
          );
        })}
      </ul>
      <div class="actions">
        {edits.length > 0 && asked.value?.compare && <Beside />}
        {edits.length > 1 && (
          <button
            type="button"
            class="quiet"
            onClick={() => change(() => ({ interventions: [] }))}
            title="Remove every intervention"
          >
            clear all
          </button>
        )}
        <button
          type="button"
          class="quiet"
          disabled={past.value.length === 0}
          onClick={undo}
          title="Back to the previous answer, from memory (u)"
        >
          ⟲ undo
        </button>
        <button
          type="button"
          class="quiet"
          disabled={!asked.value || loading.value}
          onClick={() => change(() => ({}))}
          title="Ask the same question again"
        >
          ▷ rerun
        </button>
      </div>
    </section>
  );
}
