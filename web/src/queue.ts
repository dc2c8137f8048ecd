/** Waiting for the device: in words. */
import type { QueueJson } from "./gen/tdb/inference/v1/queue_pb";
import { count, num } from "./numbers";

/** Where something stands in the queue: `2 requests go first, about 3 s`. Empty if it does not wait. */
export function standing(queue: QueueJson | undefined): string {
  const first = queue?.position ?? 0;
  if (first === 0) return "";
  const seconds = Math.round((num(queue?.expectedWaitMs) ?? 0) / 1000);
  const ahead = first === 1 ? "1 request goes first" : `${count(first, "request")} go first`;
  return seconds < 1 ? ahead : `${ahead}, about ${seconds} s`;
}
