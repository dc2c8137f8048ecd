/** The whole of an explanation that a narrow cell cuts off, beside what is pointed at or focused. */
import { signal } from "@preact/signals";
import { useEffect, useLayoutEffect, useRef } from "preact/hooks";
import type { ExplanationJson } from "./gen/tdb/explainer/v1/explanation_pb";
import { label, mainScore, scoreTitle } from "./worth";

const PAUSE_MS = 250;

const shown = signal<{ explanation: ExplanationJson; of: HTMLElement } | null>(null);
let timer: ReturnType<typeof setTimeout> | undefined;

/** Shows it beside the element, after a pause for whoever only passes over. */
export function fullTextOn(explanation: ExplanationJson, of: HTMLElement, pause: boolean): void {
  clearTimeout(timer);
  timer = setTimeout(() => (shown.value = { explanation, of }), pause ? PAUSE_MS : 0);
}

export function fullTextOff(): void {
  clearTimeout(timer);
  shown.value = null;
}

/** Drawn once, above everything. */
export function FullText() {
  const box = useRef<HTMLDivElement>(null);
  const now = shown.value;
  useLayoutEffect(() => {
    const element = box.current;
    if (!now || !element) return;
    const of = now.of.getBoundingClientRect();
    const { width, height } = element.getBoundingClientRect();
    const below = of.bottom + 4;
    element.style.left = `${Math.max(4, Math.min(of.left, innerWidth - width - 4))}px`;
    element.style.top = `${below + height > innerHeight ? Math.max(4, of.top - height - 4) : below}px`;
  }, [now]);
  useEffect(() => {
    if (!now) return;
    const away = (event: Event) => {
      if (!(event instanceof KeyboardEvent) || event.key === "Escape") fullTextOff();
    };
    addEventListener("scroll", away, true);
    addEventListener("keydown", away, true);
    return () => {
      removeEventListener("scroll", away, true);
      removeEventListener("keydown", away, true);
    };
  }, [now]);
  if (!now) return null;
  const score = mainScore(now.explanation);
  return (
    <div ref={box} class="full-text" role="tooltip">
      <p>{now.explanation.text}</p>
      <p class="quiet-text">
        {label(now.explanation)}
        {score && <small>{scoreTitle(score)}</small>}
      </p>
    </div>
  );
}
