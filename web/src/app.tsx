/** The workbench: the question on top and always in sight, the answer scrolling below it. */
import { unlock } from "./asking";
import { bearer } from "./connect";
import { ComponentView } from "./componentview";
import { Continuation } from "./continuation";
import { Crumbs } from "./crumbs";
import { FullText } from "./fulltext";
import { Header } from "./header";
import { Interventions } from "./interventions";
import { Logits } from "./logits";
import { Menu } from "./menu";
import { ObjectiveCard } from "./objective";
import { PromptBar } from "./prompt";
import { answer, loading, locked, model, modelProblem, opened, stale } from "./state";
import { NodeTable } from "./table";

export function App() {
  return (
    <>
      <Header />
      <div
        class="progress"
        data-on={loading.value ? "" : undefined}
        role="progressbar"
        aria-label="Asking the model"
        aria-hidden={!loading.value}
      />
      {locked.value && <Unlock />}
      <div class="question">
        <PromptBar />
        <Interventions />
        <Crumbs />
      </div>
      <ComponentView />
      <main
        data-scroller
        hidden={opened.value !== null}
        aria-busy={loading.value}
        data-stale={stale.value ? "" : undefined}
      >
        {answer.value ? (
          <>
            <div class="cards">
              <Logits />
              <ObjectiveCard />
            </div>
            <Continuation />
            <NodeTable />
          </>
        ) : (
          <Blank />
        )}
      </main>
      <Menu />
      <FullText />
    </>
  );
}

function Blank() {
  if (modelProblem.value) return null;
  if (!model.value || loading.value) {
    return <p class="blank">{model.value ? "Asking the model…" : "Looking for the model…"}</p>;
  }
  return (
    <div class="blank">
      <p>
        Type a prompt, name the token it should continue with as the <em>target</em> and a plausible
        wrong one as the <em>distractor</em>, and press Enter.
      </p>
      <p>
        You will see which attention heads and neurons made the difference, and can ablate any of
        them to see what changes.
      </p>
    </div>
  );
}

/** Asks once for the token that the service wants. */
function Unlock() {
  return (
    <form
      class="unlock"
      onSubmit={(event) => {
        event.preventDefault();
        const field = event.currentTarget.elements.namedItem("token") as HTMLInputElement;
        if (field.value.trim()) unlock(field.value.trim());
      }}
    >
      <label for="bearer">
        {bearer.get() === null
          ? "This server asks for a token. It is kept in this tab only."
          : "The server did not accept that token; ask whoever runs it for yours."}
      </label>
      <input id="bearer" name="token" type="password" autocomplete="off" />
      <button type="submit" class="small">
        Continue
      </button>
    </form>
  );
}
