/**
 * Which datasets there are, and which of them is about a component of the loaded model.
 *
 * The list is asked for when somebody looks; while a dataset is being built it is asked for again and again.
 */
import { signal } from "@preact/signals";
import { useEffect } from "preact/hooks";
import { isUnderWay } from "./builds";
import { listDatasets } from "./dataset";
import type { DatasetJson, ListDatasetsResponseJson } from "./gen/tdb/dataset/v1/dataset_pb";
import type { GetModelResponseJson } from "./gen/tdb/inference/v1/model_pb";
import { problems, type Problem } from "./problems";
import { locked } from "./state";

/** As last heard; null while nothing has been heard. */
export const listed = signal<ListDatasetsResponseJson | null>(null);
/** Why the list is not known, or is an old one. */
export const listProblem = signal<Problem | null>(null);

let flight: Promise<void> | null = null;

/** Asks for the list, once however many ask at the same time. */
export function refreshDatasets(): Promise<void> {
  flight ??= listDatasets({}, { timeoutMs: 20_000 })
    .then(
      (found) => {
        listed.value = found;
        listProblem.value = null;
      },
      (error: unknown) => {
        listProblem.value = problems(error)[0] ?? null;
      },
    )
    .finally(() => (flight = null));
  return flight;
}

const AGAIN_MS = 5_000;
const BUILDING_MS = 2_000;

/** Asks while the caller is there: once, and again while a dataset is being built or the service is away. */
export function useDatasets(): void {
  const building = listed.value?.builds?.some(isUnderWay) ?? false;
  const away = listProblem.value?.retry === true;
  const every = building ? BUILDING_MS : away ? AGAIN_MS : null;
  useEffect(() => {
    if (!locked.value && !listed.value) void refreshDatasets();
  }, [locked.value]);
  useEffect(() => {
    if (every === null || locked.value) return;
    const timer = setInterval(() => !document.hidden && void refreshDatasets(), every);
    return () => clearInterval(timer);
  }, [every, locked.value]);
}

/** Address without its last number, and that number. */
export function groupOf(component: string): { group: string; index: number } {
  const at = component.lastIndexOf(".");
  return { group: component.slice(0, at), index: Number(component.slice(at + 1)) };
}

/** Whether a record of the component may be there; a group can have holes. */
export function holds({ groups = [] }: DatasetJson, component: string): boolean {
  const { group, index } = groupOf(component);
  return groups.some(
    ({ name, first = 0, last = 0 }) => name === group && first <= index && index <= last,
  );
}

/** Why the dataset's records are not about the loaded model, or nothing if they are. */
export function otherModel(
  { header }: DatasetJson,
  loaded: GetModelResponseJson,
): string | undefined {
  const { id = "", weightsHash = "" } = header?.model ?? {};
  const own = loaded.model ?? {};
  if (weightsHash !== "" && own.weightsHash) {
    if (weightsHash === own.weightsHash) return undefined;
    return id === own.id ? `other weights of ${id}` : `the model ${id}`;
  }
  return id === own.id
    ? undefined
    : id === ""
      ? "a model that it does not name"
      : `the model ${id}`;
}

/** Why the latent's records come from another dictionary of the same id, or nothing if they do not. */
export function otherDictionary(
  { header }: DatasetJson,
  component: string,
  loaded: GetModelResponseJson,
): string | undefined {
  const { group } = groupOf(component);
  if (!group.startsWith("latent.")) return undefined;
  const id = group.slice("latent.".length);
  const recorded = header?.model?.dictionaries?.find((each) => each.id === id)?.weightsHash;
  const served = loaded.dictionaries?.find((each) => each.id === id)?.weightsHash;
  return recorded && served && recorded !== served ? `other weights of ${id}` : undefined;
}

/** The dataset to read for a component: the one that is named, else the first that fits it. */
export function chosen(
  all: readonly DatasetJson[],
  component: string,
  loaded: GetModelResponseJson,
  named: string | null,
): DatasetJson | null {
  if (named !== null) return all.find(({ name }) => name === named) ?? null;
  const own = all.filter(
    (each) =>
      otherModel(each, loaded) === undefined &&
      otherDictionary(each, component, loaded) === undefined,
  );
  return own.find((each) => holds(each, component)) ?? null;
}
