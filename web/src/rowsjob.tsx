/** Above the table: a job that explains the components of its rows. */
import { useRef, useState } from "preact/hooks";
import { chosen, listed } from "./datasets";
import { bestOf, componentsOf } from "./explanations";
import { activeJob, dealtWith } from "./jobs";
import { JobForm } from "./jobform";
import { openExplanations } from "./explanationlibrary";
import { count } from "./numbers";
import { model, stale } from "./state";
import { kindOf } from "./worth";
import { shownRows } from "./view";

/** Components that one job can explain: of one dataset, and either all heads or none. */
export interface Part {
  /** Empty where no dataset has examples of them. */
  dataset: string;
  /** `3 heads of demo`, `12 neurons and latents of demo`. */
  words: string;
  components: string[];
}

/** The components in parts, the largest first; heads have scores of their own, so they are apart. */
export function parts(
  components: readonly string[],
  datasetOf: (component: string) => string,
): Part[] {
  const groups = new Map<string, string[]>();
  for (const component of components) {
    const key = `${datasetOf(component)} ${kindOf(component) === "head" ? "heads" : "others"}`;
    groups.set(key, [...(groups.get(key) ?? []), component]);
  }
  return [...groups]
    .map(([key, own]) => {
      const dataset = key.split(" ")[0] ?? "";
      return { dataset, words: `${kindWords(own)} of ${dataset}`, components: own };
    })
    .sort((one, other) => other.components.length - one.components.length);
}

function kindWords(components: readonly string[]): string {
  const kinds = [...new Set(components.map(kindOf))].sort().reverse();
  const [only] = kinds;
  if (components.length === 1) return `1 ${only ?? ""}`;
  return `${components.length} ${kinds.map((kind) => `${kind}s`).join(" and ")}`;
}

function datasetOf(component: string): string {
  const loaded = model.value;
  if (!loaded) return "";
  return chosen(listed.value?.datasets ?? [], component, loaded, null)?.name ?? "";
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
  const [started, setStarted] = useState<string[]>([]);
  const [wanted, setWanted] = useState<string | null>(null);
  const all = parts(components, datasetOf);
  const known = all.filter(({ dataset }) => dataset !== "");
  const left = known.filter(({ words }) => !started.includes(words));
  const without = all
    .filter(({ dataset }) => dataset === "")
    .reduce((sum, each) => sum + each.components.length, 0);
  const part = left.find(({ words }) => words === wanted) ?? left[0];
  if (components.length === 0)
    return <p>These rows are no heads, neurons or latents, so there is nothing to explain.</p>;
  if (!part)
    return (
      <p>
        No dataset has examples of these {count(components.length, "component")}, and without
        examples nothing can be learnt of them.
      </p>
    );
  const explained = part.components.filter((each) => bestOf(each)).length;
  return (
    <>
      <p class="about">
        {left.length > 1 ? (
          <select
            aria-label="Components"
            title="Heads have scores of their own, so they are a job of their own"
            value={part.words}
            onChange={(event) => setWanted(event.currentTarget.value)}
          >
            {left.map(({ words }) => (
              <option key={words} value={words}>
                {words}
              </option>
            ))}
          </select>
        ) : (
          part.words
        )}
        {explained > 0 && `; ${explained} have an explanation`}
        {without > 0 && `; ${without} more are in no dataset`}.
        {started.length > 0 && ` The job on ${started.join(", and that on ")} has begun.`}
      </p>
      <JobForm
        key={part.words}
        dataset={part.dataset}
        about={{ list: { components: part.components } }}
        onStarted={() => {
          setStarted((before) => [...before, part.words]);
          if (left.length === 1) onStarted();
        }}
      />
    </>
  );
}
