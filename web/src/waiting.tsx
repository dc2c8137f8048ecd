/** Who waits for the device: a number in the top line, and on a click a list of them. */
import { signal } from "@preact/signals";
import { useEffect, useState } from "preact/hooks";
import type { QueueEntryJson } from "./gen/tdb/inference/v1/queue_pb";
import { getQueue } from "./inference";
import { num } from "./numbers";
import { standing } from "./queue";
import { loading, locked, model } from "./state";

const SELDOM_MS = 15_000;
const OFTEN_MS = 1_000;

/** What runs and waits, as last heard; null while that is not known. */
const entries = signal<QueueEntryJson[] | null>(null);

export function Waiting() {
  const [open, setOpen] = useState(false);
  useListening(open || loading.value);
  const now = entries.value;
  const waiting = now?.filter(({ running }) => !running).length;
  return (
    <details
      class="queue"
      open={open}
      onToggle={(event) => setOpen((event.currentTarget as HTMLDetailsElement).open)}
    >
      <summary title="Requests that wait for the device, everyone's; click for the list">
        queue {waiting ?? "–"}
      </summary>
      <div class="queued" role="region" aria-label="Queue">
        {now === null ? (
          <p class="quiet-text">The service does not answer.</p>
        ) : now.length === 0 ? (
          <p class="quiet-text">The device is idle.</p>
        ) : (
          <table>
            <tbody>
              {now.map((entry, i) => (
                <Entry key={`${entry.requestId ?? ""} ${i}`} entry={entry} />
              ))}
            </tbody>
          </table>
        )}
      </div>
    </details>
  );
}

function Entry({ entry }: { entry: QueueEntryJson }) {
  const seconds = ((num(entry.waitedMs) ?? 0) / 1000).toFixed(1);
  return (
    <tr title={entry.requestId ? `Request ${entry.requestId}` : ""}>
      <td>{entry.user || "the service"}</td>
      <td>{entry.method?.split("/").at(-1) || entry.kind}</td>
      <td>{entry.running ? "runs" : standing(entry.queue) || "next"}</td>
      <td class="number">{seconds} s</td>
    </tr>
  );
}

/** Asks again and again while the page is in sight. */
function useListening(often: boolean): void {
  const there = model.value !== null && !locked.value;
  useEffect(() => {
    if (!there) return;
    const own = new AbortController();
    const ask = async () => {
      if (document.visibilityState !== "visible") return;
      try {
        entries.value =
          (await getQueue({}, { signal: own.signal, timeoutMs: 5_000 })).entries ?? [];
      } catch {
        // whatever is wrong, the page's own calls say so where it matters
        if (!own.signal.aborted) entries.value = null;
      }
    };
    void ask();
    const timer = setInterval(() => void ask(), often ? OFTEN_MS : SELDOM_MS);
    return () => {
      own.abort();
      clearInterval(timer);
    };
  }, [often, there]);
}
