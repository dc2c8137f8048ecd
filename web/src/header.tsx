/** The top line: which model, on what; what went wrong, if it concerns no field; the look. */
import { start, switchModel } from "./asking";
import { DatasetsButton } from "./datasetlist";
import { change } from "./editing";
import { ExplanationsButton } from "./explanationlibrary";
import { LibraryButton } from "./library";
import { plain } from "./numbers";
import { draft, loading, model, modelProblem, models, problemsAt } from "./state";
import { nextTheme, theme, THEMES } from "./theme";
import { Waiting } from "./waiting";

export function Header() {
  const facts = model.value;
  const { layers = 0, heads = 0, neurons = 0, width = 0, vocabulary = 0 } = facts?.dimensions ?? {};
  const dtype = (facts?.dataType ?? "").replace("DATA_TYPE_", "").toLowerCase();
  return (
    <header class="top">
      <h1 title="Transformer Debugger">tdb</h1>
      {facts && (
        <p class="facts">
          {models.value.length > 1 ? (
            <select
              aria-label="Model"
              value={facts.model?.id ?? ""}
              disabled={loading.value}
              title="Choosing asks the same question of the other model, without interventions"
              onChange={(event) => void switchModel(event.currentTarget.value)}
            >
              {models.value.map((id) => (
                <option key={id} value={id}>
                  {id}
                </option>
              ))}
            </select>
          ) : (
            <strong>{facts.model?.id}</strong>
          )}
          <span
            title={`${layers} layers of ${heads} heads and ${neurons} neurons, width ${plain(width)}, vocabulary ${vocabulary}`}
          >
            {layers} layers
          </span>
          <span class="minor" title="Data type of weights and activations">
            {dtype}
          </span>
          <span
            class="minor"
            title={`Device, as the service names it; weights ${facts.model?.weightsHash ?? ""}`}
          >
            {facts.device}
          </span>
          <LibraryButton />
          <DatasetsButton />
          <ExplanationsButton />
        </p>
      )}
      <Notices />
      {facts && <Waiting />}
      <button
        type="button"
        class="quiet theme"
        aria-label={`Colours: ${theme.value}. Change to ${nextTheme()}`}
        title={`Colours: ${theme.value}; click for ${nextTheme()}`}
        onClick={() => (theme.value = nextTheme())}
      >
        {THEMES[theme.value]}
      </button>
    </header>
  );
}

/** What concerns no single field: one sentence, and a way to try again where that may help. */
function Notices() {
  const homeless = draft.value.compare === null ? problemsAt("compare") : [];
  const all = [
    ...(modelProblem.value ? [modelProblem.value] : []),
    ...problemsAt("page"),
    ...homeless,
  ];
  return (
    <div class="notices" aria-live="assertive">
      {all.map(({ text, retry }) => (
        <p key={text} class="notice error" role="alert">
          {text}{" "}
          {(retry || !model.value) && (
            <button
              type="button"
              class="small"
              onClick={() => (model.value ? change(() => ({})) : void start())}
            >
              Try again
            </button>
          )}
        </p>
      ))}
    </div>
  );
}
