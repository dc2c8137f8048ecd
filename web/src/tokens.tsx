/** Tokens as a reader sees them: monospaced, white space visible, the position one hover away. */
import { site } from "./address";
import type { TokenJson } from "./gen/tdb/type/v1/token_pb";

const VISIBLE: Record<string, string> = { " ": "␣", "\n": "⏎", "\r": "␍", "\t": "⇥" };

/** The text with its white space made visible. */
export function visible(text: string): string {
  return text.replace(/[ \n\r\t]/g, (space) => VISIBLE[space]!);
}

/** What was typed or pasted: a visible space stands for a space. */
export function typed(text: string): string {
  return text.replaceAll("␣", " ");
}

export function TokenText({ token }: { token: TokenJson | undefined }) {
  const text = visible(token?.text ?? "");
  return <span class="token">{text === "" ? `<${token?.id ?? 0}>` : text}</span>;
}

/** A token of the prompt beside its position, as the table names places. */
export function TokenAt({ tokens, position }: { tokens: TokenJson[]; position: number }) {
  return (
    <span class="token-at" title={`token ${position}`}>
      <TokenText token={tokens[position]} />
      <sub>{position}</sub>
    </span>
  );
}

/** Where a node sits: `to ← Mary` for a pair, the token for the rest. */
export function Place({ node, tokens }: { node: string; tokens: TokenJson[] }) {
  const { position, key } = site(node);
  if (position === undefined) return null;
  return (
    <>
      <TokenAt tokens={tokens} position={position} />
      {key !== undefined && (
        <>
          <span class="arrow">←</span>
          <TokenAt tokens={tokens} position={key} />
        </>
      )}
    </>
  );
}

interface StripProps {
  label: string;
  tokens: TokenJson[];
  /** Whether the table is filtered to a token. */
  chosen?: ((position: number) => boolean) | undefined;
  /** Absent while the tokens are not those of the answer. */
  onChoose?: ((position: number, more: boolean) => void) | undefined;
}

/** A prompt's tokens in a row; choosing one filters the table to it. */
export function TokenStrip({ label, tokens, chosen, onChoose }: StripProps) {
  return (
    <ol class="strip" aria-label={label}>
      {tokens.map((token, position) => {
        const title = `token ${position}, id ${token.id ?? 0}`;
        const on = chosen?.(position) ?? false;
        return (
          <li key={position}>
            {onChoose ? (
              <button
                type="button"
                class="chip token"
                aria-pressed={on}
                title={`${title}; click to list only nodes that read or write here, Shift-click to add it`}
                onClick={(event) => onChoose(position, event.shiftKey)}
              >
                <TokenText token={token} />
                <span class="number">{position}</span>
              </button>
            ) : (
              <span class="chip token" title={title}>
                <TokenText token={token} />
                <span class="number">{position}</span>
              </span>
            )}
          </li>
        );
      })}
    </ol>
  );
}
