/**
 * Asking: the only way from a question to an answer, and what the page's actions do with it.
 *
 * One question is in flight at a time; a newer one aborts it, so an old answer never covers a new one.
 * The table comes first; the next tokens' exact numbers follow, because which tokens are worth naming is
 * known only from the first answer.
 */
import { batch } from "@preact/signals";
import { bearer, ConnectError } from "./connect";
import type {
  AttributeRequestJson,
  AttributeResponseJson,
} from "./gen/tdb/inference/v1/attribute_pb";
import type { ExampleJson } from "./gen/tdb/inference/v1/model_pb";
import type { PredictionJson } from "./gen/tdb/inference/v1/run_pb";
import { supports } from "./features";
import { decodeFilters } from "./filters";
import { sampling } from "./generating";
import { attribute, getModel, listModels, run } from "./inference";
import { problems } from "./problems";
import { attributeRequest, likelyIds, predictionRequest } from "./requests";
import { decodeSampling } from "./sampling";
import * as state from "./state";
import { tokens } from "./tokenise";
import { beside, decode, decodeOpened, encode, hasLens, USUAL, type Question } from "./url";
import { cancelVerify, stillVerified } from "./verifying";
import { leavePlaces, writeAddress } from "./view";

const REMEMBERED = 50;
const RESTART_MS = 3_000;
const LIKELIEST = 10;
let flight = new AbortController();

/** Loads the model, then asks what the address asks, or the model's first example. */
export async function start(): Promise<void> {
  let question: Question | null = null;
  try {
    question = decode(location.hash);
    state.filters.value = decodeFilters(location.hash);
    sampling.value = decodeSampling(location.hash);
    state.lens.value = hasLens(location.hash);
    state.opened.value = decodeOpened(location.hash);
  } catch (error) {
    state.found.value = problems(error);
  }
  if (!(await loadModel(question?.model ?? ""))) {
    if (question?.model && !state.modelProblem.value?.retry) await fallBack(question);
    return;
  }
  const example = state.model.value?.examples?.[0];
  if (question) await open(question);
  else if (example && state.found.value.length === 0) await open(exampleQuestion(example));
}

/** A link to a model that is not served: its question stands in the fields, for the default model. */
async function fallBack(question: Question): Promise<void> {
  const problem = state.modelProblem.value;
  if (!problem || !(await loadModel(""))) return;
  fill(question);
  state.found.value = [problem];
}

/** Follows the address when a link inside the page, or the back button, changes it. */
export async function follow(): Promise<void> {
  try {
    state.opened.value = decodeOpened(location.hash);
    const question = decode(location.hash);
    if (question) {
      state.filters.value = decodeFilters(location.hash);
      sampling.value = decodeSampling(location.hash);
      state.lens.value = hasLens(location.hash);
    }
    if (!question || (state.asked.value && encode(state.asked.value) === encode(question))) return;
    if (question.model !== currentModel() && !(await loadModel(question.model))) return;
    await open(question);
  } catch (error) {
    state.found.value = problems(error);
  }
}

async function loadModel(id: string): Promise<boolean> {
  try {
    const [listed, facts] = await Promise.all([listModels({}), getModel(id ? { model: id } : {})]);
    batch(() => {
      state.models.value = listed.models ?? [];
      state.model.value = facts;
      state.modelProblem.value = null;
    });
    return true;
  } catch (error) {
    if (needsToken(error)) return false;
    const problem = problems(error)[0] ?? null;
    state.modelProblem.value = problem;
    if (problem?.retry && !state.model.value) setTimeout(restart, RESTART_MS);
    return false;
  }
}

/** A service that is still starting is waited for; whoever cannot wait has a button. */
function restart(): void {
  if (!state.model.value && !state.locked.value) void start();
}

export function currentModel(): string {
  return state.model.value?.model?.id ?? "";
}

export function exampleQuestion(example: ExampleJson): Question {
  return {
    model: currentModel(),
    prompt: example.prompt ?? "",
    targets: example.target ? [example.target] : [],
    distractors: example.distractor ? [example.distractor] : [],
    ...USUAL,
  };
}

