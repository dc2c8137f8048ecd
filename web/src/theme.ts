/** Dark, light, or as the system says; remembered where the browser allows it. */
import { effect, signal } from "@preact/signals";

/** Each look with its sign in the header. */
export const THEMES = { system: "◐", dark: "●", light: "○" } as const;
export type Theme = keyof typeof THEMES;

const KEY = "tdb.theme";

function remembered(): Theme {
  try {
    const text = localStorage.getItem(KEY);
    return text !== null && text in THEMES ? (text as Theme) : "system";
  } catch {
    return "system"; // storage is switched off
  }
}

export const theme = signal<Theme>("system");

export function nextTheme(): Theme {
  const names = Object.keys(THEMES) as Theme[];
  return names[(names.indexOf(theme.value) + 1) % names.length]!;
}

/** Follows the signal from now on. */
export function applyTheme(): void {
  theme.value = remembered();
  effect(() => {
    document.documentElement.dataset["theme"] = theme.value;
    try {
      localStorage.setItem(KEY, theme.value);
    } catch {
      // storage is switched off: the choice lasts as long as the page
    }
  });
}
