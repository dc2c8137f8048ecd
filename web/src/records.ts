/** Records as they were read, remembered: one request per component, dataset and form. */
import { getRecord } from "./dataset";
import type { GetRecordRequestJson } from "./gen/tdb/dataset/v1/read_pb";
import type { ComponentRecordJson } from "./gen/tdb/dataset/v1/record_pb";

const REMEMBERED = 60;
const memory = new Map<string, ComponentRecordJson>();

/** The record; `manifest` is the hash of the dataset's manifest, so that another build is read anew. */
export async function record(
  request: GetRecordRequestJson,
  manifest: string,
  signal: AbortSignal,
): Promise<ComponentRecordJson> {
  const key = `${manifest}\0${JSON.stringify(request)}`;
  const known = memory.get(key);
  if (known) return known;
  const answer = await getRecord(request, { signal, timeoutMs: 30_000 });
  const found = answer.record ?? {};
  // The oldest goes first: a map keeps the order in which it was filled.
  const [oldest] = memory.size >= REMEMBERED ? memory.keys() : [];
  if (oldest !== undefined) memory.delete(oldest);
  memory.set(key, found);
  return found;
}
