/** A text that a person writes: new, or as an edit of another, which stays in the history. */
import { useState } from "preact/hooks";
import { writeExplanation } from "./explainer";
import { explainedModel, refresh, refreshCapabilities } from "./explanations";
import type { ExplanationJson } from "./gen/tdb/explainer/v1/explanation_pb";
import { problems } from "./problems";

const MOST = 2_000;

interface WritingProps {
  component: string;
  /** What it is an edit of; absent: it is new. */
  of?: ExplanationJson;
  onDone: () => void;
}

export function Writing({ component, of, onDone }: WritingProps) {
  const before = of?.text ?? "";
  const [text, setText] = useState(before);
  const [wrong, setWrong] = useState<string | null>(null);
  const [busy, setBusy] = useState(false);
  const length = [...text].length;
  const nothing = text.trim() === "" || text === before || length > MOST;
  const store = async () => {
    if (nothing || busy) return;
    setBusy(true);
    setWrong(null);
    try {
      await writeExplanation(
        of ? { basedOn: of.id ?? "", text } : { model: explainedModel(), component, text },
      );
      await refresh(component);
      void refreshCapabilities();
      onDone();
    } catch (error) {
      setWrong(problems(error)[0]?.text ?? null);
    } finally {
      setBusy(false);
    }
  };
  return (
    <form
      class="writing"
      onSubmit={(event) => {
        event.preventDefault();
        void store();
      }}
      onKeyDown={(event) => {
        if (event.key === "Escape") {
          event.stopPropagation();
          onDone();
        } else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) void store();
      }}
    >
      <textarea
        ref={(field) => {
          if (field && !field.dataset["focused"]) {
            field.dataset["focused"] = "";
            field.focus();
          }
        }}
        rows={3}
        aria-label={of ? `Edit the explanation of ${component}` : `What ${component} does`}
        placeholder="What makes it fire, and what it does"
        aria-invalid={length > MOST}
        value={text}
        onInput={(event) => setText(event.currentTarget.value)}
      />
      <p class="buttons">
        <button type="submit" class="primary small" disabled={nothing || busy}>
          {busy ? "storing…" : of ? "store as yours" : "store"}
        </button>
        <button type="button" class="small" onClick={onDone}>
          cancel
        </button>
        <span class={length > MOST ? "error" : "quiet-text"}>
          {length > MOST
            ? `${length} of at most ${MOST} characters`
            : of
              ? "The text it is made from stays in the history."
              : ""}
        </span>
      </p>
      {wrong && (
        <p class="error" role="alert">
          {wrong}
        </p>
      )}
    </form>
  );
}
