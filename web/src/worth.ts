/**
 * What an explanation says of itself: how it was made, and what it is worth, in a few words. Wherever a
 * text is shown, these words stand beside it.
 */
import { site } from "./address";
import type {
  ExplanationJson,
  MeasureJson,
  MethodJson,
  ScoreJson,
  ScorerJson,
} from "./gen/tdb/explainer/v1/explanation_pb";
import { count, full, num, withMinus } from "./numbers";

interface MethodFacts {
  name: string;
  /** What was done, after "it": for titles. */
  says: string;
  /** Whether a language model is asked. */
  asks: boolean;
  kinds: "tokens" | "heads" | "all";
}

/** Methods that can be asked for, the free one first. */
export const METHODS = {
  METHOD_TOKEN_PATTERN: {
    name: "token pattern",
    says: "Rules on tokens, learnt from the examples; asks nobody",
    asks: false,
    kinds: "all",
  },
  METHOD_CONTRASTIVE: {
    name: "contrastive",
    says: "A language model sees examples that activate the component, and near misses",
    asks: true,
    kinds: "tokens",
  },
  METHOD_MAX_ACTIVATION_SUMMARY: {
    name: "max-activation summary",
    says: "A language model sees the strongest examples, their strongest tokens marked",
    asks: true,
    kinds: "tokens",
  },
  METHOD_TOKEN_ACTIVATION_PAIRS: {
    name: "token-activation pairs",
    says: "A language model sees the strongest examples, each token with its activation 0 to 10",
    asks: true,
    kinds: "tokens",
  },
  METHOD_ATTENTION_HEAD: {
    name: "attention head",
    says: "A language model sees from where to where the head looks most",
    asks: true,
    kinds: "heads",
  },
  METHOD_OUTPUT_CENTRED: {
    name: "output-centred",
    says: "A language model sees the tokens that the component promotes and suppresses, and no example",
    asks: true,
    kinds: "all",
  },
} as const satisfies Partial<Record<MethodJson, MethodFacts>>;
export type MadeMethod = keyof typeof METHODS;
export const MADE_METHODS = Object.keys(METHODS) as MadeMethod[];

export function methodName(method: MethodJson | undefined): string {
  if (method === "METHOD_HUMAN") return "human";
  if (method === "METHOD_IMPORTED") return "imported";
  return METHODS[method as MadeMethod]?.name ?? "method not stated";
}

/** Whether the method is for components of this kind (`neuron`, `head`, `latent`). */
export function fits(method: MadeMethod, kind: string): boolean {
  const { kinds } = METHODS[method];
  return kinds === "all" || (kinds === "heads") === (kind === "head");
}

interface ScorerFacts {
  name: string;
  says: string;
  kinds: "tokens" | "heads" | "all";
}

export const SCORERS = {
  SCORER_DETECTION: {
    name: "detection",
    says: "Does this text activate the component?",
    kinds: "tokens",
  },
  SCORER_FUZZING: {
    name: "fuzzing",
    says: "Are these the tokens that fire?",
    kinds: "tokens",
  },
  SCORER_SIMULATION: {
    name: "simulation",
    says: "How strongly at each token?",
    kinds: "tokens",
  },
  SCORER_HEAD_PAIRS: {
    name: "head pairs",
    says: "Does the head look from here to there?",
    kinds: "heads",
  },
  SCORER_INTERVENTION: {
    name: "intervention",
    says: "Which of two texts was steered with the component?",
    kinds: "all",
  },
} as const satisfies Partial<Record<ScorerJson, ScorerFacts>>;
export type KnownScorer = keyof typeof SCORERS;

export function scorersOf(kind: string): KnownScorer[] {
  return (Object.keys(SCORERS) as KnownScorer[]).filter((scorer) => {
    const { kinds } = SCORERS[scorer];
    return kinds === "all" || (kinds === "heads") === (kind === "head");
  });
}

/** The scorer that an explanation is compared by. */
export function mainScorer(kind: string): KnownScorer {
  return kind === "head" ? "SCORER_HEAD_PAIRS" : "SCORER_DETECTION";
}

export function scorerName(scorer: ScorerJson | undefined): string {
  return SCORERS[scorer as KnownScorer]?.name ?? "published";
}

