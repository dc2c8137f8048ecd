/** The table's headings: each sorts by its column, and the field below it filters by it. */
import { nextSort, QUANTITIES, type Column, type Words } from "./columns";
import { columnShown } from "./explanations";
import { columnName } from "./filters";
import { plain } from "./numbers";
import { filters, sort } from "./state";
import { activeFilters, cols, ends, setFilter } from "./view";

const WORDS = {
  node: {
    title: "The node's address",
    hint: "head 2.3",
    help: "Filter by parts of the address, any of them: head, neuron, embed, head.2, ~13-1",
  },
  says: {
    title:
      "What its component does: the best explanation there is, how it was made, and what it is worth",
    hint: "words in it",
    help: "Filter by words in the explanation, its method or score, all of them; none for rows without one",
  },
  at: {
    title: "The token the node writes at; for a head, ← the token it reads from",
    hint: "13, 5..8",
    help: "Filter by token positions that the node reads or writes at: 13, or 1, 3, or 5..8",
  },
} as const;

export function Headings() {
  return (
    <tr>
      <Heading col={{ id: "node" }} kind="node" title={WORDS.node.title} name="node" />
      <Heading col={{ id: "at" }} kind="at" title={WORDS.at.title} name="at" />
      {columnShown.value && (
        <Heading
          col={{ id: "says" }}
          kind="explains"
          title={WORDS.says.title}
          name="what it does"
        />
      )}
      {cols.value.map((col) => {
        const { name, definition, effect } = QUANTITIES[col.quantity];
        const end = `${effect ? "±" : "≤"}${plain(ends.value.get(col.quantity) ?? 0)}`;
        return (
          <Heading
            key={col.id}
            col={col}
            kind={`figure ${col.side} ${col.quantity}`}
            title={`${definition}. The colour scale ends at ${end.replace("≤", "")}.`}
            name={name}
            side={col.label}
            end={end}
          />
        );
      })}
      <th scope="col" class="act">
        <span class="unseen">actions</span>
      </th>
    </tr>
  );
}

interface HeadingProps {
  col: Column | Words;
  kind: string;
  title: string;
  name: string;
  side?: string;
  end?: string;
}

function Heading({ col, kind, title, name, side, end }: HeadingProps) {
  const now = sort.value;
  const mine = now?.column === col.id ? now.by : null;
  const order = mine === "up" ? "ascending" : mine ? "descending" : "none";
  const marks = { size: "|▾|", down: "▾", up: "▴" };
  return (
    <th scope="col" class={kind} aria-sort={order}>
      <div class="heading" title={title}>
        <button type="button" onClick={() => (sort.value = nextSort(now, col))}>
          {name}
          {mine && <span aria-hidden="true"> {marks[mine]}</span>}
          {side && <span class="side"> {side}</span>}
        </button>
        {end && <small class="end">{end}</small>}
      </div>
      <FilterField id={col.id} />
    </th>
  );
}

function FilterField({ id }: { id: string }) {
  const words = id === "node" || id === "at" || id === "says" ? WORDS[id] : null;
  const problem = activeFilters.value.find((filter) => filter.id === id)?.problem;
  const text = filters.value[id] ?? "";
  return (
    <input
      id={id === "node" ? "filter-node" : undefined}
      class="filter"
      type="text"
      autocomplete="off"
      spellcheck={false}
      size={1}
      placeholder={words?.hint ?? "|x| ≥"}
      aria-label={`Filter by ${columnName(id, cols.value)}`}
      aria-invalid={problem !== undefined}
      title={problem ?? words?.help ?? "0.5 for |x| ≥ 0.5; + or - for a sign; > 0.5, <= -1"}
      value={text}
      onInput={(event) => setFilter(id, event.currentTarget.value)}
      onKeyDown={(event) => {
        if (event.key === "Escape") {
          if (text === "") event.currentTarget.blur();
          else setFilter(id, "");
        } else if (event.key === "Enter") event.currentTarget.blur();
      }}
    />
  );
}
