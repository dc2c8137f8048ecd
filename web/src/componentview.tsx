/** A component by itself: what is known of it over a corpus, what it writes and reads, and on any text. */
import { useEffect, useState } from "preact/hooks";
import { site } from "./address";
import { Directions } from "./component";
import { Address, DatasetChoice, Neighbours } from "./componenthead";
import { CopyButtons } from "./copy";
import { chosen, holds, listed, otherDictionary, otherModel, refreshDatasets } from "./datasets";
import { Examples, Legend } from "./examples";
import type { DatasetJson } from "./gen/tdb/dataset/v1/dataset_pb";
import { ExplanationPanel } from "./explanationpanel";
import { holding, Missing } from "./missing";
import { closeComponent, openComponent } from "./opening";
import { OwnText } from "./owntext";
import { examples, scales, type Side } from "./passages";
import { problems } from "./problems";
import { record } from "./records";
import { RecordTokens } from "./recordtokens";
import { model, opened } from "./state";
import { Statistics } from "./statistics";
import { useLatest } from "./tokenise";
import type { Opened } from "./url";

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
  const [tries, setTries] = useState(0);
  const key = held ? `${held.manifestHash} ${held.name} ${component} ${tries}` : null;
  const latest = useLatest(key, (signal) => record(request, held?.manifestHash ?? "", signal), 0);
  const wrong = held && latest.error && latest.key === key ? problems(latest.error)[0] : undefined;
  const arrived = held !== null && latest.key === key && !wrong;
  // The record before stays, dimmed, until the new one is there: nothing jumps.
  const before = latest.value && site(latest.value.component ?? "").kind === site(component).kind;
  const known = arrived || (held && !wrong && before) ? latest.value : null;
  const all = known ? examples(known) : null;
  const most = all
    ? scales(
        Object.values(all)
          .flat()
          .map((each) => each.passage),
      )
    : null;
  const waiting = arrived ? undefined : "";
  const other = foreign(dataset, component);
  useEffect(() => {
    document.querySelector<HTMLElement>(".component-view")?.focus({ preventScroll: true });
  }, [component]);
  return (
    <main
      class="component-view"
      aria-label={`Component ${component}`}
      aria-busy={held !== null && !arrived && !wrong}
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
      <ExplanationPanel
        key={component}
        component={component}
        dataset={other ? null : (held?.name ?? null)}
      />
      <div class="component-columns">
        <aside>
          {known && (
            <div data-waiting={waiting}>
              <Statistics statistics={known.statistics ?? {}} pairs={pairs} />
              <RecordTokens record={known} />
            </div>
          )}
          <Directions component={component} onChoose={(each) => openComponent(each)} />
        </aside>
        <div class="component-main">
          <OwnText
            key={component}
            component={component}
            side={side}
            recorded={other || !arrived ? null : most}
          />
          {known && all && most ? (
            <div data-waiting={waiting}>
              <Legend scales={most} side={side} pairs={pairs} onSide={setSide} />
              <Examples
                key={component}
                all={all}
                scales={most}
                side={side}
                exact={!other && (held?.hasTokenIds ?? false)}
              />
            </div>
          ) : wrong ? (
            <div class="missing">
              <p class="error" role="alert">
                {wrong.text}{" "}
                {wrong.retry && (
                  <button type="button" class="small" onClick={() => setTries((n) => n + 1)}>
                    Try again
                  </button>
                )}
              </p>
              {!wrong.retry && (
                <p class="quiet-text">The dataset’s other records are served all the same.</p>
              )}
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
