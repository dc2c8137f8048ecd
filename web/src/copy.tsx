/** The exact request behind an answer, for a terminal or a program. A bearer token is never copied. */
import { useState } from "preact/hooks";
import { address, bearer } from "./connect";
import { DATASET_SERVICE } from "./dataset";
import { EXPLAINER_SERVICE } from "./explainer";
import { SERVICE } from "./inference";

export function curl(url: string, request: unknown, authorised: boolean, streams = false): string {
  const quote = (text: string) => `'${text.replaceAll("'", `'\\''`)}'`;
  return [
    `curl -sS${streams ? "N" : ""} ${quote(url)}`,
    "-H 'content-type: application/json'",
    ...(streams ? ["-H 'accept: text/event-stream'"] : []),
    ...(authorised ? ['-H "authorization: Bearer $TDB_TOKEN"'] : []),
    `--data-raw ${quote(JSON.stringify(request))}`,
  ].join(" \\\n  ");
}

/** The same as a program of the standard library. */
export function python(
  url: string,
  request: unknown,
  authorised: boolean,
  streams: boolean,
): string {
  return [
    "import json",
    ...(authorised ? ["import os"] : []),
    "import urllib.request",
    "",
    `body = json.loads(${JSON.stringify(JSON.stringify(request))})`,
    `headers = {"content-type": "application/json"${streams ? ', "accept": "text/event-stream"' : ""}}`,
    ...(authorised ? ['headers["authorization"] = "Bearer " + os.environ["TDB_TOKEN"]'] : []),
    `call = urllib.request.Request(${JSON.stringify(url)}, json.dumps(body).encode(), headers)`,
    ...(streams
      ? [
          "with urllib.request.urlopen(call) as answer:",
          "    for line in answer:",
          '        if line.startswith(b"data: "):',
          '            print(json.loads(line.removeprefix(b"data: ")))',
        ]
      : ["with urllib.request.urlopen(call) as answer:", "    result = json.load(answer)"]),
    "",
  ].join("\n");
}

/** The buttons of a view: its exact request for a terminal, a program, or to read. */
export function CopyButtons({ method, request }: { method: Method; request: unknown }) {
  const { service, rpc = method, streams = false } = (calls() as Record<Method, Call>)[method];
  const url = address(`${service}/${rpc}`);
  const authorised = bearer.get() !== null;
  return (
    <span class="copy">
      <Copy
        label="copy as curl"
        title="Copy a shell command that asks for this"
        text={() => curl(url, request, authorised, streams)}
      />
      <Copy
        label="copy as Python"
        title="Copy a Python program that asks for this; it needs nothing installed"
        text={() => python(url, request, authorised, streams)}
      />
      <Copy
        label="copy JSON"
        title="Copy the request as JSON"
        text={() => JSON.stringify(request, null, 2)}
      />
    </span>
  );
}

interface Call {
  service: string;
  /** Where it is not the call's own name. */
  rpc?: string;
  streams?: boolean;
}

/** Asked for when it is needed: a test may load this without the services. */
const calls = () =>
  ({
    Attribute: { service: SERVICE },
    Generate: { service: SERVICE, streams: true },
    DescribeComponent: { service: SERVICE },
    GetRecord: { service: DATASET_SERVICE },
    Search: { service: DATASET_SERVICE },
    Explain: { service: EXPLAINER_SERVICE, streams: true },
    ExplainMany: { service: EXPLAINER_SERVICE, streams: true },
    SearchExplanations: { service: EXPLAINER_SERVICE, rpc: "Search" },
  }) as const satisfies Record<string, Call>;
type Method = keyof ReturnType<typeof calls>;

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