/** The request for the question's table, with all read-outs that the service makes. */
export function tableRequest(question: Question): AttributeRequestJson {
  return attributeRequest(
    question,
    supports("attribute.read_outs"),
    supports("attribute.read_outs.sources"),
  );
}

/** Puts a whole question into the fields and asks it. */
export async function open(question: Question): Promise<void> {
  const named = { ...question, model: question.model || currentModel() };
  fill(named);
  await ask(named);
}

function fill({ prompt, targets, distractors, compare }: Question): void {
  state.draft.value = {
    prompt,
    targets,
    distractors,
    compare: compare === "" ? null : compare,
    pending: { targets: "", distractors: "" },
  };
}

/** Asks what stands in the fields; what is typed beside the chips becomes a chip if it is one token. */
export async function askDraft(): Promise<void> {
  for (const side of ["targets", "distractors"] as const) {
    if (!(await settle(side))) return;
  }
  const { prompt, targets, distractors, compare } = state.draft.value;
  const missing = [
    ...(prompt === ""
      ? [
          {
            place: "prompt",
            text: "Type a prompt: the model needs something to continue.",
          } as const,
        ]
      : []),
    ...(targets.length === 0
      ? [{ place: "target", text: "Name a target: the token whose logit is explained." } as const]
      : []),
  ];
  if (missing.length > 0) {
    state.found.value = missing.map((problem) => ({ ...problem, retry: false }));
    return;
  }
  if (prompt !== state.asked.value?.prompt) leavePlaces();
  await ask({
    ...USUAL,
    ...state.asked.value,
    model: currentModel(),
    prompt,
    targets,
    distractors,
    compare: compare ?? "",
  });
}

/** Turns the pending text of a side into a chip; false if it is not one token. */
export async function settle(side: state.Side): Promise<boolean> {
  const text = state.draft.value.pending[side];
  if (text === "") return true;
  try {
    if ((await tokens(currentModel(), text, { single: true })).length !== 1) return false;
  } catch (error) {
    if (!needsToken(error)) state.found.value = problems(error);
    return false;
  }
  addChoice(side, text);
  return true;
}

export function addChoice(side: state.Side, text: string): void {
  const { [side]: chosen, pending } = state.draft.value;
  state.editDraft({
    [side]: chosen.includes(text) ? chosen : [...chosen, text],
    pending: { ...pending, [side]: "" },
  });
}

/** Asks a question. Resolves when it is answered, refused, or overtaken by another. */
export async function ask(question: Question): Promise<void> {
  flight.abort();
  cancelVerify();
  const own = (flight = new AbortController());
  batch(() => {
    state.asked.value = question;
    state.loading.value = true;
    state.found.value = [];
    state.modelProblem.value = null;
  });
  writeAddress();
  try {
    const response = await attribute(tableRequest(question), {
      signal: own.signal,
    });
    if (own.signal.aborted) return;
    batch(() => {
      const before = state.answer.value;
      if (before && encode(before.question) !== encode(question))
        state.past.value = [...state.past.value, before].slice(-REMEMBERED);
      if (before?.question.prompt !== question.prompt) state.selected.value = null;
      if (!before || beside(before.question) !== beside(question)) state.sort.value = null;
      const outlooks = before && sameForward(before.question, question) ? before.outlooks : null;
      const verified = stillVerified(before, question);
      state.answer.value = { question, response, outlooks, verified, b: null };
    });
    void readB(question, response, own.signal);
    if (!state.answer.value?.outlooks) await look(question, own.signal);
  } catch (error) {
    if (own.signal.aborted) return;
    if (!needsToken(error)) state.found.value = problems(error);
  } finally {
    if (own === flight) state.loading.value = false;
  }
}

