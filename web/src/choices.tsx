/**
 * Targets or distractors: a row of one-token chips and a field that adds to them.
 *
 * While a text is typed the line below says how it tokenises and which spelling would be one token. The
 * list that opens under the field is what the model itself finds likely, so the usual choice is a click.
 */
import { useState } from "preact/hooks";
import { addChoice, askDraft, currentModel, settle } from "./asking";
import { run } from "./inference";
import { num, percent } from "./numbers";
import { problems } from "./problems";
import { draft, editDraft, model, problemsAt, type Side } from "./state";
import { reading, useLatest, type Reading } from "./tokenise";
import { typed, visible } from "./tokens";

const SIDES = {
  targets: { one: "target", mark: "●", title: "Tokens whose logit is explained" },
  distractors: {
    one: "distractor",
    mark: "○",
    title: "Tokens whose logit is subtracted; none is fine",
  },
} as const;

export function Choices({ side }: { side: Side }) {
  const { one, mark, title } = SIDES[side];
  const { [side]: chosen, pending } = draft.value;
  const text = pending[side];
  const id = `${one}-field`;
  const [open, setOpen] = useState(false);
  const [marked, setMarked] = useState(-1);
  const likely = useLikely(open);
  const offered = likely.filter((s) => !chosen.includes(s.text) && s.text.includes(text.trim()));

  const write = (value: string) =>
    editDraft({ pending: { ...draft.value.pending, [side]: value } });
  const take = (value: string) => {
    addChoice(side, value);
    setMarked(-1);
  };
  const onKeyDown = (event: KeyboardEvent) => {
    if (event.isComposing) return;
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      const step = event.key === "ArrowDown" ? 1 : -1;
      setOpen(true);
      setMarked(Math.max(-1, Math.min(offered.length - 1, marked + step)));
    } else if (event.key === "Enter") {
      const pick = offered[marked];
      if (open && pick) take(pick.text);
      else void askDraft();
      setOpen(false);
    } else if (event.key === "," && text !== "") {
      void settle(side);
    } else if (event.key === "Backspace" && text === "" && chosen.length > 0) {
      editDraft({ [side]: chosen.slice(0, -1) });
      return;
    } else {
      if (event.key === "Escape") setOpen(false);
      return;
    }
    event.preventDefault();
  };

  return (
    <div class={`choices ${one}`}>
      <label class="name" for={id} title={title}>
        {one} <span aria-hidden="true">{mark}</span>
      </label>
      <div class="field">
        {chosen.map((token, index) => (
          <span
            key={token}
            class="chip token"
            data-wrong={problemsAt(one, index).length > 0 ? "" : undefined}
          >
            {visible(token)}
            <button
              type="button"
              class="remove"
              aria-label={`Remove ${one} ${visible(token)}`}
              onClick={() => editDraft({ [side]: chosen.filter((t) => t !== token) })}
            >
              ×
            </button>
          </span>
        ))}
        <input
          id={id}
          class="token"
          size={Math.max(6, text.length + 1)}
          autocomplete="off"
          spellcheck={false}
          role="combobox"
          aria-expanded={open && offered.length > 0}
          aria-controls={`${id}-list`}
          aria-autocomplete="list"
          aria-activedescendant={marked >= 0 ? `${id}-${marked}` : undefined}
          aria-describedby={`${id}-says`}
          value={visible(text)}
          onInput={(event) => write(typed(event.currentTarget.value))}
          onFocus={() => setOpen(true)}
          onBlur={() => setOpen(false)}
          onKeyDown={onKeyDown}
        />
        <ul class="offers" id={`${id}-list`} role="listbox" hidden={!open || offered.length === 0}>
          {offered.map((offer, index) => (
            <li
              key={offer.text}
              id={`${id}-${index}`}
              role="option"
              aria-selected={index === marked}
              onMouseDown={(event) => {
                event.preventDefault();
                take(offer.text);
              }}
            >
              <span class="token">{visible(offer.text)}</span>
              <span class="number">{percent(offer.probability)}</span>
            </li>
          ))}
        </ul>
      </div>
      <Says side={side} id={`${id}-says`} text={text} />
    </div>
  );
}

/** One line below the field: the service's refusal, or how the typed text reads. */
function Says({ side, id, text }: { side: Side; id: string; text: string }) {
  const { one } = SIDES[side];
  const { value, error, key } = useLatest(
    text === "" || !model.value ? null : `${currentModel()}\0${text}`,
    (signal) => reading(currentModel(), text, signal),
  );
  const current = key?.endsWith(`\0${text}`) ? value : null;
  const refused = text === "" ? problemsAt(one)[0]?.text : undefined;
  const wrong = refused ?? (error && text !== "" ? problems(error)[0]?.text : undefined);
  const bad = wrong !== undefined || (current !== null && current.tokens.length !== 1);
  return (
    <p id={id} class={bad ? "says error" : "says"} role={bad ? "alert" : undefined}>
      {wrong ?? (current && text !== "" ? <Verdict side={side} reading={current} /> : null)}
    </p>
  );
}

function Verdict({ side, reading: { text, tokens, instead } }: { side: Side; reading: Reading }) {
  const offer = instead !== undefined && (
    <button
      type="button"
      class="link token"
      onMouseDown={(event) => event.preventDefault()}
      onClick={() => addChoice(side, instead)}
    >
      {visible(instead)}
    </button>
  );
  if (tokens.length === 1) {
    return instead?.startsWith(" ") ? (
      <>One token; so is {offer}, as a word after a space.</>
    ) : (
      <>One token.</>
    );
  }
  const parts = tokens.map((token) => visible(token.text ?? "")).join(" │ ");
  return (
    <>
      “{visible(text)}” is {tokens.length} tokens, <span class="token">{parts}</span>, but a{" "}
      {SIDES[side].one} is exactly one
      {offer ? <>; {offer} is.</> : "."}
    </>
  );
}

/** The model's own next tokens for the prompt in the field, asked for when a list first opens. */
function useLikely(open: boolean): { text: string; probability: number }[] {
  const { prompt } = draft.value;
  const id = currentModel();
  const { value } = useLatest(open && prompt !== "" && id ? `${id}\0${prompt}` : null, (signal) =>
    run({ model: id, run: { prompt: { text: prompt } }, topK: 12 }, { signal }),
  );
  return (value?.nextTokens?.at(-1)?.top ?? [])
    .map(({ token, probability }) => ({
      text: token?.text ?? "",
      probability: num(probability) ?? 0,
    }))
    .filter(({ text }) => text !== "" && !text.includes("\ufffd"));
}
