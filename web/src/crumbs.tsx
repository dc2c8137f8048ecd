/** What is being explained: the objective, and the chain of nodes traced upstream from it. */
import { removeStep, traceBackTo } from "./editing";
import { asked, problemsAt } from "./state";
import { formula } from "./meaning";
import { stepWords } from "./trace";
import { beside } from "./url";

export function Crumbs() {
  const question = asked.value;
  const trace = question?.trace ?? [];
  const last = trace.length - 1;
  return (
    <section class="bar crumbs" aria-label="Tracing">
      <span class="name">tracing</span>
      <ol class="edits">
        <li>
          <button
            type="button"
            class={trace.length > 0 ? "link" : "link here"}
            disabled={trace.length === 0}
            title={trace.length > 0 ? "Back to the objective itself" : "This is the objective"}
            onClick={() => traceBackTo(0)}
          >
            {question ? formula(question) : "the objective"}
          </button>
        </li>
        {trace.length === 0 && (
          <li class="hint">
            press <kbd>t</kbd> on a row to ask what made that node what it is
          </li>
        )}
        {trace.map((step, index) => {
          const wrong = problemsAt("trace", last - index)[0]?.text;
          const here = index === last;
          return (
            <li key={`${index} ${stepWords(step)}`}>
              <span class="arrow" aria-label="which was made by">
                ‹
              </span>
              <span class="chip edit" data-wrong={wrong ? "" : undefined}>
                <button
                  type="button"
                  class={here ? "link here" : "link"}
                  disabled={here}
                  aria-current={here ? "step" : undefined}
                  title={
                    here ? "This node's value is the objective now" : `Back to ${stepWords(step)}`
                  }
                  onClick={() => traceBackTo(index + 1)}
                >
                  {stepWords(step)}
                </button>
                <button
                  type="button"
                  class="remove"
                  aria-label={`Stop tracing ${stepWords(step)}`}
                  onClick={() => removeStep(index)}
                >
                  ×
                </button>
              </span>
              {wrong && (
                <span class="error" role="alert">
                  {wrong}
                  {question && beside(question) === "b" && " It must exist in prompt B as well."}
                </span>
              )}
            </li>
          );
        })}
      </ol>
    </section>
  );
}
