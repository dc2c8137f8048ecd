/** The head of a component's view: which one, its neighbours, and whose records. */
import { useState } from "preact/hooks";
import { groupOf, listed } from "./datasets";
import type { DatasetJson } from "./gen/tdb/dataset/v1/dataset_pb";
import { openComponent } from "./opening";
import { model, opened } from "./state";
import { isComponent } from "./url";

/** The title, which is a field: another address goes there. */
export function Address({ component }: { component: string }) {
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

export function Neighbours({ component, dataset }: { component: string; dataset: string | null }) {
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

export function DatasetChoice({
  component,
  dataset,
}: {
  component: string;
  dataset: DatasetJson | null;
}) {
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
