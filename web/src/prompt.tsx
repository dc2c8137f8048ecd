/** The prompt bar: the text and a second to compare with, their tokens, what is asked, and Enter to ask. */
import { useLayoutEffect, useRef } from "preact/hooks";
import { askDraft, currentModel, exampleQuestion } from "./asking";
import { Choices } from "./choices";
import { change } from "./editing";
import type { ExampleJson } from "./gen/tdb/inference/v1/model_pb";
import { count } from "./numbers";
import { problems, sentence } from "./problems";
import { answer, asked, draft, edited, editDraft, loading, model, problemsAt } from "./state";
import { useTokens } from "./tokenise";
import { TokenStrip, visible } from "./tokens";
import { encode } from "./url";
import { choosePlace, isPlace } from "./view";

export function PromptBar() {
  const { prompt, targets, distractors, compare, pending } = draft.value;

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
        <TextField
          id="prompt"
          text={prompt}
          placeholder="Text for the model to continue"
          onInput={(text) => editDraft({ prompt: text })}
        />
        <PromptTokens />
        {compare !== null && <Compared text={compare} />}
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

interface TextFieldProps {
  id: "prompt" | "compare";
  text: string;
  placeholder: string;
  onInput: (text: string) => void;
}

/** A text as tall as its lines; Enter asks. */
function TextField({ id, text, placeholder, onInput }: TextFieldProps) {
  const area = useRef<HTMLTextAreaElement>(null);
  useLayoutEffect(() => {
    const box = area.current;
    if (!box) return;
    box.style.height = "auto";
    box.style.height = `${Math.min(box.scrollHeight, 160) + 2}px`;
  }, [text]);
  return (
    <textarea
      id={id}
      ref={area}
      rows={1}
      spellcheck={false}
      autocomplete="off"
      value={text}
      placeholder={placeholder}
      aria-describedby={`${id}-says`}
      aria-invalid={problemsAt(id).length > 0}
      onInput={(event) => onInput(event.currentTarget.value)}
      onKeyDown={(event) => {
        if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
        event.preventDefault();
        void askDraft();
      }}
    />
  );
}

/** Prompt B with its tokens, which are compared with those of the first prompt place by place. */
function Compared({ text }: { text: string }) {
  const first = useTokens(currentModel(), model.value ? draft.value.prompt : "");
  const { tokens, error } = useTokens(currentModel(), model.value ? text : "");
  const refused = problemsAt("compare")[0]?.text ?? (error ? problems(error)[0]?.text : undefined);
  const [n, m] = [tokens.length, first.tokens.length];
  const says =
    text === ""
      ? "Type a prompt to compare with, such as the same with the names exchanged."
      : n === m || n === 0
        ? count(n, "token")
        : `${count(n, "token")}; the first prompt has ${m}, so nothing can be patched from B by position`;
  const close = () => {
    editDraft({ compare: null });
    if (asked.value?.compare) change(() => ({ compare: "", againstB: false }));
  };
  return (
    <>
      <label class="name" for="compare" title="Prompt B, whose values stand beside the first one's">
        prompt B
      </label>
      <TextField
        id="compare"
        text={text}
        placeholder="Another text to compare with"
        onInput={(compare) => editDraft({ compare })}
      />
      <TokenStrip label="Tokens of prompt B" tokens={text === "" ? [] : tokens} />
      <div class="below">
        <p
          id="compare-says"
          class={refused ? "says error" : "says"}
          role={refused ? "alert" : undefined}
        >
          {refused ?? says}{" "}
          <button type="button" class="link" onClick={close}>
            remove
          </button>
        </p>
      </div>
    </>
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
        label="Tokens of the prompt"
        tokens={same ? (shown.response.tokens ?? []) : prompt === "" ? [] : tokens}
        chosen={same ? isPlace : undefined}
        onChoose={same ? choosePlace : undefined}
      />
      <div class="below">
        <p id="prompt-says" class={says ? "says error" : "says"} role={says ? "alert" : undefined}>
          {says ?? (prompt === "" ? "" : count(tokens.length, "token"))}
        </p>
        {draft.value.compare === null && (
          <button
            type="button"
            class="link small"
            onClick={() => {
              editDraft({ compare: prompt });
              requestAnimationFrame(() => document.getElementById("compare")?.focus());
            }}
          >
            + compare with another prompt
          </button>
        )}
        {draft.value.compare === null && <Examples />}
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
