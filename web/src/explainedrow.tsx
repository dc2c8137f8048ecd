/** In an open row: the whole of the best explanation, with its method and score. */
import { useEffect } from "preact/hooks";
import { site } from "./address";
import { Label } from "./explanationcell";
import { absent, awayProblem, bestOf, capabilities, explainable, lookUp } from "./explanations";
import { datasetFor, explainOffline, phaseWords, runs } from "./explaining";
import { openNode } from "./opening";

// as in theme.css: one line, and where the text needs more, two
const ONE_LINE = 24;
const TWO_LINES = 44;
const CHARACTER = 6.6;
/** Characters of the words beside the text. */
const LABEL = 70;

/** Room the section takes in an open row, whatever is in it: fixed, so that the table's window can count. */
export function explainedHeight(node: string): number {
  if (!explainable(node) || !capabilities.value) return 0;
  const said = bestOf(site(node).component)?.text ?? "";
  return (said.length + LABEL) * CHARACTER > innerWidth ? TWO_LINES : ONE_LINE;
}

export function ExplainedRow({ node }: { node: string }) {
  const { component } = site(node);
  const there = capabilities.value !== null;
  useEffect(() => {
    if (there) void lookUp([component]);
  }, [component, there]);
  if (explainedHeight(node) === 0) return null;
  const found = bestOf(component);
  const run = runs.value.get(component);
  return (
    <section
      class="explained-row"
      aria-label={`What ${component} does`}
      style={{ height: `${explainedHeight(node)}px` }}
    >
      {run && !run.done && !run.scored ? (
        <p class="quiet-text">{phaseWords(run.phase)}…</p>
      ) : found ? (
        <p>
          {found.text} <Label explanation={found} />{" "}
          <button type="button" class="link" onClick={() => openNode(node)}>
            history, other methods, scores
          </button>
        </p>
      ) : found === null ? (
        <p class="quiet-text">
          {run?.problem ? <span class="error">{run.problem.text} </span> : "Not explained yet. "}
          {datasetFor(component) !== null && (
            <button
              type="button"
              class="link"
              title="Learn a token pattern from its examples and score it (e); no language model is asked"
              onClick={() => explainOffline(component)}
            >
              explain it with a token pattern
            </button>
          )}
          {datasetFor(component) !== null && " or "}
          <button type="button" class="link" onClick={() => openNode(node)}>
            open it
          </button>
          {" for other methods."}
        </p>
      ) : (
        <p class="quiet-text">
          {awayProblem.value ? `Explanations: ${awayProblem.value.text}` : "Looking it up…"}
        </p>
      )}
    </section>
  );
}

/** In the table's bar: whether explanations are shown, or a quiet word on why they cannot be. */
export function ExplanationsNote() {
  if (absent.value || capabilities.value || !awayProblem.value) return null;
  return (
    <span class="quiet-text" title={awayProblem.value.text}>
      explanations: the service is away
    </span>
  );
}
