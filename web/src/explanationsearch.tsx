/** Components by what is said of them: by words, or by meaning where an endpoint for embeddings is configured. */
import { useRef, useState } from "preact/hooks";
import { CopyButtons } from "./copy";
import { Embedding } from "./embedding";
import { searchExplanations } from "./explainer";
import { Label } from "./explanationcell";
import { capabilities, explainedModel } from "./explanations";
import type { MethodJson } from "./gen/tdb/explainer/v1/explanation_pb";
import type {
  FoundExplanationJson,
  SearchModeJson,
  SearchRequestJson,
  SearchResponseJson,
} from "./gen/tdb/explainer/v1/search_pb";
import type { GetModelResponseJson } from "./gen/tdb/inference/v1/model_pb";
import { count, full, num } from "./numbers";
import { openComponent } from "./opening";
import { problems } from "./problems";
import { model } from "./state";
import { isComponent } from "./url";
import { MADE_METHODS, methodName } from "./worth";

const PAGE = 50;
const METHODS: MethodJson[] = [...MADE_METHODS, "METHOD_HUMAN", "METHOD_IMPORTED"];

/** Groups of the loaded model by what a reader calls them: all heads, the latents of one dictionary. */
export function groupChoices({
  dimensions,
  dictionaries = [],
}: GetModelResponseJson): [name: string, groups: string[]][] {
  const layers = Array.from({ length: dimensions?.layers ?? 0 }, (_, layer) => layer);
  const heads = layers.map((layer) => `head.${layer}`);
  const neurons = layers.map((layer) => `neuron.${layer}`);
  const latents = dictionaries.map(({ id = "" }) => `latent.${id}`);
  const wholes: [string, string[]][] = [
    ["heads", heads],
    ["neurons", neurons],
    ["latents", latents],
  ];
  return [
    ...wholes.filter(([, groups]) => groups.length > 0),
    ...[...heads, ...neurons, ...latents].map((group): [string, string[]] => [group, [group]]),
  ];
}

interface Found {
  request: SearchRequestJson;
  found: FoundExplanationJson[];
  last: SearchResponseJson;
}

