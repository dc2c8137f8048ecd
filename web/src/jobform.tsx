/** A job to be: how its components are explained and scored, what that may cost, and the budget. */
import { useState } from "preact/hooks";
import { readNumber } from "./actions";
import { BudgetField, readBudget } from "./budgetfield";
import { Confirm } from "./confirm";
import { CopyButtons } from "./copy";
import { estimateWords, money, tokenCount } from "./costs";
import { estimateCost } from "./explainer";
import {
  asksProvider,
  JudgeField,
  judgesOf,
  MethodChoice,
  ScorerChoice,
  scoringOf,
  type JudgeChoice,
} from "./explainform";
import { capabilities } from "./explanations";
import type {
  EstimateCostResponseJson,
  ExplainManyRequestJson,
} from "./gen/tdb/explainer/v1/explain_pb";
import { startJob } from "./jobs";
import { count, num } from "./numbers";
import { problems } from "./problems";
import { EstimateFacts, HowToConfigure } from "./spending";
import { useLatest } from "./tokenise";
import { kindOf, mainScorer, METHODS, scorersOf, type KnownScorer, type MadeMethod } from "./worth";

const PAUSE_MS = 300;

/** Which components: named one by one, or from one to another. */
export type About = Pick<ExplainManyRequestJson, "list" | "range">;

interface JobFormProps {
  dataset: string;
  about: About;
  onStarted: () => void;
}

/** The kinds of the components. */
function kindsOf({ list, range }: About): string[] {
  const named = list?.components ?? [range?.first ?? ""];
  return [...new Set(named.map(kindOf))];
}

