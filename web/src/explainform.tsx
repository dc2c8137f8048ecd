/** How a component is to be explained: the method, what it is scored with, and who judges. */
import { useState } from "preact/hooks";
import { CopyButtons } from "./copy";
import { startExplain } from "./explaining";
import { capabilities } from "./explanations";
import type { ExplainRequestJson, JudgeJson, ScoringJson } from "./gen/tdb/explainer/v1/explain_pb";
import type { MethodJson } from "./gen/tdb/explainer/v1/explanation_pb";
import { HowToConfigure, useSpending } from "./spending";
import {
  fits,
  kindOf,
  MADE_METHODS,
  mainScorer,
  METHODS,
  SCORERS,
  scorersOf,
  type KnownScorer,
  type MadeMethod,
} from "./worth";

/** Why the method does not work here, or nothing if it does. */
export function whyNoMethod(method: MadeMethod, kinds: readonly string[]): string | undefined {
  const { name, asks, kinds: own } = METHODS[method];
  if (!kinds.some((kind) => fits(method, kind)))
    return own === "heads" ? `${name} is for heads` : `${name} is for neurons and latents`;
  const said = capabilities.value;
  if (said?.methods?.includes(method)) return undefined;
  return asks && !said?.provider ? "needs a language model" : "not in this deployment";
}

interface MethodProps {
  /** Kinds of the components; of a table's rows there can be several. */
  kinds: readonly string[];
  value: MadeMethod;
  onChoose: (method: MadeMethod) => void;
}

export function MethodChoice({ kinds, value, onChoose }: MethodProps) {
  return (
    <label>
      method{" "}
      <select
        value={value}
        title={METHODS[value].says}
        onChange={(event) => onChoose(event.currentTarget.value as MadeMethod)}
      >
        {MADE_METHODS.filter((method) => kinds.some((kind) => fits(method, kind))).map((method) => {
          const why = whyNoMethod(method, kinds);
          return (
            <option key={method} value={method} disabled={why !== undefined}>
              {METHODS[method].name}
              {why && ` (${why})`}
            </option>
          );
        })}
      </select>
    </label>
  );
}

interface ScorerProps {
  kinds: readonly string[];
  value: readonly KnownScorer[];
  onChoose: (scorers: KnownScorer[]) => void;
}

export function ScorerChoice({ kinds, value, onChoose }: ScorerProps) {
  const all = [...new Set(kinds.flatMap(scorersOf))];
  return (
    <span class="scorers" role="group" aria-label="Scores">
      {all.map((scorer) => (
        <label key={scorer} title={SCORERS[scorer].says}>
          <input
            type="checkbox"
            checked={value.includes(scorer)}
            onChange={(event) =>
              onChoose(
                all.filter((each) =>
                  each === scorer ? event.currentTarget.checked : value.includes(each),
                ),
              )
            }
          />{" "}
          {SCORERS[scorer].name}
        </label>
      ))}
    </span>
  );
}

export type JudgeChoice = Exclude<JudgeJson, "JUDGE_UNSPECIFIED">;

/** Who can judge what the method makes: only token patterns can be judged offline. */
export function judgesOf(method: MethodJson | undefined): JudgeChoice[] {
  const provider: JudgeChoice[] = capabilities.value?.provider ? ["JUDGE_PROVIDER"] : [];
  if (method === "METHOD_TOKEN_PATTERN") return ["JUDGE_OFFLINE", ...provider];
  // A person's or a publisher's text may be a token pattern; the service says so where it is none.
  const written = method === "METHOD_HUMAN" || method === "METHOD_IMPORTED";
  return written ? [...provider, "JUDGE_OFFLINE"] : provider;
}

export function judgeName(judge: JudgeChoice): string {
  if (judge === "JUDGE_OFFLINE") return "offline, as a token pattern";
  return capabilities.value?.providerModel || "the language model";
}

/** What closes a form by a key, and nothing else with it. */
export function onEscape(done: () => void) {
  return (event: KeyboardEvent) => {
    if (event.key !== "Escape") return;
    event.stopPropagation();
    done();
  };
}

interface JudgeProps {
  judges: readonly JudgeChoice[];
  value: JudgeChoice | undefined;
  disabled?: boolean;
  onChoose: (judge: JudgeChoice) => void;
}

