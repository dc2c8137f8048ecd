/** What users think of an explanation, 1 (wrong) to 5 (right), and the visitor's own word. */
import { useState } from "preact/hooks";
import { rateExplanation } from "./explainer";
import { refresh } from "./explanations";
import type { ExplanationJson } from "./gen/tdb/explainer/v1/explanation_pb";
import { count, num } from "./numbers";
import { problems } from "./problems";

const MEANS = ["wrong", "mostly wrong", "half right", "mostly right", "right"];

export function Rating({ explanation }: { explanation: ExplanationJson }) {
  const { id = "", component = "", ratings = {} } = explanation;
  const [wrong, setWrong] = useState<string | null>(null);
  const { count: raters = 0, own } = ratings;
  const mean = num(ratings.mean);
  const rate = async (rating: number | null) => {
    setWrong(null);
    try {
      await rateExplanation({ id, ...(rating === null ? {} : { rating }) });
      await refresh(component);
    } catch (error) {
      setWrong(problems(error)[0]?.text ?? null);
    }
  };
  return (
    <span class="rating">
      <span role="radiogroup" aria-label="Your rating">
        <span class="quiet-text">rate</span>
        {MEANS.map((meaning, i) => (
          <label
            key={meaning}
            title={`${i + 1}: ${meaning}`}
            data-on={own === i + 1 ? "" : undefined}
          >
            <input
              type="radio"
              class="unseen"
              name={`rating-${id}`}
              aria-label={`${i + 1}, ${meaning}`}
              checked={own === i + 1}
              onChange={() => void rate(i + 1)}
            />
            {i + 1}
          </label>
        ))}
      </span>
      {own !== undefined && (
        <button type="button" class="link" onClick={() => void rate(null)}>
          take back
        </button>
      )}
      <span class="quiet-text" aria-live="polite">
        {mean === undefined ? "" : `${mean.toFixed(1)} by ${count(raters, "user")}`}
      </span>
      {wrong && (
        <span class="error" role="alert">
          {wrong}
        </span>
      )}
    </span>
  );
}
