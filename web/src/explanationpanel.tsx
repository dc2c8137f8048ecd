/** What is said of a component: the best explanation, those before it, and ways to more. */
import { useEffect, useState } from "preact/hooks";
import { usageWords } from "./costs";
import { cancelRun, dismiss, explainOffline, phaseWords, runs } from "./explaining";
import { ExplainForm } from "./explainform";
import { ExplanationCard } from "./explanationcard";
import {
  absent,
  allOf,
  awayProblem,
  capabilities,
  refresh,
  refreshCapabilities,
} from "./explanations";
import { Late } from "./late";
import { count } from "./numbers";
import { problems, sentence, type Problem } from "./problems";
import { SCORERS, type KnownScorer } from "./worth";
import { Writing } from "./writing";

interface PanelProps {
  component: string;
  /** The dataset whose examples are used; null: none has any. */
  dataset: string | null;
}

export function ExplanationPanel({ component, dataset }: PanelProps) {
  const there = capabilities.value !== null;
  const [problem, setProblem] = useState<Problem | null>(null);
  const [tries, setTries] = useState(0);
  const [open, setOpen] = useState<"explain" | "write" | null>(null);
  useEffect(() => {
    if (!there) return;
    const own = new AbortController();
    setProblem(null);
    refresh(component, own.signal).catch((error: unknown) => {
      if (!own.signal.aborted) setProblem(problems(error)[0] ?? null);
    });
    return () => own.abort();
  }, [component, there, tries]);
  if (absent.value) return null;
  const all = allOf(component);
  const run = runs.value.get(component);
  const [best, ...others] = all ?? [];
  const history = [...others].sort((a, b) => Number(b.createdMs ?? 0) - Number(a.createdMs ?? 0));
  const close = () => setOpen(null);
  return (
    <section class="explanations" aria-label="Explanations" aria-busy={there && !all && !problem}>
      <header>
        <h2>what it does</h2>
        {there && (
          <>
            <button
              type="button"
              class="small"
              aria-expanded={open === "explain"}
              disabled={dataset === null || run?.done === false}
              title={
                dataset === null
                  ? "No dataset has examples of it, so there is nothing to explain it from"
                  : "Choose how, and what it is scored with"
              }
              onClick={() => setOpen((now) => (now === "explain" ? null : "explain"))}
            >
              explain…
            </button>
            <button
              type="button"
              class="small"
              aria-expanded={open === "write"}
              onClick={() => setOpen((now) => (now === "write" ? null : "write"))}
            >
              write one
            </button>
          </>
        )}
      </header>
      {open === "explain" && dataset !== null && (
        <ExplainForm component={component} dataset={dataset} onDone={close} />
      )}
      {open === "write" && <Writing component={component} onDone={close} />}
      {run && <RunProgress component={component} />}
      {problem ? (
        <Wrong problem={problem} onRetry={() => setTries((n) => n + 1)} />
      ) : !there ? (
        <Away />
      ) : !all ? (
        <Late>Looking for explanations…</Late>
      ) : best ? (
        <>
          <ExplanationCard key={best.id} explanation={best} dataset={dataset} best />
          {history.length > 0 && (
            <details class="history" open={history.length <= 2}>
              <summary>{count(history.length, "other explanation")}, newest first</summary>
              {history.map((each) => (
                <ExplanationCard key={each.id} explanation={each} dataset={dataset} best={false} />
              ))}
            </details>
          )}
        </>
      ) : (
        !run && (
          <p class="quiet-text">
            Nobody has explained it yet.{" "}
            {dataset !== null ? (
              <button type="button" class="link" onClick={() => explainOffline(component)}>
                Explain it with a token pattern
              </button>
            ) : (
              "Without examples in a dataset it can only be described by hand."
            )}
          </p>
        )
      )}
    </section>
  );
}

function Wrong({ problem, onRetry }: { problem: Problem; onRetry: () => void }) {
  return (
    <p class="error" role="alert">
      {problem.text}{" "}
      {problem.retry && (
        <button type="button" class="small" onClick={onRetry}>
          Try again
        </button>
      )}
    </p>
  );
}

function Away() {
  const problem = awayProblem.value;
  if (!problem) return <Late>Looking for explanations…</Late>;
  return (
    <p class="quiet-text">
      No explanations without the explainer service: {problem.text}{" "}
      <button type="button" class="small" onClick={() => void refreshCapabilities()}>
        Try again
      </button>
    </p>
  );
}

/** What is being made, as it comes; at the end what did not work out. */
function RunProgress({ component }: { component: string }) {
  const run = runs.value.get(component);
  if (!run) return null;
  const { done, phase, text, problem, unscored, warnings, explanation } = run;
  const used = usageWords(run.usage);
  if (done && !problem && unscored.length + warnings.length === 0 && used === "") return null;
  return (
    <div class="run-progress" role="group" aria-label="Explaining" aria-busy={!done}>
      <p>
        {!done && <progress aria-label={phaseWords(phase)} />}
        <span aria-live="polite">{done ? (problem ? "" : "Done.") : `${phaseWords(phase)}…`}</span>
        {used !== "" && <span class="quiet-text">{used}</span>}
        {done ? (
          <button type="button" class="link" onClick={() => dismiss(component)}>
            dismiss
          </button>
        ) : (
          <button type="button" class="small" onClick={() => cancelRun(component)}>
            cancel
          </button>
        )}
      </p>
      {text !== "" && !explanation && <p class="text writing-now">{text}</p>}
      {problem && (
        <p class="error" role="alert">
          {problem.text}
        </p>
      )}
      {warnings.map((warning) => (
        <p key={warning} class="quiet-text">
          {sentence(warning)}
        </p>
      ))}
      {unscored.map(({ scorer, message }, i) => (
        <p key={i} class="quiet-text">
          No {SCORERS[scorer as KnownScorer]?.name ?? ""} score: {sentence(message ?? "")}
        </p>
      ))}
    </div>
  );
}
