/** A component by itself: what is known of it over a corpus, what it writes and reads, and on any text. */
import { useEffect, useState } from "preact/hooks";
import { site } from "./address";
import { Directions } from "./component";
import { CopyButtons } from "./copy";
import {
  chosen,
  groupOf,
  holds,
  listed,
  otherDictionary,
  otherModel,
  refreshDatasets,
} from "./datasets";
import { Examples, Legend } from "./examples";
import type { DatasetJson } from "./gen/tdb/dataset/v1/dataset_pb";
import type {
  ComponentRecordJson,
  TextScoreJson,
  TokenStatisticJson,
} from "./gen/tdb/dataset/v1/record_pb";
import { holding, Missing } from "./missing";
import { full, num, plain, signed } from "./numbers";
import { closeComponent, openComponent } from "./opening";
import { OwnText } from "./owntext";
import { examples, scales, type Side } from "./passages";
import { problems } from "./problems";
import { record } from "./records";
import { model, opened } from "./state";
import { Statistics } from "./statistics";
import { useLatest } from "./tokenise";
import { visible } from "./tokens";
import { isComponent, type Opened } from "./url";

const MEANS = 12;

export function ComponentView() {
  const shown = opened.value;
  useEffect(() => {
    if (shown !== null) void refreshDatasets(); // what was imported meanwhile is there at once
  }, [shown === null]);
  const loaded = model.value;
  if (!shown || !loaded) return null;
  const named = shown.dataset;
  const dataset = chosen(listed.value?.datasets ?? [], shown.component, loaded, named);
  return <View shown={shown} dataset={dataset} />;
}

function View({ shown, dataset }: { shown: Opened; dataset: DatasetJson | null }) {
  const { component } = shown;
  const pairs = site(component).kind === "head";
  const [side, setSide] = useState<Side>("reads");
  const held = dataset && holds(dataset, component) ? dataset : null;
  const request = { dataset: held?.name ?? "", component };
  const key = held ? `${held.manifestHash} ${held.name} ${component}` : null;
  const { value, error } = useLatest(
    key,
    (signal) => record(request, held?.manifestHash ?? "", signal),
    0,
  );
  const known = held && value?.component === component ? value : null;
  const wrong = held && error && !known ? problems(error)[0]?.text : undefined;
  const all = known ? examples(known) : null;
  const most = all
    ? scales(
        Object.values(all)
          .flat()
          .map((each) => each.passage),
      )
    : null;
  const other = foreign(dataset, component);
  useEffect(() => {
    document.querySelector<HTMLElement>(".component-view")?.focus({ preventScroll: true });
  }, [component]);
  return (
    <main
      class="component-view"
      aria-label={`Component ${component}`}
      aria-busy={held !== null && !known && !wrong}
      tabIndex={-1}
      data-component={component}
    >
      <header>
        <button
          type="button"
          class="link"
          title="Back to the node table (Esc)"
          onClick={closeComponent}
        >
          ‹ table
        </button>
        <Address key={component} component={component} />
        <Neighbours component={component} dataset={shown.dataset} />
        <DatasetChoice component={component} dataset={dataset} />
        {held && <CopyButtons method="GetRecord" request={request} />}
      </header>
      {other && (
        <p class="error" role="alert">
          The records of {dataset?.name} are about {other}; {model.value?.model?.id} is loaded, so
          they say nothing of its {component}.
        </p>
      )}
      <div class="component-columns">
        <aside>
          {known && <Statistics statistics={known.statistics ?? {}} pairs={pairs} />}
          <Directions component={component} onChoose={(each) => openComponent(each)} />
          {known && <Means record={known} />}
          {known && <Listed record={known} />}
        </aside>
        <div class="component-main">
          <OwnText
            key={component}
            component={component}
            side={side}
            recorded={other ? null : most}
          />
          {known && all && most ? (
            <>
              <Legend scales={most} side={side} pairs={pairs} onSide={setSide} />
              <Examples
                key={component}
                all={all}
                scales={most}
                side={side}
                exact={!other && (held?.hasTokenIds ?? false)}
              />
            </>
          ) : wrong ? (
            <div class="missing">
              <p class="error" role="alert">
                {wrong}
              </p>
              <p class="quiet-text">The dataset’s other records are served all the same.</p>
            </div>
          ) : held ? (
            <p class="quiet-text missing">Reading the record…</p>
          ) : (
            <div class="missing">
              {dataset ? (
                <p>
                  The dataset {dataset.name} has no record of {component}.{" "}
                  {holding(dataset, component)}
                </p>
              ) : (
                <Missing
                  component={component}
                  named={shown.dataset}
                  onChoose={(name) => openComponent(component, name)}
                />
              )}
            </div>
          )}
        </div>
      </div>
    </main>
  );
}

/** Why the dataset is not about this component of the loaded model. */
function foreign(dataset: DatasetJson | null, component: string): string | undefined {
  const loaded = model.value;
  if (!dataset || !loaded) return undefined;
  return otherModel(dataset, loaded) ?? otherDictionary(dataset, component, loaded);
}

