/** Going to a component's own view and back: each a step that the browser's back button undoes. */
import { batch } from "@preact/signals";
import { site } from "./address";
import { currentModel } from "./asking";
import { tokenize } from "./inference";
import type { Passage } from "./passages";
import * as state from "./state";
import { isComponent } from "./url";
import { writeAddress } from "./view";

export function openComponent(component: string, dataset: string | null = null): void {
  state.opened.value = { component, dataset };
  writeAddress(true);
}

export function closeComponent(): void {
  if (!state.opened.value) return;
  state.opened.value = null;
  writeAddress(true);
  requestAnimationFrame(() =>
    document.querySelector<HTMLElement>("[data-chosen] .address")?.focus({ preventScroll: true }),
  );
}

/** Why the node has no view of its own, or nothing if it has. */
export function cannotOpen(node: string): string | undefined {
  return isComponent(site(node).component)
    ? undefined
    : "Only neurons, heads and latents are looked at by themselves.";
}

/** Opens the component of a node, if it has a view. */
export function openNode(node: string): void {
  if (cannotOpen(node) === undefined) openComponent(site(node).component);
}

/** The ids of a passage without the token that the model puts first by itself. */
export function typedIds(
  { ids }: Passage,
  tokenizer: { prependsBos?: boolean; bosId?: number } | undefined,
): number[] {
  return tokenizer?.prependsBos && ids[0] === tokenizer.bosId ? ids.slice(1) : ids;
}

/**
 * Puts a passage's text into the prompt field and goes there; Enter runs it. `exact` says that its ids
 * are the loaded model's, so that characters cut in two by the tokens come out whole.
 */
export async function debugText(passage: Passage, exact: boolean): Promise<void> {
  const ids = typedIds(passage, state.model.value?.tokenizer);
  const dropped = passage.ids.length - ids.length;
  let prompt = passage.texts.slice(dropped).join("");
  if (exact && ids.length > 0) {
    try {
      const answer = await tokenize({ model: currentModel(), prompt: { tokenIds: { ids } } });
      prompt = answer.text ?? prompt;
    } catch {
      // the text of the tokens one by one is as good where no character is cut
    }
  }
  batch(() => {
    state.editDraft({ prompt });
    state.opened.value = null;
  });
  writeAddress(true);
  requestAnimationFrame(() => {
    const field = document.getElementById("prompt");
    if (!(field instanceof HTMLTextAreaElement)) return;
    field.focus();
    field.setSelectionRange(prompt.length, prompt.length);
  });
}
