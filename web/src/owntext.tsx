/** Try your own text: the model runs it, and the component's values on it are shown as an example's are. */
import { useEffect, useRef, useState } from "preact/hooks";
import { valuesOn, whereabouts } from "./activations";
import { currentModel } from "./asking";
import { describe } from "./examples";
import { whyNot } from "./features";
import { Heatmap, Scale } from "./heatmap";
import { plain } from "./numbers";
import { scales, type Passage, type Scales, type Side } from "./passages";
import { problems } from "./problems";
import { draft } from "./state";

const ATTENTION = "attention probability";

interface OwnTextProps {
  component: string;
  side: Side;
  /** Of the record, so that the colours mean the same as in the examples; of a head they cannot. */
  recorded: Scales | null;
}

export function OwnText({ component, side, recorded }: OwnTextProps) {
  const [typed, setText] = useState<string | null>(null);
  const text = typed ?? draft.value.prompt;
  const [found, setFound] = useState<Passage | null>(null);
  const [wrong, setWrong] = useState<string | null>(null);
  const [busy, setBusy] = useState(false);
  const flight = useRef<AbortController | null>(null);
  useEffect(() => () => flight.current?.abort(), []);
  const where = whereabouts(component);
  const why =
    whyNot("stream_activations") ??
    (where ? undefined : "The loaded model serves no dictionary with this latent.");

  const run = async () => {
    flight.current?.abort();
    const own = (flight.current = new AbortController());
    setBusy(true);
    setWrong(null);
    try {
      const passage = await valuesOn(currentModel(), component, text, own.signal);
      if (!own.signal.aborted) setFound(passage);
    } catch (error) {
      if (!own.signal.aborted) setWrong(problems(error)[0]?.text ?? null);
    } finally {
      if (own === flight.current) setBusy(false);
    }
  };

  const unit = where?.pairs ? ATTENTION : "activation";
  const own = found ? scales([found]) : null;
  const used = own && recorded && !where?.pairs ? widest(own, recorded) : own;
  return (
    <section class="own-text" aria-label="Your own text" aria-busy={busy}>
      <form
        onSubmit={(event) => {
          event.preventDefault();
          if (text !== "" && why === undefined) void run();
        }}
      >
        <label for="own-text">try your own text</label>
        <input
          id="own-text"
          class="field"
          type="text"
          autocomplete="off"
          placeholder="Text to run the model on"
          value={text}
          disabled={why !== undefined}
          onInput={(event) => setText(event.currentTarget.value)}
        />
        <button type="submit" class="small" disabled={text === "" || busy || why !== undefined}>
          {busy ? "running…" : "run"}
        </button>
      </form>
      {why && <p class="quiet-text">{why}</p>}
      {wrong && (
        <p class="error" role="alert">
          {wrong}
        </p>
      )}
      {found && used && (
        <div data-waiting={busy ? "" : undefined}>
          <Heatmap
            passage={found}
            scales={used}
            side={side}
            unit={unit}
            label={describe(found, "Your text", unit)}
          />
          <p class="legend">
            <Scale most={used.token[side]} of={where?.pairs ? `${ATTENTION}, summed` : unit} />
            {where?.pairs ? (
              <span class="quiet-text">
                Attention only: without the size of what is written, so colours differ from the
                examples’
              </span>
            ) : (
              recorded && (
                <span class="quiet-text">
                  largest here {plain(own?.pair ?? 0)}, in the records {plain(recorded.pair)}
                </span>
              )
            )}
          </p>
        </div>
      )}
    </section>
  );
}

function widest(one: Scales, other: Scales): Scales {
  const most = Math.max(one.pair, other.pair);
  return { pair: most, token: { reads: most, "is read": most } };
}
