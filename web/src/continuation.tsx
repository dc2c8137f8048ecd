/** The panel that continues the prompt: how, and what came of it with and without the interventions. */
import { useEffect, useState } from "preact/hooks";
import { readNumber } from "./actions";
import { CopyButtons } from "./copy";
import { whyNot } from "./features";
import type { ContinuationJson, GeneratedTokenJson } from "./gen/tdb/inference/v1/generate_pb";
import {
  cancelGeneration,
  continuePrompt,
  differing,
  generating,
  generation,
  outdated,
  sampling,
  waiting,
  wanted,
} from "./generating";
import { count, full, num, percent } from "./numbers";
import { asked, model, problemsAt } from "./state";
import { visible } from "./tokens";
import { writeAddress } from "./view";

export function Continuation() {
  const why = whyNot("generate");
  const wrong = problemsAt("generate")[0]?.text;
  const now = generation.value;
  const request = wanted.value;
  return (
    <section class="card continuation" aria-label="Continuation">
      <form
        class="settings"
        onSubmit={(event) => {
          event.preventDefault();
          void continuePrompt();
        }}
      >
        <h2>Continue the prompt</h2>
        <Setting name="tokens" title="Tokens generated at most" />
        <Setting
          name="temperature"
          title="Divides the logits before sampling; 0 takes the likeliest token each time"
        />
        <Setting
          name="seed"
          title="The same seed draws the same tokens; empty: a fresh one, named afterwards"
        />
        {model.value?.tokenizer?.eosId !== undefined && <PastEnd />}
        {generating.value ? (
          <button type="button" class="small" onClick={cancelGeneration}>
            cancel
          </button>
        ) : (
          <button
            type="submit"
            class="small"
            disabled={why !== undefined || !asked.value}
            title={why ?? "Generate token by token under the present interventions (g)"}
          >
            generate
          </button>
        )}
        {wrong ? (
          <span class="error" role="alert">
            {wrong}
          </span>
        ) : (
          <span class="quiet-text" aria-live="polite">
            {says()}
          </span>
        )}
        {request && !why && <CopyButtons method="Generate" request={request} />}
      </form>
      {now && (
        <div class="branches" data-outdated={outdated.value ? "" : undefined}>
          <Branch branch="edited" name={now.request.twin ? "with the interventions" : ""} />
          {now.request.twin && <Branch branch="twin" name="without them" />}
        </div>
      )}
    </section>
  );
}

function says(): string {
  const now = generation.value;
  if (!now) return "";
  const most = now.request.maxNewTokens ?? 0;
  if (generating.value) {
    const done = `${now.tokens.edited.length} of ${count(most, "token")}`;
    return waiting.value ? `${done} · ${waiting.value}` : done;
  }
  if (outdated.value) return "of an earlier run";
  return now.seed === undefined || !now.request.temperature ? "" : `seed ${now.seed}`;
}

const NUMBERS = {
  tokens: { wide: 5, valid: (x: number) => Number.isInteger(x) && x >= 1 },
  temperature: { wide: 4, valid: (x: number) => x >= 0 },
  seed: { wide: 8, valid: (x: number) => Number.isInteger(x) && x >= 0 && x < 2 ** 31 },
} as const;

function Setting({ name, title }: { name: "tokens" | "temperature" | "seed"; title: string }) {
  const value = sampling.value[name];
  const { wide, valid } = NUMBERS[name];
  const idle = name === "seed" && sampling.value.temperature === 0;
  const [text, setText] = useState(value === null ? "" : String(value));
  const read = (written: string): number | null | undefined => {
    if (name === "seed" && written.trim() === "") return null;
    const x = readNumber(written);
    return x !== null && valid(x) ? x : undefined;
  };
  useEffect(() => {
    if (read(text) !== value) setText(value === null ? "" : String(value));
  }, [value]);
  return (
    <label title={idle ? "At temperature 0 nothing is drawn" : title}>
      {name}{" "}
      <input
        type="text"
        inputMode="decimal"
        autocomplete="off"
        size={wide}
        disabled={idle}
        placeholder={name === "seed" ? "fresh" : undefined}
        value={text}
        aria-invalid={read(text) === undefined}
        onInput={(event) => {
          setText(event.currentTarget.value);
          const x = read(event.currentTarget.value);
          if (x !== undefined) sampling.value = { ...sampling.value, [name]: x };
        }}
        onBlur={() => {
          setText(value === null ? "" : String(value));
          writeAddress();
        }}
      />
    </label>
  );
}

function PastEnd() {
  return (
    <label title="Go on after the end-of-sequence token instead of stopping there">
      <input
        type="checkbox"
        checked={sampling.value.pastEnd}
        onChange={(event) => {
          sampling.value = { ...sampling.value, pastEnd: event.currentTarget.checked };
          writeAddress();
        }}
      />{" "}
      past the end
    </label>
  );
}

const REASONS: Partial<Record<NonNullable<ContinuationJson["finishReason"]>, string>> = {
  FINISH_REASON_STOP_TOKEN: "ended by the end-of-sequence token",
  FINISH_REASON_STOP_TEXT: "ended by a stop text",
};

function Branch({ branch, name }: { branch: "edited" | "twin"; name: string }) {
  const now = generation.value;
  if (!now) return null;
  const own = now.tokens[branch];
  const other = now.tokens[branch === "edited" ? "twin" : "edited"];
  const differs = differing(own, other);
  const ending = now.endings?.find(
    (each) => each.branch === (branch === "edited" ? "BRANCH_EDITED" : "BRANCH_TWIN"),
  );
  const reason = REASONS[ending?.finishReason ?? "FINISH_REASON_UNSPECIFIED"];
  return (
    <div class="branch" data-branch={branch}>
      {name && <h3>{name}</h3>}
      <p class="generated" tabIndex={0} role="region" aria-label={`Continuation ${name}`.trim()}>
        {own.map((token, i) => (
          <span
            key={i}
            class={differs[i] ? "token differs" : "token"}
            title={told(token, differs[i] ?? false)}
          >
            {token.token?.text === "" ? `<${token.token.id ?? 0}>` : token.token?.text}
          </span>
        ))}
        {reason && <small class="quiet-text"> {reason}</small>}
      </p>
    </div>
  );
}

/** The token's place, its probability, and what else was likely there. */
function told({ position, token, logProb, top }: GeneratedTokenJson, differs: boolean): string {
  const p = (x: number | string | undefined) => percent(Math.exp(num(x) ?? 0));
  const others = (top ?? []).map(({ token, score }) => `${visible(token?.text ?? "")} ${p(score)}`);
  return [
    `token ${position ?? 0}, ${visible(token?.text ?? "")}, id ${token?.id ?? 0}`,
    `probability ${p(logProb)}, log ${full(num(logProb) ?? 0)}`,
    ...(others.length > 0 ? [`likely here: ${others.join(", ")}`] : []),
    ...(differs ? ["differs from the other continuation"] : []),
  ].join("\n");
}
