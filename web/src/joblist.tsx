/** The jobs: how far each is, what it has cost and will, and ways to pause, resume and end it. */
import { useEffect, useState } from "preact/hooks";
import { BudgetField, readBudget } from "./budgetfield";
import { Confirm } from "./confirm";
import { When } from "./explanationcard";
import { capabilities } from "./explanations";
import type { ExplainManyRequestJson } from "./gen/tdb/explainer/v1/explain_pb";
import type { JobJson } from "./gen/tdb/explainer/v1/job_pb";
import {
  cancel,
  costWords,
  dealtWith,
  isActive,
  isResumable,
  jobs,
  jobsProblem,
  outcomeWords,
  pause,
  refreshJobs,
  resume,
  stateWords,
} from "./jobs";
import { count } from "./numbers";
import { problems } from "./problems";
import { methodName } from "./worth";

const AGAIN_MS = 3_000;

export function JobList() {
  const all = jobs.value;
  const active = all?.some(isActive) ?? false;
  useEffect(() => {
    void refreshJobs();
  }, []);
  useEffect(() => {
    if (!active && !jobsProblem.value?.retry) return;
    const timer = setInterval(() => !document.hidden && void refreshJobs(), AGAIN_MS);
    return () => clearInterval(timer);
  }, [active, jobsProblem.value]);
  return (
    <section class="jobs" aria-label="Jobs" aria-busy={all === null}>
      {jobsProblem.value && (
        <p class="error" role="alert">
          {jobsProblem.value.text}
        </p>
      )}
      {all === null && !jobsProblem.value && <p class="quiet-text">Looking for jobs…</p>}
      {all?.length === 0 && (
        <p class="quiet-text">
          No job yet. One explains many components by itself: the rows of a table, from the line
          above it, or a range of a dataset, below.
        </p>
      )}
      <ul>
        {all?.map((job) => (
          <Job key={job.id} job={job} />
        ))}
      </ul>
    </section>
  );
}

/** Which components a job is about; a list of jobs does not name those of a list. */
export function aboutWords({ list, range }: ExplainManyRequestJson, components: number): string {
  if (range) return `${range.first ?? ""} to ${range.last ?? ""}`;
  const [first = "", second] = list?.components ?? [];
  const n = list?.components?.length ?? 0;
  if (n === 1) return first;
  return n === 0
    ? count(components, "component")
    : `${first}, ${second ?? ""}${n > 2 ? ` and ${n - 2} more` : ""}`;
}

function Job({ job }: { job: JobJson }) {
  const { id = "", request = {}, components = 0, user = "" } = job;
  const [asking, setAsking] = useState<"resume" | "cancel" | null>(null);
  const [wrong, setWrong] = useState<string | null>(null);
  const act = (done: Promise<void>) => {
    setWrong(null);
    setAsking(null);
    done.catch((error: unknown) => setWrong(problems(error)[0]?.text ?? null));
  };
  const active = isActive(job);
  const bad = job.state === "JOB_STATE_FAILED" || job.state === "JOB_STATE_OUT_OF_BUDGET";
  const cost = costWords(job);
  const about = aboutWords(request, components);
  return (
    <li class="job" aria-label={`Job on ${about}`} data-state={job.state}>
      <p class="job-head">
        <strong>{methodName(request.method)}</strong>
        {request.range ? <code>{about}</code> : <span>{about}</span>}
        <span class="quiet-text">
          of {request.dataset}
          {user && `, by ${user}`}
        </span>
        <When ms={job.createdMs} />
        <span class="buttons">
          {active && (
            <button type="button" class="small" onClick={() => act(pause(id))}>
              pause
            </button>
          )}
          {isResumable(job) && (
            <button
              type="button"
              class="small"
              aria-expanded={asking === "resume"}
              onClick={() =>
                request.budget
                  ? setAsking((now) => (now === "resume" ? null : "resume"))
                  : act(resume(id, null))
              }
            >
              {request.budget ? "resume…" : "resume"}
            </button>
          )}
          {(active || isResumable(job)) && (
            <button type="button" class="small" onClick={() => setAsking("cancel")}>
              cancel
            </button>
          )}
        </span>
      </p>
      <p class="job-state">
        {active && (
          <progress
            aria-label={`Job on ${about}`}
            max={Math.max(1, components)}
            value={dealtWith(job)}
          />
        )}
        <span class={bad ? "error" : undefined} aria-live="polite">
          {stateWords(job)}
        </span>
        {dealtWith(job) > 0 && <span class="quiet-text">{outcomeWords(job)}</span>}
        {cost && <span>{cost}</span>}
      </p>
      {wrong && (
        <p class="error" role="alert">
          {wrong}
        </p>
      )}
      {asking === "resume" && (
        <Resume
          job={job}
          onNo={() => setAsking(null)}
          onYes={(budget) => act(resume(id, budget))}
        />
      )}
      {asking === "cancel" && (
        <Confirm
          title="End this job?"
          yes="End it"
          onNo={() => setAsking(null)}
          onYes={() => act(cancel(id))}
        >
          <p>
            {count(job.explained ?? 0, "explanation")} that it made stay
            {job.explained === 1 ? "s" : ""}. It cannot be resumed.
          </p>
        </Confirm>
      )}
    </li>
  );
}

interface ResumeProps {
  job: JobJson;
  onYes: (budget: NonNullable<ReturnType<typeof readBudget>>) => void;
  onNo: () => void;
}

/** Going on costs: with whom and up to how much is said and can be changed. */
function Resume({ job, onYes, onNo }: ResumeProps) {
  const before = job.request?.budget;
  const inMoney = before?.maxCost !== undefined;
  const [text, setText] = useState(String((inMoney ? before.maxCost : before?.maxTokens) ?? ""));
  const budget = readBudget(text, inMoney);
  return (
    <form
      class="resume"
      onSubmit={(event) => {
        event.preventDefault();
        if (budget) onYes(budget);
      }}
    >
      <BudgetField text={text} inMoney={inMoney} onInput={setText} />
      <span class="quiet-text">
        in all, what is spent included
        {capabilities.value?.provider && `; ${capabilities.value.provider} is asked`}
      </span>
      <button type="submit" class="primary small" disabled={!budget}>
        resume
      </button>
      <button type="button" class="small" onClick={onNo}>
        not now
      </button>
    </form>
  );
}
