/**
 * Which dictionaries' latents stand in the table: for the MLPs' neurons, for the heads, and beside both
 * those of the residual stream.
 */
import type { DictionaryJson } from "./gen/tdb/inference/v1/model_pb";

export type Sublayer = "mlp" | "attn" | "resid";

/** What a sublayer is taken apart into where no dictionary is chosen. */
export const PLAIN_NAMES: Record<Sublayer, { of: string; plain: string }> = {
  mlp: { of: "MLPs", plain: "neurons" },
  attn: { of: "attention", plain: "heads" },
  resid: { of: "stream", plain: "no view" },
};

/** Dictionaries that are switched together: those of one set that sit at the same site of their layers. */
export interface Group {
  name: string;
  sublayer: Sublayer;
  dictionaries: DictionaryJson[];
}

/** Which sublayer a dictionary takes apart. */
export function sublayerOf({ siteIn = "", siteOut = "" }: DictionaryJson): Sublayer {
  const kind = pointOf(siteOut || siteIn);
  if (kind.startsWith("resid") || kind === "embed") return "resid";
  return kind.startsWith("mlp") ? "mlp" : "attn";
}

function pointOf(site: string): string {
  return site.split(".")[0] ?? "";
}

/** `mlp_out`, or `mlp_in → mlp_out` of a transcoder. */
export function siteName({ siteIn = "", siteOut = "" }: DictionaryJson): string {
  return siteOut === "" || siteOut === siteIn ? siteIn : `${siteIn} → ${siteOut}`;
}

export function groups(dictionaries: readonly DictionaryJson[]): Group[] {
  const found = new Map<string, Group>();
  for (const dictionary of dictionaries) {
    const { setName, id = "", siteIn = "", siteOut = "" } = dictionary;
    const name = setName || id;
    const key = [name, pointOf(siteIn), pointOf(siteOut)].join(" ");
    const group = found.get(key);
    if (group) group.dictionaries.push(dictionary);
    else found.set(key, { name, sublayer: sublayerOf(dictionary), dictionaries: [dictionary] });
  }
  return [...found.values()];
}

/** Ids of the dictionaries that a question names, by id or by set. */
export function chosenIds(
  names: readonly string[],
  dictionaries: readonly DictionaryJson[],
): Set<string> {
  const chosen = dictionaries.filter(
    ({ id = "", setName }) => names.includes(id) || (setName && names.includes(setName)),
  );
  return new Set(chosen.map(({ id = "" }) => id));
}

/** Whether all of the group stand in the table. */
export function isChosen({ dictionaries }: Group, ids: ReadonlySet<string>): boolean {
  return dictionaries.every(({ id = "" }) => ids.has(id));
}

/** The question's dictionaries with this group, or nothing, chosen for the sublayer. */
export function choose(
  names: readonly string[],
  dictionaries: readonly DictionaryJson[],
  sublayer: Sublayer,
  group: Group | null,
): string[] {
  const ids = chosenIds(names, dictionaries);
  for (const each of dictionaries) if (sublayerOf(each) === sublayer) ids.delete(each.id ?? "");
  for (const { id = "" } of group?.dictionaries ?? []) ids.add(id);
  return named(ids, dictionaries);
}

/** The shortest way to name them: whole sets by their name. */
function named(ids: ReadonlySet<string>, dictionaries: readonly DictionaryJson[]): string[] {
  const whole = (set: string) =>
    dictionaries.filter(({ setName }) => setName === set).every(({ id = "" }) => ids.has(id));
  const names = dictionaries
    .filter(({ id = "" }) => ids.has(id))
    .map(({ id = "", setName }) => (setName && whole(setName) ? setName : id));
  return [...new Set(names)];
}
