/** Components by statistics, by the token at which they peak, or by the text of their top examples. */
import { useRef, useState } from "preact/hooks";
import { readNumber } from "./actions";
import { CopyButtons } from "./copy";
import { search } from "./dataset";
import { otherModel } from "./datasets";
import type { DatasetJson } from "./gen/tdb/dataset/v1/dataset_pb";
import type {
  FoundComponentJson,
  SearchRequestJson,
  SearchResponseJson,
  StatisticJson,
  StatisticRangeJson,
} from "./gen/tdb/dataset/v1/search_pb";
import { count, full, num, percent, plain } from "./numbers";
import { openComponent } from "./opening";
import { problems } from "./problems";
import { model } from "./state";
import { typed } from "./tokens";

const STATISTICS = {
  STATISTIC_MAX: { name: "max", of: "max" },
  STATISTIC_MEAN: { name: "mean", of: "mean" },
  STATISTIC_VARIANCE: { name: "variance", of: "variance" },
  STATISTIC_SKEWNESS: { name: "skewness", of: "skewness" },
  STATISTIC_KURTOSIS: { name: "kurtosis", of: "kurtosis" },
  STATISTIC_FRACTION_ACTIVE: { name: "fraction active", of: "fractionActive" },
} as const satisfies Partial<Record<StatisticJson, { name: string; of: string }>>;
type Statistic = keyof typeof STATISTICS;
const ALL = Object.keys(STATISTICS) as Statistic[];

export interface Wanted {
  dataset: string;
  /** One of the dataset's groups; empty: all. */
  group: string;
  statistic: Statistic;
  atLeast: string;
  atMost: string;
  /** Empty: the dataset's own order. */
  orderBy: Statistic | "";
  ascending: boolean;
  token: string;
  text: string;
}

const PAGE = 50;

/** The request for what stands in the fields; throws a sentence where a number is none. */
export function searchRequest(wanted: Wanted): SearchRequestJson {
  const end = (text: string) => {
    if (text.trim() === "") return undefined;
    const x = readNumber(text);
    if (x === null) throw new Error(`“${text}” is no number; type one such as 0.01.`);
    return x;
  };
  const [atLeast, atMost] = [end(wanted.atLeast), end(wanted.atMost)];
  const range: StatisticRangeJson = {
    statistic: wanted.statistic,
    ...(atLeast === undefined ? {} : { atLeast }),
    ...(atMost === undefined ? {} : { atMost }),
  };
  return {
    dataset: wanted.dataset,
    limit: PAGE,
    ...(wanted.group === "" ? {} : { groups: [wanted.group] }),
    ...(atLeast === undefined && atMost === undefined ? {} : { ranges: [range] }),
    ...(wanted.token === "" ? {} : { peakToken: { text: typed(wanted.token) } }),
    ...(wanted.text === "" ? {} : { text: wanted.text }),
    ...(wanted.orderBy === "" ? {} : { orderBy: wanted.orderBy, ascending: wanted.ascending }),
  };
}

interface Found {
  request: SearchRequestJson;
  components: FoundComponentJson[];
  last: SearchResponseJson;
}

interface SearchProps {
  datasets: readonly DatasetJson[];
  onOpened: () => void;
}

