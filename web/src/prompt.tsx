/** The prompt bar: the text, its tokens while it is typed, what is asked of it, and Enter to ask. */
import { useLayoutEffect, useRef } from "preact/hooks";
import { askDraft, currentModel, exampleQuestion } from "./asking";
import { Choices } from "./choices";
import type { ExampleJson } from "./gen/tdb/inference/v1/model_pb";
import { count } from "./numbers";
import { problems, sentence } from "./problems";
import { answer, draft, edited, editDraft, loading, model, problemsAt } from "./state";
import { useTokens } from "./tokenise";
import { TokenStrip, visible } from "./tokens";
import { encode } from "./url";
import { choosePlace, isPlace } from "./view";

export function PromptBar() {
  const { prompt, targets, distractors, pending } = draft.value;
  const area = useRef<HTMLTextAreaElement>(null);
  useLayoutEffect(() => {
    const box = area.current;
    if (!box) return;
    box.style.height = "auto";
    box.style.height = `${Math.min(box.scrollHeight, 160) + 2}px`;
  }, [prompt]);

  return (
    <form
      class="prompt-bar"
      onSubmit={(event) => {
        event.preventDefault();
        void askDraft();
      }}
    >
      <div class="prompt">
        <label class="name" for="prompt">
          prompt
        </label>
        <textarea
          id="prompt"
          ref={area}
          rows={1}
          spellcheck={false}
          autocomplete="off"
          value={prompt}
          placeholder="Text for the model to continue"
          aria-describedby="prompt-says"
          aria-invalid={problemsAt("prompt").length > 0}
          onInput={(event) => editDraft({ prompt: event.currentTarget.value })}
          onKeyDown={(event) => {
            if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
            event.preventDefault();
            void askDraft();
          }}
        />
        <PromptTokens />
      </div>
      <div class="objective">
        <Choices side="targets" />
        <button
          type="button"
          class="quiet swap"
          title="Swap targets and distractors"
          aria-label="Swap targets and distractors"
          onClick={() =>
            editDraft({
              targets: distractors,
              distractors: targets,
              pending: { targets: pending.distractors, distractors: pending.targets },
            })
          }
        >
          ⇄
        </button>
        <Choices side="distractors" />
        <button
          type="submit"
          class={edited.value ? "run primary" : "run"}
          title="Ask the model (Enter in any of these fields)"
          disabled={!model.value || loading.value}
        >
          Run <kbd>⏎</kbd>
        </button>
      </div>
    </form>
  );
}

/** The tokens of what stands in the field, and below them what is wrong with it, if anything. */
function PromptTokens() {
  const { prompt } = draft.value;
  const { tokens, error } = useTokens(currentModel(), model.value ? prompt : "");
  const shown = answer.value;
  const same = shown?.question.prompt === prompt && shown.question.model === currentModel();
  const limit = model.value?.limits?.maxTokens ?? 0;
  const refused = problemsAt("prompt").map(({ text }) => text);
  const says =
    refused[0] ??
    (limit && tokens.length > limit
      ? sentence(`This is ${count(tokens.length, "token")}; the model reads at most ${limit}`)
      : error
        ? problems(error)[0]?.text
        : undefined);
  return (
    <>
      <TokenStrip
        tokens={same ? (shown.response.tokens ?? []) : prompt === "" ? [] : tokens}
        chosen={same ? isPlace : () => false}
        onChoose={same ? choosePlace : undefined}
      />
      <div class="below">
        <p id="prompt-says" class={says ? "says error" : "says"} role={says ? "alert" : undefined}>
          {says ?? (prompt === "" ? "" : count(tokens.length, "token"))}
        </p>
        <Examples />
      </div>
    </>
  );
}

/** Whether the model has the behaviour, or at least nobody measured that it has not. */
const learnt = ({ accuracy = 1 }: ExampleJson): boolean => Number(accuracy) >= 0.95;
const percent = ({ accuracy }: ExampleJson): string => `${Math.round(Number(accuracy) * 100)} %`;

/** One link per behaviour the model is known to have: a real link, to copy or to open beside this one. */
function Examples() {
  const examples = model.value?.examples ?? [];
  if (examples.length === 0) return null;
  return (
    <nav class="examples" aria-label="Examples">
      <span>examples</span>
      {examples.map((example) => (
        <a
          key={example.title}
          href={`#${encode(exampleQuestion(example))}`}
          title={`${example.title}\n${example.prompt} → ${visible(example.target ?? "")}, not ${visible(example.distractor ?? "")}${example.accuracy === undefined ? "" : `\nright on ${percent(example)} of held-out prompts`}`}
        >
          {example.title?.split(":")[0]}
          {learnt(example) ? "" : ` (right on ${percent(example)})`}
        </a>
      ))}
    </nav>
  );
}
