/** One explanation in full: its text, where it came from, what it is worth, and what can be done with it. */
import { useState } from "preact/hooks";
import { Confirm } from "./confirm";
import { deleteExplanation } from "./explainer";
import { running, startScore } from "./explaining";
import {
  JudgeField,
  judgesOf,
  onEscape,
  ScorerChoice,
  scoringOf,
  type JudgeChoice,
} from "./explainform";
import { allOf, refresh, refreshCapabilities } from "./explanations";
import { Label } from "./explanationcell";
import type { ExplanationJson } from "./gen/tdb/explainer/v1/explanation_pb";
import type { ScoreRequestJson } from "./gen/tdb/explainer/v1/explain_pb";
import { count } from "./numbers";
import { problems } from "./problems";
import { Rating } from "./rating";
import { Scores } from "./scores";
import { HowToConfigure, useSpending } from "./spending";
import { kindOf, mainScorer, methodName, origin, type KnownScorer } from "./worth";
import { Writing } from "./writing";

interface CardProps {
  explanation: ExplanationJson;
  /** The dataset whose examples it would be scored with; null: none has any. */
  dataset: string | null;
  best: boolean;
}

export function ExplanationCard({ explanation, dataset, best }: CardProps) {
  const { component = "", text = "", scores = [] } = explanation;
  const [open, setOpen] = useState<"edit" | "score" | "delete" | null>(null);
  const toggle = (what: "edit" | "score") => setOpen((now) => (now === what ? null : what));
  const close = () => setOpen(null);
  return (
    <article
      id={anchor(explanation)}
      class={best ? "explanation best" : "explanation"}
      aria-label={`Explanation, ${origin(explanation)}`}
      tabIndex={-1}
    >
      <div class="words">
        <p class="text">{text}</p>
        <p class="from">
          <Label explanation={explanation} />
          <BasedOn explanation={explanation} />
          <When ms={explanation.createdMs} />
        </p>
        <p class="buttons">
          <button
            type="button"
            class="small"
            aria-expanded={open === "score"}
            disabled={dataset === null || running(component)}
            title={
              dataset === null
                ? `No dataset has examples of ${component}`
                : "Ask what it is worth, on examples that its explainer did not see"
            }
            onClick={() => toggle("score")}
          >
            score
          </button>
          <button
            type="button"
            class="small"
            aria-expanded={open === "edit"}
            onClick={() => toggle("edit")}
          >
            edit
          </button>
          <button type="button" class="small" onClick={() => setOpen("delete")}>
            delete
          </button>
          <Rating explanation={explanation} />
        </p>
        {open === "edit" && <Writing component={component} of={explanation} onDone={close} />}
        {open === "score" && dataset !== null && (
          <ScoreForm explanation={explanation} dataset={dataset} onDone={close} />
        )}
        {open === "delete" && <Delete explanation={explanation} onDone={close} />}
      </div>
      <div class="worth">
        <Scores scores={scores} />
        <ProvenanceFacts explanation={explanation} />
      </div>
    </article>
  );
}

function anchor({ id = "" }: ExplanationJson): string {
  return `explanation-${id}`;
}

/** What an edit was made from: a way to it, or word that it is gone. */
function BasedOn({ explanation }: { explanation: ExplanationJson }) {
  const id = explanation.provenance?.basedOn;
  if (!id) return null;
  const before = allOf(explanation.component ?? "")?.find((each) => each.id === id);
  if (!before) return <span class="quiet-text">an edit of one that was deleted</span>;
  return (
    <button
      type="button"
      class="link"
      title={before.text}
      onClick={() => {
        const found = document.getElementById(anchor(before));
        found?.closest("details")?.setAttribute("open", "");
        found?.scrollIntoView({ block: "nearest" });
        found?.focus();
      }}
    >
      an edit of “{cut(before.text ?? "")}” ({methodName(before.provenance?.method)})
    </button>
  );
}

function cut(text: string): string {
  return text.length > 48 ? `${text.slice(0, 46).trimEnd()}…` : text;
}

const DATES = new Intl.DateTimeFormat("en-GB", {
  day: "numeric",
  month: "short",
  year: "numeric",
  hour: "2-digit",
  minute: "2-digit",
});

export function When({ ms }: { ms: string | undefined }) {
  if (ms === undefined) return null;
  const date = new Date(Number(ms));
  return (
    <time class="quiet-text" dateTime={date.toISOString()} title={date.toISOString()}>
      {DATES.format(date)}
    </time>
  );
}

