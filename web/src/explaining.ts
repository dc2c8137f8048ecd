/**
 * Explaining and scoring, as it goes: one run per component, which goes on while something else is looked
 * at, until it is done or cancelled.
 */
import { signal } from "@preact/signals";
import { chosen, listed } from "./datasets";
import { explain, score } from "./explainer";
import { forget, lookUp, refresh, refreshCapabilities } from "./explanations";
import type {
  ExplainRequestJson,
  ExplainResponseJson,
  ScoreRequestJson,
  ScoreResponseJson,
  UnscoredReasonJson,
  UsageJson,
} from "./gen/tdb/explainer/v1/explain_pb";
import type { ExplanationJson } from "./gen/tdb/explainer/v1/explanation_pb";
import { problems, type Problem } from "./problems";
import { model } from "./state";
import { kindOf, mainScorer } from "./worth";

export interface Run {
  /** Id of the explanation that is scored; empty while one is made. */
  scored: string;
  /** What is being done; empty at the end. */
  phase: string;
  /** The text so far, while a language model writes it. */
  text: string;
  usage: UsageJson | undefined;
  unscored: UnscoredReasonJson[];
  /** What the reader of the scores should know. */
  warnings: string[];
  problem: Problem | null;
  done: boolean;
  /** What was made, as it came. */
  explanation: ExplanationJson | null;
}

export const runs = signal<ReadonlyMap<string, Run>>(new Map());
const flights = new Map<string, AbortController>();

const START: Run = {
  scored: "",
  phase: "starting",
  text: "",
  usage: undefined,
  unscored: [],
  warnings: [],
  problem: null,
  done: false,
  explanation: null,
};

export function running(component: string): boolean {
  return runs.value.get(component)?.done === false;
}

export function cancelRun(component: string): void {
  flights.get(component)?.abort();
  dismiss(component);
}

/** Takes what is said of an ended run out of sight. */
export function dismiss(component: string): void {
  const rest = new Map(runs.value);
  rest.delete(component);
  runs.value = rest;
}

export function startExplain(request: ExplainRequestJson): Promise<void> {
  return follow(request.component ?? "", "", (signal) => explain(request, { signal }));
}

export function startScore(component: string, request: ScoreRequestJson): Promise<void> {
  return follow(component, request.id ?? "", (signal) => score(request, { signal }));
}

type Events = (
  signal: AbortSignal,
) => AsyncGenerator<ExplainResponseJson & ScoreResponseJson, void>;

async function follow(component: string, scored: string, ask: Events): Promise<void> {
  flights.get(component)?.abort();
  const own = new AbortController();
  flights.set(component, own);
  const amend = (change: Partial<Run>) => {
    if (own.signal.aborted) return;
    const now = runs.value.get(component) ?? START;
    runs.value = new Map(runs.value).set(component, { ...now, ...change });
  };
  amend({ ...START, scored });
  try {
    for await (const { progress, explanation, score: made, summary } of ask(own.signal)) {
      if (own.signal.aborted) return;
      const now = runs.value.get(component) ?? START;
      if (progress)
        amend({
          phase: progress.phase ?? "",
          text: progress.text || now.text,
          usage: progress.usage ?? now.usage,
        });
      if (explanation) {
        amend({ explanation, text: explanation.text ?? "" });
        void known(component);
      }
      if (made) void known(component);
      if (summary)
        amend({
          usage: summary.usage ?? now.usage,
          unscored: summary.unscored ?? [],
          warnings: summary.warnings ?? [],
        });
    }
    await known(component);
    void refreshCapabilities(); // it says how many explanations there are
    amend({ phase: "", done: true });
  } catch (error) {
    if (own.signal.aborted) return;
    amend({ phase: "", done: true, problem: problems(error)[0] ?? null });
  } finally {
    if (flights.get(component) === own) flights.delete(component);
    if (own.signal.aborted) void known(component); // what was stored before stays
  }
}

/** Asks anew for what there is; the run goes on whatever comes of it. */
async function known(component: string): Promise<void> {
  try {
    await refresh(component);
  } catch {
    forget([component]);
    void lookUp([component]);
  }
}

/** The dataset whose examples explain the component; null where none has it. */
export function datasetFor(component: string): string | null {
  const loaded = model.value;
  if (!loaded) return null;
  return chosen(listed.value?.datasets ?? [], component, loaded, null)?.name ?? null;
}

/** Explains with a token pattern and scores it at once: asks no language model, so it asks nothing first. */
export function explainOffline(component: string): void {
  const dataset = datasetFor(component);
  if (dataset === null || running(component)) return;
  void startExplain({
    dataset,
    component,
    method: "METHOD_TOKEN_PATTERN",
    scoring: { scorers: [mainScorer(kindOf(component))], judge: "JUDGE_OFFLINE" },
  });
}

const PHASES: Record<string, string> = {
  starting: "starting",
  reading: "reading the examples",
  explaining: "explaining",
};

/** What is being done, in words. */
export function phaseWords(phase: string): string {
  const scorer = phase
    .replace(/^scorer_/i, "")
    .replaceAll("_", " ")
    .toLowerCase();
  return PHASES[phase] ?? `scoring: ${scorer}`;
}
