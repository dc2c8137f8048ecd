/** What a row's component does, in the table: the text, how it was made and its score; or a way to explain it. */
import { site } from "./address";
import { datasetFor, explainOffline, phaseWords, runs } from "./explaining";
import { bestOf, explainable } from "./explanations";
import type { ExplanationJson } from "./gen/tdb/explainer/v1/explanation_pb";
import { fullTextOff, fullTextOn } from "./fulltext";
import { openComponent } from "./opening";
import { label, mainScore, scoreTitle } from "./worth";

export function ExplanationCell({ node, lines }: { node: string; lines: number }) {
  const { component } = site(node);
  return (
    <td class="explains" rowSpan={lines}>
      {explainable(node) && <Says component={component} />}
    </td>
  );
}

function Says({ component }: { component: string }) {
  const found = bestOf(component);
  const run = runs.value.get(component);
  if (run && !run.done && !run.explanation && !run.scored)
    return <span class="hint">{phaseWords(run.phase)}…</span>;
  if (found) return <Known component={component} found={found} />;
  if (run?.problem)
    return (
      <span class="error" title={run.problem.text}>
        {run.problem.text}
      </span>
    );
  return found === null ? <ExplainButton component={component} /> : null;
}

function Known({ component, found }: { component: string; found: ExplanationJson }) {
  return (
    <div class="said">
      <button
        type="button"
        class="link text"
        aria-label={`${found.text} (${label(found)}). Open ${component}`}
        onClick={(event) => {
          event.stopPropagation();
          fullTextOff();
          openComponent(component);
        }}
        onMouseEnter={(event) => fullTextOn(found, event.currentTarget, true)}
        onMouseLeave={fullTextOff}
        onFocus={(event) => fullTextOn(found, event.currentTarget, false)}
        onBlur={fullTextOff}
      >
        {found.text}
      </button>
      <Label explanation={found} />
    </div>
  );
}

/** Method and score; what was not made by us is marked as such. */
export function Label({ explanation }: { explanation: ExplanationJson }) {
  const method = explanation.provenance?.method;
  const theirs = method === "METHOD_HUMAN" || method === "METHOD_IMPORTED";
  const score = mainScore(explanation);
  const [how, ...worth] = label(explanation).split(" · ");
  return (
    <small class="label" title={score ? scoreTitle(score) : "No score says what it is worth"}>
      <span class={theirs ? "origin theirs" : "origin"}>{how}</span> · {worth.join(" · ")}
    </small>
  );
}

function ExplainButton({ component }: { component: string }) {
  const dataset = datasetFor(component);
  return (
    <button
      type="button"
      class="small quiet explain"
      disabled={dataset === null}
      title={
        dataset === null
          ? `No dataset has examples of ${component}`
          : `Learn a token pattern of ${component} from its examples in ${dataset} and score it; no language model is asked. Open it for other methods`
      }
      aria-label={`Explain ${component}`}
      onClick={(event) => {
        event.stopPropagation();
        explainOffline(component);
      }}
    >
      explain
    </button>
  );
}