/** Everything that was kept about where the text came from. */
function ProvenanceFacts({ explanation }: { explanation: ExplanationJson }) {
  const { id = "", provenance = {}, model } = explanation;
  const { seed, documents = 0, datasetHash = "", promptHash = "", basedOn = "" } = provenance;
  const rows: [string, string | undefined, (string | undefined)?][] = [
    ["method", methodName(provenance.method)],
    ["language model", provenance.explainerModel],
    ["asked at", provenance.provider],
    ["dataset", provenance.dataset, datasetHash && `manifest ${datasetHash}`],
    ["documents", documents > 0 ? `${documents} seen, and used by no score` : undefined],
    ["seed", seed === undefined ? undefined : String(seed)],
    ["author", provenance.author],
    ["made with", provenance.codeVersion ? `version ${provenance.codeVersion}` : undefined],
    ["question", promptHash ? `${promptHash.slice(0, 12)}…` : undefined, promptHash],
    [
      "model",
      model?.weightsHash ? `${model.id ?? ""}, these weights` : `${model?.id ?? ""}, any weights`,
      model?.weightsHash,
    ],
    ["edit of", basedOn === "" ? undefined : basedOn],
    ["id", id],
  ];
  return (
    <details class="provenance-facts">
      <summary>where it came from</summary>
      <dl class="facts-list">
        {rows
          .filter(([, value]) => value)
          .map(([name, value, title]) => (
            <div key={name}>
              <dt>{name}</dt>
              <dd title={title || undefined}>{value}</dd>
            </div>
          ))}
      </dl>
    </details>
  );
}

interface ScoreFormProps {
  explanation: ExplanationJson;
  dataset: string;
  onDone: () => void;
}

function ScoreForm({ explanation, dataset, onDone }: ScoreFormProps) {
  const { id = "", component = "", provenance } = explanation;
  const kind = kindOf(component);
  const judges = judgesOf(provenance?.method);
  const [scorers, setScorers] = useState<KnownScorer[]>([mainScorer(kind)]);
  const [wanted, setJudge] = useState<JudgeChoice | null>(null);
  const judge = wanted ?? judges[0];
  const spending = useSpending();
  const { scoring } = scoringOf(scorers, judge);
  const request: ScoreRequestJson | null = scoring ? { id, dataset, scoring } : null;
  const start = (extra: Partial<ScoreRequestJson>) => {
    if (request) void startScore(component, { ...request, ...extra });
    onDone();
  };
  return (
    <form
      class="explain-form"
      aria-label="Score this explanation"
      onSubmit={(event) => {
        event.preventDefault();
        if (!request) return;
        if (judge === "JUDGE_OFFLINE") start({});
        else spending.propose({ score: request }, (budget) => start(budget ? { budget } : {}));
      }}
      onKeyDown={onEscape(onDone)}
    >
      <ScorerChoice kinds={[kind]} value={scorers} onChoose={setScorers} />
      <JudgeField judges={judges} value={judge} onChoose={setJudge} />
      <span class="quiet-text">
        on other examples of <code>{dataset}</code>
      </span>
      <span class="buttons">
        <button type="submit" class="primary small" disabled={!request || spending.busy}>
          {spending.busy ? "estimating…" : judge === "JUDGE_PROVIDER" ? "score…" : "score"}
        </button>
        <button type="button" class="small" onClick={onDone}>
          close
        </button>
      </span>
      {judges.length === 0 && <p class="quiet-text">Only a language model can judge this text.</p>}
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

function Delete({ explanation, onDone }: { explanation: ExplanationJson; onDone: () => void }) {
  const { id = "", component = "", text = "", scores = [], ratings } = explanation;
  const [wrong, setWrong] = useState<string | null>(null);
  const raters = ratings?.count ?? 0;
  const remove = async () => {
    try {
      await deleteExplanation({ id });
      void refreshCapabilities();
      await refresh(component);
    } catch (error) {
      setWrong(problems(error)[0]?.text ?? null);
      return;
    }
    onDone();
  };
  return (
    <Confirm
      title="Delete this explanation?"
      yes="Delete"
      onYes={() => void remove()}
      onNo={onDone}
    >
      <p class="text">{text}</p>
      <p>
        It goes for everyone, with its {count(scores.length, "score")} and {count(raters, "rating")}
        , and cannot be brought back.
      </p>
      {wrong && (
        <p class="error" role="alert">
          {wrong}
        </p>
      )}
    </Confirm>
  );
}
