/** Why there are no records to see, and what would bring them. */
import { isUnderWay } from "./builds";
import type { DatasetJson } from "./gen/tdb/dataset/v1/dataset_pb";
import { groupOf, holds, listed, listProblem, otherModel, refreshDatasets } from "./datasets";
import { BuildProgress } from "./progress";
import { model } from "./state";

/** Where a dataset comes from, as commands. */
export function HowToGetOne() {
  return (
    <p class="quiet-text">
      A dataset says, for each component, which texts of a corpus made it fire.{" "}
      <code>tdb dataset build NAME --files FOLDER --tokens 2000000</code> builds one from a corpus,
      and <code>tdb dataset import NAME FOLDER --format openai|neuronpedia</code> takes over others’
      records; <code>--help</code> says more. It is here as soon as it is whole.
    </p>
  );
}

interface MissingProps {
  component: string;
  named: string | null;
  onChoose: (dataset: string) => void;
}

export function Missing({ component, named, onChoose }: MissingProps) {
  const found = listed.value;
  if (!found) return <Away />;
  const { datasets = [], unreadable = [], builds = [] } = found;
  const own = builds.filter(({ dataset, model: of }) =>
    named === null ? of === model.value?.model?.id : dataset === named,
  );
  if (own.length > 0)
    return (
      <>
        <p>The records of {component} may come with a dataset that is not finished:</p>
        <ul>
          {own.map((build) => (
            <li key={build.dataset}>
              <strong>{build.dataset}</strong> <BuildProgress build={build} />
            </li>
          ))}
        </ul>
        {own.some(isUnderWay) && (
          <p class="quiet-text">They appear here by themselves when it is.</p>
        )}
      </>
    );
  const broken = unreadable.find(({ name }) => name === named);
  if (broken)
    return (
      <p class="error" role="alert">
        The dataset {named} cannot be read: {broken.reason}
      </p>
    );
  if (named !== null && !datasets.some(({ name }) => name === named))
    return (
      <>
        <p role="alert">There is no dataset named {named}.</p>
        <Others datasets={datasets} component={component} onChoose={onChoose} />
      </>
    );
  if (datasets.length === 0)
    return (
      <>
        <p>There is no dataset yet, so what makes {component} fire is not known.</p>
        <HowToGetOne />
      </>
    );
  return (
    <>
      <p>No dataset has records of {component} in the loaded model.</p>
      <Others datasets={datasets} component={component} onChoose={onChoose} />
      <HowToGetOne />
    </>
  );
}

function Away() {
  const problem = listProblem.value;
  if (!problem) return <p class="quiet-text">Looking for datasets…</p>;
  return (
    <p class="error" role="alert">
      No records without the dataset service: {problem.text}{" "}
      <button type="button" class="small" onClick={() => void refreshDatasets()}>
        Try again
      </button>
    </p>
  );
}

interface OthersProps {
  datasets: readonly DatasetJson[];
  component: string;
  onChoose: (dataset: string) => void;
}

/** The datasets there are, each with why it was not chosen. */
function Others({ datasets, component, onChoose }: OthersProps) {
  const loaded = model.value;
  return (
    <ul>
      {datasets.map((each) => {
        const other = loaded ? otherModel(each, loaded) : undefined;
        const has = holds(each, component);
        return (
          <li key={each.name}>
            <button
              type="button"
              class="link"
              disabled={!has}
              onClick={() => onChoose(each.name ?? "")}
            >
              {each.name}
            </button>{" "}
            {other ? `is about ${other}. ` : ""}
            {has ? "" : holding(each, component)}
          </li>
        );
      })}
    </ul>
  );
}

/** What the dataset has in place of the component. */
export function holding({ groups = [] }: DatasetJson, component: string): string {
  const { group } = groupOf(component);
  const own = groups.find(({ name }) => name === group);
  if (own) return `Of ${group} it has ${own.first ?? 0} to ${own.last ?? 0}.`;
  const names = groups.map(({ name }) => name);
  const shown = names.slice(0, 6).join(", ");
  return `It has ${shown}${names.length > 6 ? ` and ${names.length - 6} more groups` : ""}.`;
}
