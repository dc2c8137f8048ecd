/** From a question to the requests that answer it. */
import type {
  AttributeRequestJson,
  AttributeResponseJson,
} from "./gen/tdb/inference/v1/attribute_pb";
import type { GenerateRequestJson } from "./gen/tdb/inference/v1/generate_pb";
import type { InterventionJson, RunJson } from "./gen/tdb/inference/v1/intervention_pb";
import type { RunRequestJson } from "./gen/tdb/inference/v1/run_pb";
import type { TokenRefJson } from "./gen/tdb/type/v1/token_pb";
import type { VerifyRequestJson } from "./gen/tdb/inference/v1/verify_pb";
import type { Sampling } from "./sampling";
import { traced } from "./trace";
import { beside, column, type Question } from "./url";

/** Tokens asked for per read-out. */
const READ_OUT_TOKENS = 6;
/** Of more rows than this the service makes no read-outs. */
const READ_OUT_ROWS = 1_000;
/** Tokens told that a latent of an attention dictionary reads from. */
const SOURCES = 5;
/** Likely tokens told beside each generated one. */
const ALTERNATIVES = 4;

/**
 * The node table. With interventions the un-intervened run is compared, so that every number has a
 * before and an after, or prompt B if that is what the run stands beside; without either there is one run
 * and nothing to compare. Read-outs, and the sources of attention latents, are asked for where the service
 * can make them.
 */
export function attributeRequest(
  question: Question,
  readOuts: boolean,
  sources = false,
): AttributeRequestJson {
  const { model, prompt, targets, distractors, interventions, trace, dictionaries } = question;
  const other = compared(question);
  const refs = (texts: string[]): TokenRefJson[] => texts.map((text) => ({ text }));
  return {
    ...(model ? { model } : {}),
    run: edited(prompt, interventions),
    ...(other === null ? {} : { compare: { prompt: { text: other } } }),
    objective: traced(
      { logitDiff: { targets: refs(targets), distractors: refs(distractors) } },
      trace,
    ),
    ...(dictionaries.length > 0 ? { dictionaries } : {}),
    topK: question.rows,
    rankBy: column(question.rankBy),
    ...(readOuts && question.rows <= READ_OUT_ROWS
      ? {
          readOuts: {
            tokens: READ_OUT_TOKENS,
            ...(sources && dictionaries.length > 0 ? { sources: SOURCES } : {}),
          },
        }
      : {}),
  };
}

/**
 * Next tokens with exact logits and probabilities for the named ids, and as many of the likeliest; of the
 * compared run if `base`.
 */
export function predictionRequest(
  question: Question,
  ids: number[],
  base: boolean,
  likeliest = 1,
): RunRequestJson {
  const { model, prompt, interventions } = question;
  return {
    ...(model ? { model } : {}),
    run: base ? { prompt: { text: compared(question) ?? prompt } } : edited(prompt, interventions),
    tokens: ids.map((id) => ({ id })),
    topK: likeliest,
  };
}

/** The prompt of the run beside, which has no edits; null where there is none. */
function compared(question: Question): string | null {
  const what = beside(question);
  return what === null ? null : what === "b" ? question.compare : question.prompt;
}

function edited(prompt: string, interventions: InterventionJson[]): RunJson {
  return { prompt: { text: prompt }, ...(interventions.length > 0 ? { interventions } : {}) };
}

/** The logit lens of the edited run at one position, with the targets' and distractors' logits. */
export function lensRequest(question: Question, position: number, topK: number): RunRequestJson {
  const { model, prompt, targets, distractors, interventions } = question;
  return {
    ...(model ? { model } : {}),
    run: edited(prompt, interventions),
    positions: { list: { positions: [position] } },
    topK,
    tokens: [...targets, ...distractors].map((text) => ({ text })),
    logitLens: {},
  };
}

/** Exact effects of these nodes on the question's objective, in its own run. */
export function verifyRequest(question: Question, nodes: string[]): VerifyRequestJson {
  const { compare, topK, rankBy, ...table } = attributeRequest(question, false);
  return { table, nodes };
}

/** A continuation under the question's interventions, with its twin where there are any. */
export function generateRequest(question: Question, how: Sampling): GenerateRequestJson {
  const { model, prompt, interventions } = question;
  const { tokens, temperature, seed, pastEnd } = how;
  return {
    ...(model ? { model } : {}),
    run: edited(prompt, interventions),
    maxNewTokens: tokens,
    ...(temperature > 0 ? { temperature, ...(seed === null ? {} : { seed }) } : {}),
    ...(interventions.length > 0 ? { twin: true } : {}),
    ...(pastEnd ? { pastEnd } : {}),
    topLogProbs: ALTERNATIVES,
  };
}

/** Ids of the likeliest next tokens of either run, once each. */
export function likelyIds(response: AttributeResponseJson): number[] {
  const scores = [...(response.topTokens ?? []), ...(response.compareTopTokens ?? [])];
  return [...new Set(scores.map(({ token }) => token?.id ?? 0))];
}