/** The tokens of prompt B, which say whether anything can be patched from it by position. */
async function readB(
  { model, compare }: Question,
  response: AttributeResponseJson,
  signal: AbortSignal,
): Promise<void> {
  if (compare === "") return;
  try {
    const b = await tokens(model, compare, { signal });
    state.amend(response, () => ({ b }));
  } catch {
    // the prompt bar, which reads the same text, says what is wrong with it
  }
}

/** Whether two questions ask the same of the model's last layer, however it is explained. */
function sameForward(one: Question, other: Question): boolean {
  const asks = (question: Question) =>
    JSON.stringify([
      predictionRequest(question, [], false),
      predictionRequest(question, [], true),
      question.targets,
      question.distractors,
      beside(question),
    ]);
  return asks(one) === asks(other);
}

/** Exact logits and probabilities: targets, distractors, and what either run finds likely. */
async function look(question: Question, signal: AbortSignal): Promise<void> {
  const shown = state.answer.value;
  if (!shown) return;
  const idOf = async (text: string): Promise<number[]> => {
    const [token, ...more] = await tokens(question.model, text, { single: true, signal });
    return token && more.length === 0 ? [token.id ?? 0] : [];
  };
  const ids = async (texts: string[]): Promise<number[]> =>
    (await Promise.all(texts.map(idOf))).flat();
  try {
    const [targets, distractors] = [await ids(question.targets), await ids(question.distractors)];
    const likely =
      question.trace.length > 0 // the table's tokens are those at the traced node
        ? await likeliest(question, signal)
        : likelyIds(shown.response);
    const all = [...new Set([...targets, ...distractors, ...likely])];
    const named = async (base: boolean): Promise<PredictionJson[]> => {
      const answer = await run(predictionRequest(question, all, base), { signal });
      return answer.nextTokens?.at(-1)?.named ?? [];
    };
    const [now, base] = await Promise.all([
      named(false),
      beside(question) === null ? [] : named(true),
    ]);
    const outlooks = now.map((prediction, i): state.Outlook => {
      const id = all[i]!;
      const role = targets.includes(id)
        ? "target"
        : distractors.includes(id)
          ? "distractor"
          : "likely";
      return { role, now: prediction, ...(base[i] ? { base: base[i] } : {}) };
    });
    if (!signal.aborted) state.amend(shown.response, () => ({ outlooks }));
  } catch (error) {
    if (signal.aborted || needsToken(error)) return;
    state.found.value = problems(error).map((problem) => ({ ...problem, place: "prediction" }));
  }
}

/** Ids of what this run finds likeliest to come next. */
async function likeliest(question: Question, signal: AbortSignal): Promise<number[]> {
  const answer = await run(predictionRequest(question, [], false, LIKELIEST), { signal });
  return (answer.nextTokens?.at(-1)?.top ?? []).map(({ token }) => token?.id ?? 0);
}

/** Back to the previous answer, from memory. */
export function undo(): void {
  const before = state.past.value.at(-1);
  if (!before) return;
  flight.abort();
  cancelVerify();
  if (before.question.prompt !== state.answer.value?.question.prompt) leavePlaces();
  batch(() => {
    state.past.value = state.past.value.slice(0, -1);
    state.answer.value = before;
    state.asked.value = before.question;
    state.loading.value = false;
    state.found.value = [];
    fill(before.question);
  });
  writeAddress();
  if (!before.outlooks) void look(before.question, (flight = new AbortController()).signal);
}

export async function switchModel(id: string): Promise<void> {
  if (!(await loadModel(id))) return;
  const question = state.asked.value;
  leavePlaces();
  if (question)
    await ask({ ...question, model: id, interventions: [], trace: [], dictionaries: [] });
}

function needsToken(error: unknown): boolean {
  if (!(error instanceof ConnectError) || error.code !== "unauthenticated") return false;
  state.locked.value = true;
  return true;
}

/** Takes the token and carries on where it was missing. */
export function unlock(token: string): void {
  bearer.set(token);
  state.locked.value = false;
  const question = state.asked.value;
  void (state.model.value && question ? ask(question) : start());
}
