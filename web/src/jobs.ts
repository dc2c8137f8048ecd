/**
 * Jobs that explain many components. They belong to the service: they go on when the page is left, and
 * are found again by asking. The one at work is followed, so that rows fill in as they are explained.
 */
import { computed, effect, signal } from "@preact/signals";
import { ConnectError } from "./connect";
import { money, tokenCount } from "./costs";
import { duration } from "./builds";
import { cancelJob, explainMany, followJob, listJobs, pauseJob, resumeJob } from "./explainer";
import { capabilities, forget, lookUp, refreshCapabilities, renew } from "./explanations";
import type { BudgetJson, ExplainManyRequestJson } from "./gen/tdb/explainer/v1/explain_pb";
import type { FollowJobResponseJson, JobJson } from "./gen/tdb/explainer/v1/job_pb";
import { count, num, plain } from "./numbers";
import { problems, sentence, type Problem } from "./problems";
import { locked } from "./state";

/** As last heard, newest first; null while nothing has been heard. */
export const jobs = signal<JobJson[] | null>(null);
export const jobsProblem = signal<Problem | null>(null);

/** Whether the job goes on by itself. */
export function isActive({ state }: JobJson): boolean {
  return (
    state === "JOB_STATE_QUEUED" || state === "JOB_STATE_RUNNING" || state === "JOB_STATE_WAITING"
  );
}

/** Whether it can be gone on with. */
export function isResumable({ state }: JobJson): boolean {
  return (
    state === "JOB_STATE_PAUSED" ||
    state === "JOB_STATE_FAILED" ||
    state === "JOB_STATE_OUT_OF_BUDGET"
  );
}

export const activeJob = computed(() => {
  const active = (jobs.value ?? []).filter(isActive);
  return active.find(({ state }) => state === "JOB_STATE_RUNNING") ?? active.at(-1) ?? null;
});

/** Components dealt with, however. */
export function dealtWith({ explained = 0, skipped = 0, failed = 0 }: JobJson): number {
  return explained + skipped + failed;
}

/** How far it is, in words. */
export function stateWords(job: JobJson): string {
  const { state, components = 0, message = "" } = job;
  const far = `${dealtWith(job)} of ${count(components, "component")}`;
  switch (state) {
    case "JOB_STATE_QUEUED":
      return "waits for another job to end";
    case "JOB_STATE_WAITING":
      return `${far}; it waits: ${sentence(message)}`;
    case "JOB_STATE_PAUSED":
      return `paused at ${far}`;
    case "JOB_STATE_CANCELLED":
      return `cancelled at ${far}; what is done stays`;
    case "JOB_STATE_FAILED":
      return `failed at ${far}: ${sentence(message)}`;
    case "JOB_STATE_OUT_OF_BUDGET":
      return `stopped at ${far}: the budget does not allow the next call`;
    case "JOB_STATE_DONE":
      return `done: ${count(components, "component")}`;
    default: {
      const [rate, left] = [num(job.rate), num(job.secondsLeft)];
      const fast = rate === undefined ? "" : `, ${plain(rate)}/s`;
      return `${far}${fast}${left === undefined ? "" : `, ${duration(left)} left`}`;
    }
  }
}

/** `3 explained, 2 skipped (too few documents), 1 failed (timeout)`. */
export function outcomeWords(job: JobJson): string {
  const { explained = 0, skipped = 0, failed = 0, reasons = [] } = job;
  const why = reasons
    .map(
      ({ reason = "", count: times = 0 }) =>
        `${times} ${reason.toLowerCase().replaceAll("_", " ")}`,
    )
    .join(", ");
  const parts = [
    `${explained} explained`,
    ...(skipped > 0 ? [`${skipped} skipped`] : []),
    ...(failed > 0 ? [`${failed} failed`] : []),
  ].join(", ");
  return why === "" ? parts : `${parts} (${why})`;
}

