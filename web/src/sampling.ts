/** How a prompt is continued, as the fields and a link hold it. */

export interface Sampling {
  /** Tokens at most. */
  tokens: number;
  /** 0: the likeliest token each time. */
  temperature: number;
  /** Null: a fresh one each time. Means nothing at temperature 0. */
  seed: number | null;
  /** Whether to go on past the end-of-sequence token. */
  pastEnd: boolean;
}

export const DEFAULT_SAMPLING: Sampling = {
  tokens: 24,
  temperature: 0,
  seed: null,
  pastEnd: false,
};

/** `&continue=24,0.8,7`; nothing where all is as usual. */
export function encodeSampling(how: Sampling): string {
  const { tokens, temperature, seed, pastEnd } = how;
  if (JSON.stringify(how) === JSON.stringify(DEFAULT_SAMPLING)) return "";
  const parts = [tokens, temperature, ...(seed === null ? [] : [seed])];
  return `&continue=${parts.join(",")}${pastEnd ? "&past_end" : ""}`;
}

/** The sampling in an address; throws a sentence if it is malformed. */
export function decodeSampling(hash: string): Sampling {
  const query = new URLSearchParams(hash.replace(/^#/, ""));
  const text = query.get("continue");
  if (text === null) return DEFAULT_SAMPLING;
  const [, tokens, temperature, seed] =
    /^(\d{1,6}),(\d+\.?\d*|\.\d+)(?:,(\d{1,10}))?$/.exec(text) ?? [];
  if (tokens === undefined || Number(tokens) < 1)
    throw new Error(
      `This link continues the prompt by “${text}”; it takes tokens, temperature and seed, like 24,0.8,7.`,
    );
  return {
    tokens: Number(tokens),
    temperature: Number(temperature),
    seed: seed === undefined ? null : Number(seed),
    pastEnd: query.has("past_end"),
  };
}