const MEASURES: Partial<Record<MeasureJson, { name: string; long: string }>> = {
  MEASURE_AUC: {
    name: "AUC",
    long: "AUC: the chance that a positive is graded above a negative",
  },
  MEASURE_BALANCED_ACCURACY: {
    name: "accuracy",
    long: "balanced accuracy: the mean of the shares of positives and of negatives judged right",
  },
  MEASURE_PEARSON: { name: "correlation", long: "Pearson correlation over all tokens" },
  MEASURE_EXPLAINED_VARIANCE: {
    name: "explained variance",
    long: "explained variance after calibration: 1 is perfect, 0 no better than the mean",
  },
  MEASURE_ACCURACY: { name: "accuracy", long: "share judged right" },
};

export function measureName({ measure, measureName = "" }: ScoreJson): string {
  return MEASURES[measure ?? "MEASURE_UNSPECIFIED"]?.name ?? (measureName || "published score");
}

export function measureMeaning(score: ScoreJson): string {
  const known = MEASURES[score.measure ?? "MEASURE_UNSPECIFIED"];
  return known?.long ?? "A number that others published";
}

/** Two decimals, with a true minus: scores are not known better. */
export function figure(x: number): string {
  return withMinus(x.toFixed(2));
}

const OFFLINE = "offline";
const ORDER: [ScorerJson | undefined, MeasureJson][] = [
  ["SCORER_DETECTION", "MEASURE_AUC"],
  ["SCORER_HEAD_PAIRS", "MEASURE_AUC"],
  [undefined, "MEASURE_PUBLISHED"],
  ["SCORER_FUZZING", "MEASURE_AUC"],
  ["SCORER_SIMULATION", "MEASURE_PEARSON"],
  ["SCORER_INTERVENTION", "MEASURE_ACCURACY"],
];

/** The one score that stands for the explanation: a language model's before the offline judge's. */
export function mainScore({ scores = [] }: ExplanationJson): ScoreJson | undefined {
  for (const [scorer, measure] of ORDER) {
    const own = scores.filter(
      (each) =>
        each.measure === measure &&
        (scorer === undefined || each.scorer === scorer) &&
        num(each.value) !== undefined,
    );
    const found = own.find(({ judge }) => judge !== OFFLINE) ?? own[0];
    if (found) return found;
  }
  return undefined;
}

/** `detection AUC 0.91`, `published score 0.42`. */
export function scoreWords(score: ScoreJson): string {
  const value = num(score.value);
  const what = measureName(score);
  const by = score.scorer && score.scorer !== "SCORER_UNSPECIFIED" ? score.scorer : undefined;
  const name = by && by !== "SCORER_DETECTION" ? `${scorerName(by)} ${what}` : what;
  return `${name} ${value === undefined ? "undefined" : figure(value)}`;
}

/** What a score is, in full: for titles. */
export function scoreTitle(score: ScoreJson): string {
  const { judge = "", n = 0 } = score;
  const [value, low, high, chance] = [score.value, score.low, score.high, score.chance].map(num);
  return [
    `${scorerName(score.scorer)}: ${measureMeaning(score)}${value === undefined ? "" : ` = ${full(value)}`}`,
    low === undefined || high === undefined
      ? ""
      : `95 % interval ${figure(low)} to ${figure(high)}`,
    n > 0 ? `over ${count(n, "item")}` : "",
    chance === undefined ? "" : `chance ${figure(chance)}`,
    judge === ""
      ? ""
      : judge === OFFLINE
        ? "judged offline, by the token pattern"
        : `judged by ${judge}`,
  ]
    .filter((part) => part !== "")
    .join("; ");
}

/** How it was made: `token pattern`, `human`, `imported, by gpt-4`. */
export function origin({ provenance = {} }: ExplanationJson): string {
  const { method, explainerModel = "" } = provenance;
  const name = methodName(method);
  if (method === "METHOD_IMPORTED" && explainerModel !== "") return `${name}, by ${explainerModel}`;
  if (method === "METHOD_HUMAN" && provenance.author) return `${name}, ${provenance.author}`;
  return name;
}

/** `token pattern · AUC 0.91`; what was never scored says so. */
export function label(explanation: ExplanationJson): string {
  const score = mainScore(explanation);
  return `${origin(explanation)} · ${score ? scoreWords(score) : "not scored"}`;
}

/** `2 server, 1 timeout`, or nothing. */
export function failureWords({ failures = [] }: ScoreJson): string {
  return failures
    .map(({ kind = "", count: times = 0 }) => `${times} ${kind.replaceAll("_", " ")}`)
    .join(", ");
}

/** The kind of a component: `neuron`, `head`, `latent`. */
export function kindOf(component: string): string {
  return site(component).kind;
}
