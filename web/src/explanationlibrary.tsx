/** The library of explanations: search over all of them, jobs that make more, and imports. */
import { signal } from "@preact/signals";
import { useEffect, useRef } from "preact/hooks";
import { capabilities, refreshCapabilities } from "./explanations";
import { ExplanationImport } from "./explanationimport";
import { ExplanationSearch } from "./explanationsearch";
import { activeJob, dealtWith } from "./jobs";
import { JobList } from "./joblist";
import { count } from "./numbers";
import { RangeJob } from "./rangejob";

const TABS = { search: "search", jobs: "jobs", import: "import" } as const;
type Tab = keyof typeof TABS;

const open = signal<Tab | null>(null);

export function openExplanations(tab: Tab): void {
  open.value = tab;
}

export function ExplanationsButton() {
  const dialog = useRef<HTMLDialogElement>(null);
  const said = capabilities.value;
  const tab = open.value;
  useEffect(() => {
    if (tab !== null && !dialog.current?.open) dialog.current?.showModal();
    if (tab === null) dialog.current?.close();
  }, [tab]);
  if (!said) return null;
  const job = activeJob.value;
  const far = job && Math.floor((100 * dealtWith(job)) / Math.max(1, job.components ?? 0));
  const close = () => (open.value = null);
  return (
    <span>
      <button
        type="button"
        class="link"
        title="Search what components do, and explain many at once"
        onClick={() => {
          void refreshCapabilities();
          openExplanations(job ? "jobs" : "search");
        }}
      >
        {count(said.explanations ?? 0, "explanation")}
        {job && ` (job ${far} %)`}
      </button>
      <dialog
        ref={dialog}
        class="library explanation-library"
        aria-label="Explanations"
        onClick={(event) => {
          if (event.target === dialog.current) close();
        }}
        onKeyDown={(event) => event.stopPropagation()}
        onClose={close}
      >
        <header>
          <span class="tabs">
            <h2>Explanations</h2>
            <span class="joined" role="group" aria-label="What to do with them">
              {(Object.keys(TABS) as Tab[]).map((each) => (
                <button
                  key={each}
                  type="button"
                  class="small"
                  aria-pressed={each === tab}
                  onClick={() => openExplanations(each)}
                >
                  {TABS[each]}
                </button>
              ))}
            </span>
          </span>
          <button type="button" class="small" onClick={close}>
            close
          </button>
        </header>
        {tab === "search" && <ExplanationSearch onOpened={close} />}
        {tab === "jobs" && (
          <>
            <JobList />
            <details class="new-job job-form">
              <summary>new job on a range of a dataset</summary>
              <RangeJob onStarted={() => openExplanations("jobs")} />
            </details>
          </>
        )}
        {tab === "import" && <ExplanationImport />}
      </dialog>
    </span>
  );
}