/** The title, which is a field: another address goes there. */
function Address({ component }: { component: string }) {
  const [text, setText] = useState(component);
  const bad = text !== component && !isComponent(text.trim());
  return (
    <form
      onSubmit={(event) => {
        event.preventDefault();
        if (isComponent(text.trim())) openComponent(text.trim(), opened.value?.dataset ?? null);
      }}
    >
      <h2 class="unseen">{component}</h2>
      <input
        class="field address"
        type="text"
        spellcheck={false}
        autocomplete="off"
        aria-label="Component; another address goes there"
        title="neuron.LAYER.INDEX, head.LAYER.INDEX or latent.DICTIONARY.INDEX; Enter goes there"
        aria-invalid={bad}
        size={Math.max(14, text.length + 1)}
        value={text}
        onInput={(event) => setText(event.currentTarget.value)}
      />
    </form>
  );
}

function Neighbours({ component, dataset }: { component: string; dataset: string | null }) {
  const { group, index } = groupOf(component);
  const end = sizeOf(group);
  const step = (to: number, name: string, sign: string) => (
    <button
      type="button"
      class="small"
      aria-label={`${name} component`}
      disabled={to < 0 || (end !== undefined && to >= end)}
      onClick={() => openComponent(`${group}.${to}`, dataset)}
    >
      {sign}
    </button>
  );
  return (
    <span class="segments">
      {step(index - 1, "Previous", "‹")}
      {step(index + 1, "Next", "›")}
    </span>
  );
}

/** How many components the group has in the loaded model. */
function sizeOf(group: string): number | undefined {
  const { dimensions, dictionaries = [] } = model.value ?? {};
  if (group.startsWith("neuron.")) return dimensions?.neurons;
  if (group.startsWith("head.")) return dimensions?.heads;
  return dictionaries.find(({ id }) => group === `latent.${id}`)?.latents;
}

function DatasetChoice({ component, dataset }: { component: string; dataset: DatasetJson | null }) {
  const all = listed.value?.datasets ?? [];
  if (all.length === 0) return null;
  return (
    <label>
      dataset{" "}
      <select
        value={dataset?.name ?? ""}
        onChange={(event) => openComponent(component, event.currentTarget.value)}
      >
        {!dataset && <option value="">none has it</option>}
        {all.map(({ name }) => (
          <option key={name} value={name}>
            {name}
          </option>
        ))}
      </select>
    </label>
  );
}

interface RecordProps {
  record: ComponentRecordJson;
}

/** The tokens at which it is strongest on average. */
function Means({ record: { tokenStatistics = [], keyTokenStatistics = [] } }: RecordProps) {
  if (tokenStatistics.length === 0 && keyTokenStatistics.length === 0) return null;
  const pairs = keyTokenStatistics.length > 0;
  const chips = (name: string, meaning: string, all: TokenStatisticJson[]) =>
    all.length > 0 && (
      <>
        <dt title={meaning}>{name}</dt>
        <dd>
          {all.slice(0, MEANS).map(({ tokenId = 0, tokenText = "", count, mean }) => (
            <span
              key={tokenId}
              class="chip"
              title={`token ${tokenId}: ${full(num(mean) ?? 0)} on average, counted ${count ?? 0} times`}
            >
              <span class="token">{visible(tokenText) || `<${tokenId}>`}</span>{" "}
              <small>{plain(num(mean) ?? 0)}</small>
            </span>
          ))}
        </dd>
      </>
    );
  return (
    <section aria-label="Tokens by mean activation">
      <h2>strongest on average</h2>
      <dl class="read-outs">
        {chips(
          pairs ? "by the token that reads" : "at the token",
          "Tokens with the largest mean activation over the corpus",
          tokenStatistics,
        )}
        {chips("by the token that is read", "The same by the key of the pair", keyTokenStatistics)}
      </dl>
    </section>
  );
}

/** Tokens that the records' source lists, where it does. */
function Listed({ record: { promoted = [], suppressed = [] } }: RecordProps) {
  if (promoted.length === 0 && suppressed.length === 0) return null;
  const chips = (name: string, scores: TextScoreJson[]) =>
    scores.length > 0 && (
      <>
        <dt title="As the source of the records lists them: logits per unit of activation">
          {name}
        </dt>
        <dd>
          {scores.map(({ text = "", score }, i) => (
            <span key={i} class="chip" title={full(num(score) ?? 0)}>
              <span class="token">{visible(text)}</span> <small>{signed(num(score) ?? 0)}</small>
            </span>
          ))}
        </dd>
      </>
    );
  return (
    <section aria-label="Tokens listed by the source">
      <h2>by the records’ source</h2>
      <dl class="read-outs">
        {chips("promotes", promoted)}
        {chips("suppresses", suppressed)}
      </dl>
    </section>
  );
}