export function ExplanationSearch({ onOpened }: { onOpened: () => void }) {
  const [query, setQuery] = useState("");
  const [mode, setMode] = useState<SearchModeJson>("SEARCH_MODE_WORDS");
  const [everywhere, setEverywhere] = useState(false);
  const [group, setGroup] = useState("");
  const [method, setMethod] = useState<MethodJson | "">("");
  const [found, setFound] = useState<Found | null>(null);
  const [wrong, setWrong] = useState<string | null>(null);
  const [busy, setBusy] = useState(false);
  const flight = useRef<AbortController | null>(null);
  const groups = model.value ? groupChoices(model.value) : [];
  const meaning = capabilities.value?.hasEmbeddings ?? false;

  const ask = async (more: Found | null) => {
    flight.current?.abort();
    const own = (flight.current = new AbortController());
    setBusy(true);
    setWrong(null);
    try {
      const request: SearchRequestJson = more?.request ?? {
        query: query.trim(),
        mode,
        limit: PAGE,
        ...(everywhere ? {} : { model: explainedModel() }),
        ...(group === "" ? {} : { groups: groups.find(([name]) => name === group)?.[1] ?? [] }),
        ...(method === "" ? {} : { methods: [method] }),
      };
      const cursor = more?.last.nextCursor;
      const last = await searchExplanations({ ...request, ...(cursor ? { cursor } : {}) }, own);
      if (own.signal.aborted) return;
      setFound({ request, found: [...(more?.found ?? []), ...(last.found ?? [])], last });
    } catch (error) {
      if (!own.signal.aborted) setWrong(problems(error)[0]?.text ?? null);
    } finally {
      if (own === flight.current) setBusy(false);
    }
  };

  return (
    <section class="explanation-search" aria-label="Search explanations" aria-busy={busy}>
      <form
        onSubmit={(event) => {
          event.preventDefault();
          if (query.trim() !== "") void ask(null);
        }}
      >
        <input
          ref={(field) => {
            if (field && !field.dataset["focused"]) {
              field.dataset["focused"] = "";
              field.focus();
            }
          }}
          class="field query"
          autofocus
          type="search"
          autocomplete="off"
          maxLength={1000}
          aria-label="What is looked for"
          placeholder={
            mode === "SEARCH_MODE_MEANING" ? "names of people" : "words, or their beginnings"
          }
          value={query}
          onInput={(event) => setQuery(event.currentTarget.value)}
        />
        <select
          aria-label="Search by"
          value={mode}
          title={
            meaning
              ? "By words: each of them, or one that begins so, stands in the text. By meaning: what is looked for is sent to another service, see below"
              : "By meaning needs an endpoint for embeddings: TDB_EMBEDDING_URL where the explainer service starts"
          }
          onChange={(event) => setMode(event.currentTarget.value as SearchModeJson)}
        >
          <option value="SEARCH_MODE_WORDS">by words</option>
          <option value="SEARCH_MODE_MEANING" disabled={!meaning}>
            by meaning{meaning ? "" : " (not configured)"}
          </option>
        </select>
        <select
          aria-label="Components"
          value={group}
          onChange={(event) => setGroup(event.currentTarget.value)}
        >
          <option value="">all components</option>
          {groups.map(([name]) => (
            <option key={name} value={name}>
              {name}
            </option>
          ))}
        </select>
        <select
          aria-label="Method"
          value={method}
          onChange={(event) => setMethod(event.currentTarget.value as MethodJson | "")}
        >
          <option value="">by any method</option>
          {METHODS.map((each) => (
            <option key={each} value={each}>
              {methodName(each)}
            </option>
          ))}
        </select>
        <label title={`Else only of ${model.value?.model?.id ?? "the loaded model"}`}>
          <input
            type="checkbox"
            checked={everywhere}
            onChange={(event) => setEverywhere(event.currentTarget.checked)}
          />{" "}
          of all models
        </label>
        <button type="submit" class="small" disabled={busy || query.trim() === ""}>
          {busy ? "searching…" : "search"}
        </button>
        {found && <CopyButtons method="SearchExplanations" request={found.request} />}
      </form>
      {mode === "SEARCH_MODE_MEANING" && (
        <p class="quiet-text">
          What is looked for is sent to <strong>{capabilities.value?.embeddingProvider}</strong> (
          {capabilities.value?.embeddingModel}), which makes an embedding of it.
        </p>
      )}
      {wrong && (
        <p class="error" role="alert">
          {wrong}
        </p>
      )}
      {found ? (
        <Results
          found={found}
          busy={busy}
          onMore={() => void ask(found)}
          onAgain={() => void ask(null)}
          onOpened={onOpened}
        />
      ) : (
        !wrong && (
          <p class="quiet-text">
            {capabilities.value?.explanations
              ? `Finds components among ${count(capabilities.value.explanations, "explanation")} by what is said of them.`
              : "Nothing is explained yet: explain a row of the table, start a job, or import explanations."}
          </p>
        )
      )}
    </section>
  );
}

interface ResultsProps {
  found: Found;
  busy: boolean;
  onMore: () => void;
  /** Asks the same anew. */
  onAgain: () => void;
  onOpened: () => void;
}

function Results({
  found: { request, found, last },
  busy,
  onMore,
  onAgain,
  onOpened,
}: ResultsProps) {
  const { total = 0, nextCursor = "", withoutEmbedding = 0 } = last;
  const here = explainedModel();
  return (
    <>
      <p class="quiet-text" aria-live="polite">
        {total === 0
          ? "Nothing says that; try fewer words, or other kinds and methods."
          : `${found.length} of ${count(total, "explanation")}`}
      </p>
      {withoutEmbedding > 0 && (
        <Embedding missing={withoutEmbedding} model={request.model} onDone={onAgain} />
      )}
      <ul class="found">
        {found.map(({ explanation = {}, relevance }) => {
          const { component = "", text, model: of } = explanation;
          const foreign = of?.id !== here.id;
          return (
            <li key={explanation.id}>
              <button
                type="button"
                class="link"
                disabled={foreign || !isComponent(component)}
                title={foreign ? `Of the model ${of?.id ?? ""}, which is not loaded` : "Open it"}
                onClick={() => {
                  onOpened();
                  openComponent(component);
                }}
              >
                <code>{component}</code>
              </button>
              <span>
                <span title={`relevance ${full(num(relevance) ?? 0)}`}>{text}</span>{" "}
                <Label explanation={explanation} />
                {foreign && <small class="quiet-text"> of {of?.id}</small>}
              </span>
            </li>
          );
        })}
      </ul>
      {nextCursor !== "" && (
        <button type="button" class="small" disabled={busy} onClick={onMore}>
          more
        </button>
      )}
    </>
  );
}
