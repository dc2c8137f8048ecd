/** In the library: a job that explains a range of a dataset's group. */
import { useState } from "preact/hooks";
import { listed, otherModel } from "./datasets";
import { JobForm } from "./jobform";
import { model } from "./state";

export function RangeJob({ onStarted }: { onStarted: () => void }) {
  const loaded = model.value;
  const datasets = (listed.value?.datasets ?? []).filter(({ groups = [] }) => groups.length > 0);
  const first = datasets.find((each) => loaded && otherModel(each, loaded) === undefined);
  const [name, setName] = useState<string | null>(null);
  const [group, setGroup] = useState<string | null>(null);
  const [ends, setEnds] = useState<[string, string] | null>(null);
  const dataset = datasets.find((each) => each.name === name) ?? first ?? datasets[0];
  const groups = dataset?.groups ?? [];
  const own = groups.find((each) => each.name === group) ?? groups[0];
  if (!dataset || !own)
    return (
      <p class="quiet-text">There is no dataset, and without examples there is nothing to learn.</p>
    );
  const [from, to] = ends ?? [String(own.first ?? 0), String(own.last ?? 0)];
  const bad = wrongRange(from, to, own.first ?? 0, own.last ?? 0);
  const field = (label: string, text: string, change: (text: string) => void) => (
    <label>
      {label}{" "}
      <input
        class="field number"
        type="text"
        inputMode="numeric"
        autocomplete="off"
        aria-invalid={bad !== undefined}
        value={text}
        onInput={(event) => change(event.currentTarget.value)}
      />
    </label>
  );
  return (
    <>
      <p class="about">
        <label>
          dataset{" "}
          <select
            value={dataset.name ?? ""}
            onChange={(event) => {
              setName(event.currentTarget.value);
              setGroup(null);
              setEnds(null);
            }}
          >
            {datasets.map((each) => (
              <option key={each.name} value={each.name ?? ""}>
                {each.name}
              </option>
            ))}
          </select>
        </label>
        <label>
          group{" "}
          <select
            value={own.name ?? ""}
            onChange={(event) => {
              setGroup(event.currentTarget.value);
              setEnds(null);
            }}
          >
            {groups.map((each) => (
              <option key={each.name} value={each.name ?? ""}>
                {each.name}
              </option>
            ))}
          </select>
        </label>
        {field("from", from, (text) => setEnds([text, to]))}
        {field("to", to, (text) => setEnds([from, text]))}
      </p>
      {bad ? (
        <p class="error" role="alert">
          {bad}
        </p>
      ) : (
        <JobForm
          key={`${dataset.name} ${own.name}`}
          dataset={dataset.name ?? ""}
          about={{ range: { first: `${own.name}.${+from}`, last: `${own.name}.${+to}` } }}
          onStarted={onStarted}
        />
      )}
    </>
  );
}

/** What is wrong with the ends of a range, or nothing. */
export function wrongRange(
  from: string,
  to: string,
  first: number,
  last: number,
): string | undefined {
  const whole = /^\d{1,9}$/;
  if (!whole.test(from.trim()) || !whole.test(to.trim()))
    return "The ends of the range are whole numbers.";
  if (+from > +to) return `The range ends before it begins: ${+from} is after ${+to}.`;
  if (+from < first || +to > last) return `The dataset holds ${first} to ${last}.`;
  return undefined;
}
