/**
 * Explanations of components as the page knows them, per model: of each component the best, and of one
 * that is looked at by itself all of them.
 *
 * A table asks once for all its rows; what is known is asked for again only when it has aged, and stays
 * in sight meanwhile. Whether there is an explainer service at all is its own question, asked when the
 * model is known: nothing of the page waits for it.
 */
import { batch, computed, effect, signal } from "@preact/signals";
import { site } from "./address";
import { ConnectError } from "./connect";
import { getCapabilities, listExplanations } from "./explainer";
import type { ExplainedModelJson, ExplanationJson } from "./gen/tdb/explainer/v1/explanation_pb";
import type { GetCapabilitiesResponseJson } from "./gen/tdb/explainer/v1/service_pb";
import { problems, type Problem } from "./problems";
import { answer, locked, model } from "./state";
import { isComponent } from "./url";

const KEY = "tdb.explanations";
const AT_ONCE = 10_000;
const AGED_MS = 120_000;
const AGAIN_MS = 10_000;

/** What the service can do; null while it has not said so. */
export const capabilities = signal<GetCapabilitiesResponseJson | null>(null);
/** Why explanations are not known, or are old ones. */
export const awayProblem = signal<Problem | null>(null);
/** Whether this deployment has no explainer service at all. */
export const absent = signal(false);
/** Whether the table has a column for them. */
export const columnWanted = signal(remembered());
export const columnShown = computed(() => columnWanted.value && capabilities.value !== null);

interface Known {
  best: ReadonlyMap<string, ExplanationJson | null>;
  all: ReadonlyMap<string, readonly ExplanationJson[]>;
}

const NOTHING: Known = { best: new Map(), all: new Map() };
const known = signal<ReadonlyMap<string, Known>>(new Map());
const asked = new Map<string, number>();
/** Whether a table's explanations are on their way. */
export const lookingUp = signal(false);

/** The loaded model, as explanations name it. */
export function explainedModel(): ExplainedModelJson {
  const { id = "", weightsHash = "" } = model.value?.model ?? {};
  const dictionaries = (model.value?.dictionaries ?? []).flatMap((each) =>
    each.id && each.weightsHash ? [{ id: each.id, weightsHash: each.weightsHash }] : [],
  );
  return { id, ...(weightsHash === "" ? {} : { weightsHash }), dictionaries };
}

const fingerprint = computed(() => JSON.stringify(explainedModel()));
const own = computed(() => known.value.get(fingerprint.value) ?? NOTHING);

/** The best explanation; null where there is none, undefined while that is not known. */
export function bestOf(component: string): ExplanationJson | null | undefined {
  return own.value.best.get(component);
}

/** All of them, the best first, then the newest; undefined while that is not known. */
export function allOf(component: string): readonly ExplanationJson[] | undefined {
  return own.value.all.get(component);
}

/** Whether there can be an explanation of the node's component. */
export function explainable(node: string): boolean {
  return isComponent(site(node).component);
}

/** The components of rows that can be explained, each once. */
export function componentsOf(rows: readonly { node?: string }[]): string[] {
  const found = rows.map(({ node = "" }) => site(node).component).filter(isComponent);
  return [...new Set(found)];
}

/** Asks for the best explanations of those components that are not known or not lately. */
export async function lookUp(components: readonly string[]): Promise<void> {
  const hash = fingerprint.value;
  const now = Date.now();
  const key = (component: string) => `${hash} ${component}`;
  const due = components.filter((each) => now - (asked.get(key(each)) ?? -Infinity) > AGED_MS);
  if (due.length === 0) return;
  for (const each of due) asked.set(key(each), now);
  lookingUp.value = true;
  try {
    for (let at = 0; at < due.length; at += AT_ONCE) {
      const part = due.slice(at, at + AT_ONCE);
      const found = await listExplanations({
        model: explainedModel(),
        components: part,
        bestOnly: true,
      });
      learnBest(hash, part, found.explanations ?? []);
    }
  } catch (error) {
    for (const each of due) asked.delete(key(each));
    wentWrong(error);
  } finally {
    lookingUp.value = false;
  }
}

/** Asks for all explanations of one component; throws what goes wrong. */
export async function refresh(component: string, signal?: AbortSignal): Promise<void> {
  const hash = fingerprint.value;
  const request = { model: explainedModel(), components: [component] };
  const found = await listExplanations(request, signal ? { signal } : {});
  const explanations = found.explanations ?? [];
  asked.set(`${hash} ${component}`, Date.now());
  batch(() => {
    learnBest(hash, [component], explanations.slice(0, 1));
    const now = known.value.get(hash) ?? NOTHING;
    set(hash, { ...now, all: new Map(now.all).set(component, explanations) });
  });
}

/** What has become known of components by other ways than asking, for example from a job. */
export function forget(components: readonly string[]): void {
  for (const each of components) asked.delete(`${fingerprint.value} ${each}`);
}

/** Whatever is known may have changed: what stands in the table is asked for anew. */
export function renew(): void {
  asked.clear();
  void lookUp(componentsOf(answer.value?.response.rows ?? []));
}

function learnBest(
  hash: string,
  components: readonly string[],
  found: readonly ExplanationJson[],
): void {
  const now = known.value.get(hash) ?? NOTHING;
  const best = new Map(now.best);
  for (const each of components) best.set(each, null);
  for (const each of found)
    if (each.component && !best.get(each.component)) best.set(each.component, each);
  set(hash, { ...now, best });
}

function set(hash: string, what: Known): void {
  known.value = new Map(known.value).set(hash, what);
}

function wentWrong(error: unknown): void {
  if (error instanceof ConnectError && error.code === "unimplemented") {
    batch(() => {
      absent.value = true;
      capabilities.value = null;
    });
    return;
  }
  if (error instanceof ConnectError && error.code === "unauthenticated") locked.value = true;
  awayProblem.value = problems(error)[0] ?? null;
}

let flight: Promise<void> | null = null;

/** Asks what the service can do, once however many ask at the same time. */
export function refreshCapabilities(): Promise<void> {
  flight ??= getCapabilities({}, { timeoutMs: 10_000 })
    .then(
      (found) =>
        batch(() => {
          capabilities.value = found;
          awayProblem.value = null;
          absent.value = false;
        }),
      wentWrong,
    )
    .finally(() => (flight = null));
  return flight;
}

/** From now on: asks what the service can do when a model is there, and for what stands in the table. */
export function followTable(): void {
  effect(() => {
    if (model.value && !locked.value) void refreshCapabilities();
  });
  effect(() => {
    if (!awayProblem.value?.retry || locked.value) return;
    const timer = setInterval(() => !document.hidden && void refreshCapabilities(), AGAIN_MS);
    return () => clearInterval(timer);
  });
  effect(() => {
    const rows = answer.value?.response.rows;
    if (rows && columnShown.value && !awayProblem.value) void lookUp(componentsOf(rows));
  });
  effect(() => remember(columnWanted.value));
}

function remembered(): boolean {
  try {
    return localStorage.getItem(KEY) !== "hidden";
  } catch {
    return true; // storage is switched off
  }
}

function remember(shown: boolean): void {
  try {
    localStorage.setItem(KEY, shown ? "shown" : "hidden");
  } catch {
    // storage is switched off: the choice lasts as long as the page
  }
}