export function JobForm({ dataset, about, onStarted }: JobFormProps) {
  const kinds = kindsOf(about);
  const [method, setMethod] = useState<MadeMethod>("METHOD_TOKEN_PATTERN");
  const [wantedScorers, setScorers] = useState<KnownScorer[] | null>(null);
  const [wantedJudge, setJudge] = useState<JudgeChoice | null>(null);
  const [again, setAgain] = useState(false);
  const [least, setLeast] = useState("");
  const [typed, setTyped] = useState<string | null>(null);
  const [asking, setAsking] = useState<EstimateCostResponseJson | null>(null);
  const [wrong, setWrong] = useState<string | null>(null);
  const [busy, setBusy] = useState(false);
  const offered = kinds.flatMap(scorersOf);
  const scorers = (wantedScorers ?? [...new Set(kinds.map(mainScorer))]).filter((each) =>
    offered.includes(each),
  );
  const judges = judgesOf(method);
  const judge = wantedJudge && judges.includes(wantedJudge) ? wantedJudge : judges[0];
  // A token pattern that is made anyway need not be made first.
  const gated = METHODS[method].asks && !kinds.includes("head");
  const minPatternAuc = least.trim() === "" ? null : readNumber(least);
  const badLeast =
    gated &&
    least.trim() !== "" &&
    (minPatternAuc === null || minPatternAuc < 0 || minPatternAuc > 1);
  const request: ExplainManyRequestJson = {
    dataset,
    ...about,
    method,
    ...scoringOf(scorers, judge),
    ...(again ? { again } : {}),
    ...(gated && minPatternAuc !== null ? { gate: { minPatternAuc } } : {}),
  };
  const asks = asksProvider(method, request.scoring);
  const inMoney = capabilities.value?.hasPrices ?? false;
  const key = JSON.stringify(request);
  const latest = useLatest(
    key,
    (signal) => estimateCost({ explainMany: request }, { signal, timeoutMs: 60_000 }),
    PAUSE_MS,
  );
  const estimate = latest.key === key && !latest.error ? latest.value : null;
  const refused = latest.key === key && latest.error ? problems(latest.error)[0]?.text : undefined;
  const text = typed ?? suggestion(estimate, inMoney);
  const budget = readBudget(text, inMoney);
  const start = async () => {
    setAsking(null);
    setBusy(true);
    setWrong(null);
    try {
      await startJob({ ...request, ...(asks && budget ? { budget } : {}) });
      onStarted();
    } catch (error) {
      setWrong(problems(error)[0]?.text ?? null);
      setBusy(false);
    }
  };
  return (
    <form
      class="job-fields"
      aria-label="New job"
      onSubmit={(event) => {
        event.preventDefault();
        if (asks && estimate) setAsking(estimate);
        else if (!asks) void start();
      }}
    >
      <MethodChoice kinds={kinds} value={method} onChoose={setMethod} />
      <span class="inline">
        scored by <ScorerChoice kinds={kinds} value={scorers} onChoose={setScorers} />
      </span>
      <JudgeField
        judges={judges}
        value={judge}
        disabled={scorers.length === 0}
        onChoose={setJudge}
      />
      <label title="Else those that have an explanation by this method and dataset are skipped">
        <input
          type="checkbox"
          checked={again}
          onChange={(event) => setAgain(event.currentTarget.checked)}
        />{" "}
        also those that have one
      </label>
      {gated && (
        <label title="A gate before anything is spent: the detection AUC that the offline token pattern must reach, from 0 to 1. What fails is skipped">
          only if a token pattern reaches AUC{" "}
          <input
            class="field number"
            type="text"
            inputMode="decimal"
            autocomplete="off"
            placeholder="any"
            aria-invalid={badLeast}
            value={least}
            onInput={(event) => setLeast(event.currentTarget.value)}
          />
        </label>
      )}
      {asks && <BudgetField text={text} inMoney={inMoney} onInput={setTyped} />}
      <p class="estimate" aria-live="polite">
        {refused ? (
          <span class="error" role="alert">
            {refused}
          </span>
        ) : estimate ? (
          <Estimate estimate={estimate} asks={asks} />
        ) : (
          <span class="quiet-text">estimating…</span>
        )}
      </p>
      <p class="quiet-text">{METHODS[method].says}.</p>
      <HowToConfigure />
      <p class="buttons">
        <button
          type="submit"
          class="primary small"
          disabled={
            busy || badLeast || (asks && (!estimate || !budget)) || (refused !== undefined && asks)
          }
        >
          {busy ? "starting…" : asks ? "start…" : "start"}
        </button>
        <CopyButtons method="ExplainMany" request={request} />
      </p>
      {wrong && (
        <p class="error" role="alert">
          {wrong}
        </p>
      )}
      {asking && budget && (
        <Confirm
          title={`Ask ${asking.provider ?? ""} about ${count(asking.components ?? 0, "component")}?`}
          yes={`Send to ${asking.provider ?? ""}`}
          onNo={() => setAsking(null)}
          onYes={() => void start()}
        >
          <EstimateFacts estimate={asking} budget={budgetWords(budget)} />
        </Confirm>
      )}
    </form>
  );
}

function budgetWords({ maxCost, maxTokens }: { maxCost?: unknown; maxTokens?: string }): string {
  return typeof maxCost === "number" ? money(maxCost) : tokenCount(Number(maxTokens ?? 0));
}

function Estimate({ estimate, asks }: { estimate: EstimateCostResponseJson; asks: boolean }) {
  const { components = 0, provider = "", providerModel = "", calls = 0 } = estimate;
  const of = count(components, "component");
  if (!asks || provider === "")
    return (
      <>
        {of}; nobody is asked, so it <strong>costs nothing</strong>.
      </>
    );
  return (
    <>
      {of}, {count(calls, "call")} to <strong>{provider}</strong> ({providerModel}):{" "}
      {estimateWords(estimate)}.
    </>
  );
}

/** A budget to begin with: what is expected, rounded up. */
export function suggestion(estimate: EstimateCostResponseJson | null, inMoney: boolean): string {
  if (!estimate) return "";
  if (!inMoney) return String(roundedUp(Number(estimate.expectedTokens ?? 0)) || "");
  const cost = num(estimate.expectedCost);
  return cost === undefined || cost === 0 ? "" : String(roundedUp(cost));
}

/** To two digits, never down. */
function roundedUp(x: number): number {
  if (x <= 0) return 0;
  const unit = 10 ** (Math.floor(Math.log10(x)) - 1);
  return Number((Math.ceil(x / unit - 1e-9) * unit).toPrecision(2));
}
