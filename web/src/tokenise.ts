/**
 * How a text tokenises, asked of the service and remembered: each text of a model is asked for once.
 *
 * `useTokens` follows a text that is being typed. It waits for a pause, drops answers to texts that are
 * no longer there, and keeps showing the last tokens meanwhile.
 */
import { useEffect, useState } from "preact/hooks";
import type { TokenizeResponseJson } from "./gen/tdb/inference/v1/model_pb";
import type { TokenJson } from "./gen/tdb/type/v1/token_pb";
import { tokenize } from "./inference";

const PAUSE_MS = 120;
const REMEMBERED = 500;
const memory = new Map<string, TokenJson[]>();

/** Tokens of a text. A `single` is a target or distractor: no beginning-of-sequence token goes first. */
export async function tokens(
  model: string,
  text: string,
  { single = false, signal }: { single?: boolean; signal?: AbortSignal } = {},
): Promise<TokenJson[]> {
  if (text === "") return [];
  const key = JSON.stringify([model, text, single]);
  const known = memory.get(key);
  if (known) return known;
  const answer: TokenizeResponseJson = await tokenize(
    {
      ...(model ? { model } : {}),
      prompt: { text, ...(single ? { prependBos: false } : {}) },
    },
    { timeoutMs: 10_000, ...(signal ? { signal } : {}) },
  );
  const found = answer.tokens ?? [];
  if (memory.size >= REMEMBERED) memory.clear();
  memory.set(key, found);
  return found;
}

/** What a text is as a target, and which spelling of it would be one token if it is not. */
export interface Reading {
  text: string;
  tokens: TokenJson[];
  /** The same text with a leading space more or less, where that is one token. */
  instead?: string;
}

export async function reading(model: string, text: string, signal?: AbortSignal): Promise<Reading> {
  const options = { single: true, ...(signal ? { signal } : {}) };
  const other = text.startsWith(" ") ? text.slice(1) : ` ${text}`;
  const [own, others] = await Promise.all([
    tokens(model, text, options),
    tokens(model, other, options),
  ]);
  return { text, tokens: own, ...(others.length === 1 ? { instead: other } : {}) };
}

/** Runs `ask` for the newest key after a pause and returns the last result; `null` clears it. */
export function useLatest<T>(
  key: string | null,
  ask: (signal: AbortSignal) => Promise<T>,
  pause = PAUSE_MS,
): { value: T | null; error: unknown; key: string | null } {
  const [state, setState] = useState<{ value: T | null; error: unknown; key: string | null }>({
    value: null,
    error: null,
    key: null,
  });
  useEffect(() => {
    if (key === null) {
      setState({ value: null, error: null, key });
      return;
    }
    const control = new AbortController();
    const timer = setTimeout(() => {
      ask(control.signal).then(
        (value) => control.signal.aborted || setState({ value, error: null, key }),
        (error: unknown) =>
          control.signal.aborted || setState((old) => ({ value: old.value, error, key })),
      );
    }, pause);
    return () => {
      clearTimeout(timer);
      control.abort();
    };
  }, [key]);
  return state;
}

export function useTokens(model: string, text: string): { tokens: TokenJson[]; error: unknown } {
  const { value, error } = useLatest(text === "" ? null : `${model}\0${text}`, (signal) =>
    tokens(model, text, { signal }),
  );
  return { tokens: value ?? [], error };
}
