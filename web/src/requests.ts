/** From a question to the requests that answer it. */
import type {
  AttributeRequestJson,
  AttributeResponseJson,
} from "./gen/tdb/inference/v1/attribute_pb";
import type { RunRequestJson } from "./gen/tdb/inference/v1/run_pb";
import type { TokenRefJson } from "./gen/tdb/type/v1/token_pb";
import { column, type Question } from "./url";

/** Tokens asked for per read-out. */
const READ_OUT_TOKENS = 6;

/**
 * The node table. With interventions the un-intervened run is compared, so that every number has a
 * before and an after; without, there is one run and nothing to compare. Read-outs are asked for where
 * the service can make them.
 */
export function attributeRequest(question: Question, readOuts: boolean): AttributeRequestJson {
  const { model, prompt, targets, distractors, interventions, rankBy, rows } = question;
  const untouched = { prompt: { text: prompt } };
  const refs = (texts: string[]): TokenRefJson[] => texts.map((text) => ({ text }));
  return {
    ...(model ? { model } : {}),
    run: interventions.length > 0 ? { ...untouched, interventions } : untouched,
    ...(interventions.length > 0 ? { compare: untouched } : {}),
    objective: { logitDiff: { targets: refs(targets), distractors: refs(distractors) } },
    topK: rows,
    rankBy: column(rankBy),
    ...(readOuts ? { readOuts: { tokens: READ_OUT_TOKENS } } : {}),
  };
}

/** Next tokens with exact logits and probabilities for the named ids; of the untouched run if `base`. */
export function predictionRequest(
  question: Question,
  ids: number[],
  base: boolean,
): RunRequestJson {
  const { model, prompt, interventions } = question;
  const edited = !base && interventions.length > 0;
  return {
    ...(model ? { model } : {}),
    run: { prompt: { text: prompt }, ...(edited ? { interventions } : {}) },
    tokens: ids.map((id) => ({ id })),
    topK: 1,
  };
}

/** Ids of the likeliest next tokens of either run, once each. */
export function likelyIds(response: AttributeResponseJson): number[] {
  const scores = [...(response.topTokens ?? []), ...(response.compareTopTokens ?? [])];
  return [...new Set(scores.map(({ token }) => token?.id ?? 0))];
}