export function DatasetSearch({ datasets, onOpened }: SearchProps) {
  const loaded = model.value;
  const own = datasets.find((each) => loaded && otherModel(each, loaded) === undefined);
  const [wanted, setWanted] = useState<Wanted>({
    dataset: (own ?? datasets[0])?.name ?? "",
    group: "",
    statistic: "STATISTIC_FRACTION_ACTIVE",
    atLeast: "",
    atMost: "",
    orderBy: "STATISTIC_MAX",
    ascending: false,
    token: "",
    text: "",
  });
  const [found, setFound] = useState<Found | null>(null);
  const [wrong, setWrong] = useState<string | null>(null);
  const [busy, setBusy] = useState(false);
  const flight = useRef<AbortController | null>(null);
  const change = (part: Partial<Wanted>) => setWanted((now) => ({ ...now, ...part }));
  const dataset = datasets.find(({ name }) => name === wanted.dataset);

  const ask = async (more: Found | null) => {
    flight.current?.abort();
    const now = (flight.current = new AbortController());
    setBusy(true);
    setWrong(null);
    try {
      const request = more?.request ?? searchRequest(wanted);
      const cursor = more?.last.nextCursor;
      const last = await search({ ...request, ...(cursor ? { cursor } : {}) }, now);
      if (now.signal.aborted) return;
      const components = [...(more?.components ?? []), ...(last.components ?? [])];
      setFound({ request, components, last });
    } catch (error) {
      if (!now.signal.aborted) setWrong(problems(error)[0]?.text ?? null);
    } finally {
      if (now === flight.current) setBusy(false);
    }
  };

  const field = (name: "atLeast" | "atMost" | "token" | "text", label: string, hint: string) => (
    <label>
      {label}{" "}
      <input
        class="field"
        type="text"
        autocomplete="off"
        placeholder={hint}
        value={wanted[name]}
        onInput={(event) => change({ [name]: event.currentTarget.value })}
      />
    </label>
  );
  return (
    <section class="dataset-search" aria-label="Search" aria-busy={busy}>
      <form
        onSubmit={(event) => {
          event.preventDefault();
          void ask(null);
        }}
      >
        <label>
          in{" "}
          <select
            aria-label="Dataset"
            value={wanted.dataset}
            onChange={(event) => change({ dataset: event.currentTarget.value, group: "" })}
          >
            {datasets.map(({ name }) => (
              <option key={name} value={name}>
                {name}
              </option>
            ))}
          </select>
        </label>
        <select
          aria-label="Components"
          value={wanted.group}
          onChange={(event) => change({ group: event.currentTarget.value })}
        >
          <option value="">all components</option>
          {(dataset?.groups ?? []).map(({ name }) => (
            <option key={name} value={name}>
              {name}
            </option>
          ))}
        </select>
        <StatisticChoice
          label="Statistic"
          value={wanted.statistic}
          onChoose={(statistic) => statistic && change({ statistic })}
        />
        {field("atLeast", "≥", "0")}
        {field("atMost", "≤", "0.01")}
        {field("token", "peaks at token", "␣Mary")}
        {field("text", "text", "in a top example")}
        <StatisticChoice
          label="Order by"
          none="in order"
          value={wanted.orderBy}
          onChoose={(orderBy) => change({ orderBy })}
        />
        <button
          type="button"
          class="small"
          disabled={wanted.orderBy === ""}
          aria-label={wanted.ascending ? "Smallest first" : "Largest first"}
          title={wanted.ascending ? "Smallest first" : "Largest first"}
          onClick={() => change({ ascending: !wanted.ascending })}
        >
          {wanted.ascending ? "▲" : "▼"}
        </button>
        <button type="submit" class="small" disabled={busy}>
          {busy ? "searching…" : "search"}
        </button>
        {found && <CopyButtons method="Search" request={found.request} />}
      </form>
      {wrong && (
        <p class="error" role="alert">
          {wrong}
        </p>
      )}
      {found && (
        <Results found={found} busy={busy} onMore={() => void ask(found)} onOpened={onOpened} />
      )}
    </section>
  );
}

interface ChoiceProps {
  label: string;
  value: Statistic | "";
  /** What stands for no statistic; absent where there must be one. */
  none?: string;
  onChoose: (statistic: Statistic | "") => void;
}

function StatisticChoice({ label, value, none, onChoose }: ChoiceProps) {
  return (
    <select
      aria-label={label}
      value={value}
      onChange={(event) => onChoose(event.currentTarget.value as Statistic | "")}
    >
      {none !== undefined && <option value="">{none}</option>}
      {ALL.map((each) => (
        <option key={each} value={each}>
          {none === undefined ? "" : "by "}
          {STATISTICS[each].name}
        </option>
      ))}
    </select>
  );
}

interface ResultsProps {
  found: Found;
  busy: boolean;
  onMore: () => void;
  onOpened: () => void;
}

function Results({ found: { request, components, last }, busy, onMore, onOpened }: ResultsProps) {
  const { nextCursor = "", candidates = 0, damaged = [], damagedGroups = [] } = last;
  const lost = [...damaged, ...damagedGroups];
  const told = request.text
    ? `${count(components.length, "component")} found`
    : `${components.length} of ${count(candidates, "component")}`;
  return (
    <>
      <p class="quiet-text" aria-live="polite">
        {told}
        {components.length === 0 && nextCursor === "" && ": nothing meets this; widen it"}
        {components.length === 0 && nextCursor !== "" && " so far; go on"}
      </p>
      {lost.length > 0 && <p class="error">Damaged, so left out: {lost.join(", ")}</p>}
      {components.length > 0 && (
        <table>
          <thead>
            <tr>
              <th scope="col">component</th>
              {ALL.map((each) => (
                <th key={each} scope="col">
                  {STATISTICS[each].name}
                </th>
              ))}
            </tr>
          </thead>
          <tbody>
            {components.map(({ component = "", statistics }) => (
              <tr key={component}>
                <th scope="row">
                  <button
                    type="button"
                    class="link"
                    onClick={() => {
                      onOpened();
                      openComponent(component, request.dataset ?? null);
                    }}
                  >
                    <code>{component}</code>
                  </button>
                </th>
                {ALL.map((each) => {
                  const x = num(statistics?.[STATISTICS[each].of]);
                  const write = each === "STATISTIC_FRACTION_ACTIVE" ? percent : plain;
                  return (
                    <td key={each} title={x === undefined ? "not stated" : full(x)}>
                      {x === undefined ? "–" : write(x)}
                    </td>
                  );
                })}
              </tr>
            ))}
          </tbody>
        </table>
      )}
      {nextCursor !== "" && (
        <button type="button" class="small" disabled={busy} onClick={onMore}>
          more
        </button>
      )}
    </>
  );
}
