/**
 * Before a language model is asked: who is asked, and what it may cost. Nothing is sent until that was
 * agreed to, and what was agreed to becomes the call's budget.
 */
import { useRef, useState } from "preact/hooks";
import { Confirm } from "./confirm";
import { budgetOf, estimateWords } from "./costs";
import { estimateCost } from "./explainer";
import { capabilities } from "./explanations";
import type {
  BudgetJson,
  EstimateCostRequestJson,
  EstimateCostResponseJson,
} from "./gen/tdb/explainer/v1/explain_pb";
import { count } from "./numbers";
import { problems, sentence, type Problem } from "./problems";

interface Asked {
  estimate: EstimateCostResponseJson;
  start: (budget: BudgetJson | null) => void;
}

export interface Spending {
  /** Estimates the call; starts it at once if nobody is asked, else once it was agreed to. */
  propose: (call: EstimateCostRequestJson, start: (budget: BudgetJson | null) => void) => void;
  busy: boolean;
  problem: Problem | null;
  /** The question itself, while it is asked; to be drawn. */
  question: preact.ComponentChild;
}

/** `sends` says what is sent, where that is not what explaining sends. */
export function useSpending(sends?: string): Spending {
  const [busy, setBusy] = useState(false);
  const [problem, setProblem] = useState<Problem | null>(null);
  const [asked, setAsked] = useState<Asked | null>(null);
  const flight = useRef<AbortController | null>(null);
  const propose: Spending["propose"] = (call, start) => {
    flight.current?.abort();
    const own = (flight.current = new AbortController());
    setBusy(true);
    setProblem(null);
    estimateCost(call, { signal: own.signal })
      .then(
        (estimate) => {
          if (own.signal.aborted) return;
          if (estimate.provider) setAsked({ estimate, start });
          else start(null);
        },
        (error: unknown) => own.signal.aborted || setProblem(problems(error)[0] ?? null),
      )
      .finally(() => own.signal.aborted || setBusy(false));
  };
  const question = asked && (
    <Confirm
      title={`Ask ${asked.estimate.provider}?`}
      yes={`Send to ${asked.estimate.provider}`}
      onNo={() => setAsked(null)}
      onYes={() => {
        setAsked(null);
        asked.start(budgetOf(asked.estimate));
      }}
    >
      <EstimateFacts estimate={asked.estimate} sends={sends} />
    </Confirm>
  );
  return { propose, busy, problem, question };
}

interface FactsProps {
  estimate: EstimateCostResponseJson;
  /** What is sent, where that is not what explaining sends. */
  sends?: string | undefined;
  /** What may be spent, where that is not the most that it can cost. */
  budget?: string;
}

export function EstimateFacts({ estimate, sends, budget }: FactsProps) {
  const { provider = "", providerModel = "", calls = 0 } = estimate;
  return (
    <dl class="facts-list">
      <dt>who is asked</dt>
      <dd>
        <strong>{provider}</strong>, {providerModel}
      </dd>
      <dt>what is sent</dt>
      <dd>
        {sends ?? "examples of the corpus and the explanations made of them"}, in{" "}
        {count(calls, "call")}
      </dd>
      <dt>what it costs</dt>
      <dd>
        {estimateWords(estimate)}. No more than {budget ?? "that"} is spent.
      </dd>
    </dl>
  );
}

/** How a language model is configured, where none is. */
export function HowToConfigure() {
  const said = capabilities.value;
  if (!said || said.provider) return null;
  return (
    <p class="quiet-text how">
      {sentence(said.howToConfigure || "No language model is configured")}
    </p>
  );
}
