/** The exact request behind an answer, for a terminal or a program. A bearer token is never copied. */
import { useState } from "preact/hooks";
import { address, bearer } from "./connect";
import { supports } from "./features";
import { SERVICE } from "./inference";
import { attributeRequest } from "./requests";
import type { Question } from "./url";

export function curl(url: string, request: unknown, authorised: boolean): string {
  const quote = (text: string) => `'${text.replaceAll("'", `'\\''`)}'`;
  return [
    `curl -sS ${quote(url)}`,
    "-H 'content-type: application/json'",
    ...(authorised ? ['-H "authorization: Bearer $TDB_TOKEN"'] : []),
    `--data-raw ${quote(JSON.stringify(request))}`,
  ].join(" \\\n  ");
}

export function CopyButtons({ question }: { question: Question }) {
  const request = attributeRequest(question, supports("attribute.read_outs"));
  const url = address(`${SERVICE}/Attribute`);
  return (
    <span class="copy">
      <Copy
        label="copy as curl"
        title="Copy a shell command that asks for this table"
        text={() => curl(url, request, bearer.get() !== null)}
      />
      <Copy
        label="copy JSON"
        title="Copy the request as JSON"
        text={() => JSON.stringify(request, null, 2)}
      />
    </span>
  );
}

function Copy({ label, title, text }: { label: string; title: string; text: () => string }) {
  const [said, setSaid] = useState<string | null>(null);
  const onClick = async () => {
    setSaid((await copied(text())) ? "copied" : "not allowed here");
    setTimeout(() => setSaid(null), 1500);
  };
  return (
    <button type="button" class="link" title={title} onClick={() => void onClick()}>
      <span aria-live="polite">{said ?? label}</span>
    </button>
  );
}

/** The clipboard interface exists only in secure contexts; a team's box on plain HTTP is not one. */
async function copied(text: string): Promise<boolean> {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}
