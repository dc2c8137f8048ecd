/** Takes over the explanations that came with imported datasets, with their published scores. */
import { useEffect, useRef, useState } from "preact/hooks";
import { listed, refreshDatasets } from "./datasets";
import { importExplanations } from "./explainer";
import { refreshCapabilities, renew } from "./explanations";
import type { DatasetJson } from "./gen/tdb/dataset/v1/dataset_pb";
import type { ImportSummaryJson } from "./gen/tdb/explainer/v1/search_pb";
import { count } from "./numbers";
import { problems } from "./problems";

export function ExplanationImport() {
  useEffect(() => void refreshDatasets(), []); // what was imported meanwhile is there at once
  const own = (listed.value?.datasets ?? []).filter(({ explanations = 0 }) => explanations > 0);
  return (
    <section class="explanation-import" aria-label="Import explanations">
      <p class="quiet-text">
        Datasets of others can bring explanations and their published scores. Importing stores them
        here, marked as imported; what is here already is not stored twice.
      </p>
      {own.length === 0 ? (
        <p>
          No dataset here has brought any. <code>tdb dataset import</code> takes over OpenAI’s and
          Neuronpedia’s records.
        </p>
      ) : (
        <ul>
          {own.map((each) => (
            <Import key={each.name} dataset={each} />
          ))}
        </ul>
      )}
    </section>
  );
}

function Import({ dataset }: { dataset: DatasetJson }) {
  const { name = "", explanations = 0 } = dataset;
  const [read, setRead] = useState<number | null>(null);
  const [summary, setSummary] = useState<ImportSummaryJson | null>(null);
  const [wrong, setWrong] = useState<string | null>(null);
  const flight = useRef<AbortController | null>(null);
  const busy = read !== null;
  const start = async () => {
    const own = (flight.current = new AbortController());
    setRead(0);
    setSummary(null);
    setWrong(null);
    try {
      for await (const event of importExplanations({ dataset: name }, own)) {
        if (event.progress) setRead(event.progress.read ?? 0);
        if (event.summary) setSummary(event.summary);
      }
    } catch (error) {
      if (!own.signal.aborted) setWrong(problems(error)[0]?.text ?? null);
    } finally {
      setRead(null);
      renew();
      void refreshCapabilities();
    }
  };
  return (
    <li>
      <code>{name}</code>{" "}
      <span class="quiet-text">
        of {dataset.header?.model?.id}, {count(explanations, "explanation")}
      </span>{" "}
      <button
        type="button"
        class="small"
        onClick={() => (busy ? flight.current?.abort() : void start())}
      >
        {busy ? "cancel" : "import"}
      </button>
      <span aria-live="polite">
        {busy && (
          <>
            {" "}
            <progress aria-label={`Importing ${name}`} max={explanations} value={read ?? 0} />{" "}
            {read} of {explanations}
          </>
        )}
        {summary && ` ${summaryWords(summary)}`}
      </span>
      {wrong && (
        <p class="error" role="alert">
          {wrong}
        </p>
      )}
      {(summary?.refused ?? []).length > 0 && (
        <details>
          <summary>why some could not be stored</summary>
          <ul>
            {summary?.refused?.map((why) => (
              <li key={why}>{why}</li>
            ))}
          </ul>
        </details>
      )}
    </li>
  );
}

export function summaryWords({
  added = 0,
  known = 0,
  refusedCount = 0,
}: ImportSummaryJson): string {
  return [
    `${added} added`,
    ...(known > 0 ? [`${known} were here already`] : []),
    ...(refusedCount > 0 ? [`${refusedCount} could not be stored`] : []),
  ].join(", ");
}
