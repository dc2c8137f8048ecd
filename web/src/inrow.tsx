/** In an open row: the texts at which its component fires most, one line each. */
import { site } from "./address";
import { describable } from "./component";
import { chosen, listed, listProblem } from "./datasets";
import { describe, strongest } from "./examples";
import type { DatasetJson } from "./gen/tdb/dataset/v1/dataset_pb";
import type { GetRecordRequestJson } from "./gen/tdb/dataset/v1/read_pb";
import { Heatmap } from "./heatmap";
import { plain } from "./numbers";
import { openNode } from "./opening";
import { around, examples, scales } from "./passages";
import { problems } from "./problems";
import { record } from "./records";
import { model } from "./state";
import { useLatest } from "./tokenise";

const SHOWN = 3;
const LINE = 22; // as in theme.css
/** Whoever moves through the rows with a key asks only for the row where he stays. */
const PAUSE_MS = 200;

/** Room the section takes in an open row, whatever is in it: fixed, so that the table's window can count. */
export function inRowHeight(node: string): number {
  if (!describable(node)) return 0;
  return datasetOf(node) ? (SHOWN + 1) * LINE : LINE;
}

function datasetOf(node: string): DatasetJson | null {
  const loaded = model.value;
  if (!loaded) return null;
  return chosen(listed.value?.datasets ?? [], site(node).component, loaded, null);
}

/** The record; of a head with one value per token, which is a fraction of its pairs. */
function request(dataset: string, node: string): GetRecordRequestJson {
  const { component, kind } = site(node);
  const view = { pairForm: "PAIR_FORM_QUERY_MAX" } as const;
  return { dataset, component, ...(kind === "head" ? { view } : {}) };
}

export function InRowExamples({ node }: { node: string }) {
  const dataset = datasetOf(node);
  const { component, kind } = site(node);
  const wanted = dataset ? `${dataset.manifestHash} ${dataset.name} ${component}` : null;
  const { value, error, key } = useLatest(
    wanted,
    (signal) => record(request(dataset?.name ?? "", node), dataset?.manifestHash ?? "", signal),
    PAUSE_MS,
  );
  const known = key === wanted && !error ? value : null;
  const wrong = error ? problems(error)[0]?.text : undefined;
  const passages = known ? examples(known).top.map(({ passage }) => passage) : [];
  const most = scales(passages);
  const unit = kind === "head" ? "write magnitude, the largest that it reads" : "activation";
  return (
    <section
      class="in-row"
      aria-label={`Where ${component} fires most`}
      aria-busy={dataset !== null && !known && !wrong}
      style={{ height: `${inRowHeight(node)}px` }}
    >
      <p>
        <span class="quiet-text">{dataset ? `fires most in ${dataset.name}` : absent()} </span>
        <button
          type="button"
          class="link"
          title="All examples, statistics, and your own text (o)"
          onClick={() => openNode(node)}
        >
          open {component}
        </button>
      </p>
      {wrong && <p class="error">{wrong}</p>}
      {known && passages.length === 0 && <p class="quiet-text">never, over the whole corpus</p>}
      {passages.slice(0, SHOWN).map((passage, i) => (
        <div key={i} class="in-row-line">
          <span class="figure">{plain(strongest(passage))}</span>
          <Heatmap
            passage={around(passage)}
            scales={most}
            side="reads"
            unit={unit}
            label={describe(passage, `Top example ${i + 1}`, unit)}
          />
        </div>
      ))}
    </section>
  );
}

function absent(): string {
  if (listed.value) return "no dataset has records of it";
  return listProblem.value ? "the dataset service is away" : "looking for datasets…";
}