export function JudgeField({ judges, value, disabled = false, onChoose }: JudgeProps) {
  return (
    <label>
      judged by{" "}
      <select
        value={value ?? ""}
        disabled={disabled || judges.length === 0}
        title="Who answers the scorers' questions. Scores of different judges are not comparable"
        onChange={(event) => onChoose(event.currentTarget.value as JudgeChoice)}
      >
        {judges.length === 0 && <option value="">nobody</option>}
        {judges.map((judge) => (
          <option key={judge} value={judge}>
            {judgeName(judge)}
          </option>
        ))}
      </select>
    </label>
  );
}

/** The scoring of a request; absent where nothing is scored. */
export function scoringOf(
  scorers: readonly KnownScorer[],
  judge: JudgeChoice | undefined,
): { scoring?: ScoringJson } {
  return scorers.length === 0 || judge === undefined
    ? {}
    : { scoring: { scorers: [...scorers], judge } };
}

/** Whether a language model would be asked. */
export function asksProvider(method: MadeMethod, scoring: ScoringJson | undefined): boolean {
  return METHODS[method].asks || scoring?.judge === "JUDGE_PROVIDER";
}

interface FormProps {
  component: string;
  dataset: string;
  onDone: () => void;
}

export function ExplainForm({ component, dataset, onDone }: FormProps) {
  const kind = kindOf(component);
  const [method, setMethod] = useState<MadeMethod>("METHOD_TOKEN_PATTERN");
  const [scorers, setScorers] = useState<KnownScorer[]>([mainScorer(kind)]);
  const [wantedJudge, setJudge] = useState<JudgeChoice | null>(null);
  const [seed, setSeed] = useState("0");
  const spending = useSpending();
  const judges = judgesOf(method);
  const judge = wantedJudge && judges.includes(wantedJudge) ? wantedJudge : judges[0];
  const badSeed = !/^\d{1,15}$/.test(seed.trim());
  const request: ExplainRequestJson = {
    dataset,
    component,
    method,
    ...scoringOf(scorers, judge),
    ...(seed.trim() === "0" || badSeed ? {} : { seed: seed.trim() }),
  };
  const start = (extra: Partial<ExplainRequestJson>) => {
    void startExplain({ ...request, ...extra });
    onDone();
  };
  return (
    <form
      class="explain-form"
      aria-label={`Explain ${component}`}
      onSubmit={(event) => {
        event.preventDefault();
        if (badSeed) return;
        if (!asksProvider(method, request.scoring)) start({});
        else spending.propose({ explain: request }, (budget) => start(budget ? { budget } : {}));
      }}
      onKeyDown={onEscape(onDone)}
    >
      <MethodChoice kinds={[kind]} value={method} onChoose={setMethod} />
      <label class="inline">
        scored by <ScorerChoice kinds={[kind]} value={scorers} onChoose={setScorers} />
      </label>
      <JudgeField
        judges={judges}
        value={judge}
        disabled={scorers.length === 0}
        onChoose={setJudge}
      />
      <label>
        seed{" "}
        <input
          class="field number"
          type="text"
          inputMode="numeric"
          autocomplete="off"
          title="What the examples are dealt out by: one half explains, the other scores"
          aria-invalid={badSeed}
          value={seed}
          onInput={(event) => setSeed(event.currentTarget.value)}
        />
      </label>
      <span class="quiet-text">
        from its examples in <code>{dataset}</code>
      </span>
      <span class="buttons">
        <button type="submit" class="primary small" disabled={spending.busy || badSeed}>
          {spending.busy
            ? "estimating…"
            : asksProvider(method, request.scoring)
              ? "explain…"
              : "explain"}
        </button>
        <button type="button" class="small" onClick={onDone}>
          close
        </button>
        <CopyButtons method="Explain" request={request} />
      </span>
      <p class="quiet-text says-method">
        {METHODS[method].says}.
        {badSeed && <span class="error"> The seed is a whole number from 0.</span>}
      </p>
      <HowToConfigure />
      {spending.problem && (
        <p class="error" role="alert">
          {spending.problem.text}
        </p>
      )}
      {spending.question}
    </form>
  );
}
