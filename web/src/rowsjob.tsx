/** Above the table: a job that explains the components of its rows. */
import { useRef, useState } from "preact/hooks";
import { chosen, listed } from "./datasets";
import { bestOf, componentsOf } from "./explanations";
import { activeJob, dealtWith } from "./jobs";
import { JobForm } from "./jobform";
import { openExplanations } from "./explanationlibrary";
import { count } from "./numbers";
import { model, stale } from "./state";
import { shownRows } from "./view";

/** The components by the dataset whose examples explain them, most first; "" for those without one. */
export function byDataset(components: readonly string[]): [dataset: string, own: string[]][] {
  const loaded = model.value;
  const groups = new Map<string, string[]>();
  for (const component of components) {
    const found = loaded && chosen(listed.value?.datasets ?? [], component, loaded, null);
    const name = found?.name ?? "";
    groups.set(name, [...(groups.get(name) ?? []), component]);
  }
  return [...groups].sort(([, a], [, b]) => b.length - a.length);
}

export function RowsJob() {
  const dialog = useRef<HTMLDialogElement>(null);
  const [of, setOf] = useState<string[] | null>(null);
  const job = activeJob.value;
  const close = () => dialog.current?.close();
  return (
    <>
      <button
        type="button"
        class="small"
        disabled={stale.value || shownRows.value.length === 0}
        title="Start a job that explains the components of the rows in sight of the filters"
        onClick={() => {
          setOf(componentsOf(shownRows.value));
          dialog.current?.showModal();
        }}
      >
        explain rows…
      </button>
      {job && (
        <button
          type="button"
          class="link"
          title="A job explains components; click for all jobs"
          onClick={() => openExplanations("jobs")}
        >
          job {dealtWith(job)}/{job.components ?? 0}
        </button>
      )}
      <dialog
        ref={dialog}
        class="library job-form"
        aria-label="Explain these rows"
        onClick={(event) => {
          if (event.target === dialog.current) close();
        }}
        onKeyDown={(event) => event.stopPropagation()}
        onClose={() => setOf(null)}
      >
        <header>
          <h2>Explain these rows</h2>
          <button type="button" class="small" onClick={close}>
            close
          </button>
        </header>
        {of && <Rows components={of} onStarted={close} />}
      </dialog>
    </>
  );
}

function Rows({ components, onStarted }: { components: string[]; onStarted: () => void }) {
  const groups = byDataset(components);
  const known = groups.filter(([name]) => name !== "");
  const without = groups.find(([name]) => name === "")?.[1].length ?? 0;
  const [wanted, setWanted] = useState<string | null>(null);
  const [dataset, own] = known.find(([name]) => name === wanted) ?? known[0] ?? ["", []];
  if (components.length === 0)
    return <p>These rows are no heads, neurons or latents, so there is nothing to explain.</p>;
  if (own.length === 0)
    return (
      <p>
        No dataset has examples of these {count(components.length, "component")}, and without
        examples nothing can be learnt of them.
      </p>
    );
  const explained = own.filter((each) => bestOf(each)).length;
  return (
    <>
      <p class="about">
        {count(own.length, "component")} with examples in{" "}
        {known.length > 1 ? (
          <select
            aria-label="Dataset"
            value={dataset}
            onChange={(event) => setWanted(event.currentTarget.value)}
          >
            {known.map(([name, its]) => (
              <option key={name} value={name}>
                {name} ({its.length})
              </option>
            ))}
          </select>
        ) : (
          <code>{dataset}</code>
        )}
        {explained > 0 && `; ${explained} have an explanation`}
        {without > 0 && `; ${without} more are in no dataset`}.
      </p>
      <JobForm
        key={dataset}
        dataset={dataset}
        about={{ list: { components: own } }}
        onStarted={onStarted}
      />
    </>
  );
}