/** What it has cost, what it may, and what it will by the look of it; empty where nothing is asked. */
export function costWords(job: JobJson): string {
  const { usage, request } = job;
  const budget = request?.budget;
  const tokens = Number(usage?.promptTokens ?? 0) + Number(usage?.completionTokens ?? 0);
  if (!budget && tokens === 0) return "";
  const [cost, most, forecast] = [usage?.cost, budget?.maxCost, job.forecastCost].map(num);
  if (cost !== undefined || most !== undefined)
    return [
      `${money(cost ?? 0)}${most === undefined ? "" : ` of at most ${money(most)}`}`,
      ...(forecast === undefined || !isActive(job)
        ? []
        : [`${money(forecast)} in all by forecast`]),
    ].join(", ");
  const [mostTokens, all] = [budget?.maxTokens, job.forecastTokens];
  return [
    `${tokenCount(tokens)}${mostTokens === undefined ? "" : ` of at most ${tokenCount(Number(mostTokens))}`}`,
    ...(all === undefined || !isActive(job)
      ? []
      : [`${tokenCount(Number(all))} in all by forecast`]),
  ].join(", ");
}

let flight: Promise<void> | null = null;

export function refreshJobs(): Promise<void> {
  flight ??= listJobs({}, { timeoutMs: 20_000 })
    .then(
      (found) => {
        jobs.value = found.jobs ?? [];
        jobsProblem.value = null;
      },
      (error: unknown) => {
        jobsProblem.value = problems(error)[0] ?? null;
      },
    )
    .finally(() => (flight = null));
  return flight;
}

/** Puts the job, as it is now, in its place. */
function put(job: JobJson): void {
  const now = jobs.value ?? [];
  jobs.value = now.some(({ id }) => id === job.id)
    ? now.map((each) => (each.id === job.id ? job : each))
    : [job, ...now];
}

const FILL_MS = 1_000;

/** Starts a job; resolves when the service has it, throws what it refuses. It goes on by itself. */
export async function startJob(request: ExplainManyRequestJson): Promise<void> {
  for await (const { progress, summary } of explainMany(request)) {
    const job = progress ?? summary;
    if (!job) continue;
    put(job);
    return;
  }
}

/** Takes what is said of a job until it ends; what was explained is looked up now and then. */
async function take(events: AsyncGenerator<FollowJobResponseJson, void>): Promise<void> {
  let came: string[] = [];
  let filled = Date.now();
  for await (const { progress, item, summary } of events) {
    const job = progress ?? summary;
    if (job) put(job);
    if (item?.explanationId) came.push(item.component ?? "");
    if (Date.now() - filled < FILL_MS) continue;
    forget(came);
    void lookUp(came);
    came = [];
    filled = Date.now();
  }
}

const followed = signal<string | null>(null);
const AGAIN_MS = 5_000;

async function follow(id: string): Promise<void> {
  followed.value = id;
  try {
    await take(followJob({ id }, { timeoutMs: 86_400_000 }));
  } catch (error) {
    // The list, asked for below, says whether there is anything wrong.
    if (!(error instanceof ConnectError)) throw error;
  } finally {
    renew(); // what was explained before anybody followed is news too
    void refreshCapabilities();
    await refreshJobs();
    // The same job once more: the stream broke off, and what broke it may still be there.
    if (activeJob.value?.id === id) await new Promise((done) => setTimeout(done, AGAIN_MS));
    followed.value = null;
  }
}

/** From now on: knows the jobs as soon as there is a service, and follows the one at work. */
export function followJobs(): void {
  effect(() => {
    if (capabilities.value && !locked.value && jobs.peek() === null) void refreshJobs();
  });
  effect(() => {
    const job = activeJob.value;
    if (job?.id && followed.value === null) void follow(job.id);
  });
}

async function change(ask: Promise<{ job?: JobJson }>): Promise<void> {
  const { job } = await ask;
  if (job) put(job);
}

export function pause(id: string): Promise<void> {
  return change(pauseJob({ id }));
}

export function resume(id: string, budget: BudgetJson | null): Promise<void> {
  return change(resumeJob({ id, ...(budget ? { budget } : {}) }));
}

export function cancel(id: string): Promise<void> {
  return change(cancelJob({ id }));
}
