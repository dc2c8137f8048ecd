/** Explanations that a search by meaning leaves out, and a way to send them to the endpoint for embeddings. */
import { useRef, useState } from "preact/hooks";
import { tokenCount } from "./costs";
import { embedExplanations } from "./explainer";
import type { ExplainedModelJson } from "./gen/tdb/explainer/v1/explanation_pb";
import type { EmbedProgressJson } from "./gen/tdb/explainer/v1/search_pb";
import { count } from "./numbers";
import { problems } from "./problems";
import { useSpending } from "./spending";

interface EmbeddingProps {
  missing: number;
  /** Only of this model; absent: of all. */
  model: ExplainedModelJson | undefined;
  onDone: () => void;
}

export function Embedding({ missing, model, onDone }: EmbeddingProps) {
  const [far, setFar] = useState<EmbedProgressJson | null>(null);
  const [wrong, setWrong] = useState<string | null>(null);
  const flight = useRef<AbortController | null>(null);
  const spending = useSpending("the texts of the explanations");
  const of = model ? { model } : {};
  const start = async (maxTokens: string) => {
    const own = (flight.current = new AbortController());
    setFar({});
    setWrong(null);
    try {
      for await (const event of embedExplanations({ ...of, maxTokens }, own)) {
        const now = event.progress ?? event.summary;
        if (now) setFar(now);
      }
      onDone();
    } catch (error) {
      if (!own.signal.aborted) setWrong(problems(error)[0]?.text ?? null);
    } finally {
      setFar(null);
    }
  };
  return (
    <p class="embedding">
      {count(missing, "explanation")} {missing === 1 ? "has" : "have"} no embedding yet and{" "}
      {missing === 1 ? "was" : "were"} left out.{" "}
      <button
        type="button"
        class="small"
        disabled={spending.busy}
        onClick={() =>
          far
            ? flight.current?.abort()
            : spending.propose(
                { embedExplanations: of },
                (budget) => void start(budget?.maxTokens ?? "0"),
              )
        }
      >
        {far ? "stop" : spending.busy ? "estimating…" : "embed them…"}
      </button>
      {far && (
        <span aria-live="polite">
          {" "}
          <progress
            aria-label="Embedding"
            max={far.total ?? missing}
            value={far.embedded ?? 0}
          />{" "}
          {far.embedded ?? 0} of {far.total ?? missing}, {tokenCount(Number(far.tokens ?? 0))}
        </span>
      )}
      {(wrong ?? spending.problem?.text) && (
        <span class="error" role="alert">
          {" "}
          {wrong ?? spending.problem?.text}
        </span>
      )}
      {spending.question}
    </p>
  );
}
