/**
 * The Connect protocol in JSON: one POST per call. What a stream brings comes as server-sent events.
 *
 * A failure of any sort - a refusal by the service, a proxy's HTML page, a dead network, a deadline -
 * becomes one `ConnectError` with a code and a sentence. A call that its caller aborts rejects with the
 * browser's own AbortError, so that nobody mistakes "no longer wanted" for "went wrong".
 */

export interface Violation {
  /** Path in the request, in proto names: `run.interventions[0].target`. */
  field: string;
  description: string;
}

export class ConnectError extends Error {
  override name = "ConnectError";

  constructor(
    readonly code: string,
    message: string,
    readonly violations: Violation[] = [],
    /** What the logs of gateway and services have the request under; "" where no server answered. */
    readonly requestId = "",
  ) {
    super(message);
  }
}

export interface CallOptions {
  signal?: AbortSignal;
  timeoutMs?: number;
}

const TOKEN_KEY = "tdb.token";

/** The bearer token, kept for this tab only. */
export const bearer = {
  get(): string | null {
    return sessionStorage.getItem(TOKEN_KEY);
  },
  set(token: string): void {
    sessionStorage.setItem(TOKEN_KEY, token);
  },
};

/** Address of a method, relative to the page, so that a path prefix is kept. */
export function address(method: string): string {
  return new URL(method, document.baseURI.split(/[?#]/)[0]).href;
}

export async function call<Request, Response>(
  method: string,
  request: Request,
  { signal, timeoutMs = 60_000 }: CallOptions = {},
): Promise<Response> {
  const deadline = AbortSignal.timeout(timeoutMs + 1_000); // the server's own answer comes first
  let status: number;
  let body: unknown;
  try {
    const answer = await fetch(address(method), {
      ...posted(request, timeoutMs),
      signal: signal ? AbortSignal.any([signal, deadline]) : deadline,
    });
    status = answer.status;
    body = parse(await answer.text());
  } catch (error) {
    if (signal?.aborted) throw error;
    if (deadline.aborted) {
      const seconds = Math.round(timeoutMs / 1000);
      throw new ConnectError("deadline_exceeded", `No answer came within ${seconds} seconds.`);
    }
    throw new ConnectError("unavailable", "The server cannot be reached.");
  }
  if (status === 200 && body !== undefined) return body as Response;
  throw failure(status, body);
}

/** The calls of a service, as functions. */
export function callsOf(service: string) {
  return {
    unary:
      <Request, Response>(name: string) =>
      (request: Request, options?: CallOptions): Promise<Response> =>
        call<Request, Response>(`${service}/${name}`, request, options),
    streamed:
      <Request, Response>(name: string) =>
      (request: Request, options?: CallOptions): AsyncGenerator<Response, void> =>
        stream<Request, Response>(`${service}/${name}`, request, options),
  };
}

/**
 * The messages of a stream as they come. Aborting the signal, or leaving the loop, ends the call on the
 * server too.
 */
export async function* stream<Request, Response>(
  method: string,
  request: Request,
  { signal, timeoutMs = 3_600_000 }: CallOptions = {},
): AsyncGenerator<Response, void> {
  const own = new AbortController();
  const { headers, ...rest } = posted(request, timeoutMs);
  try {
    const answer = await fetch(address(method), {
      ...rest,
      headers: { ...headers, accept: "text/event-stream" },
      signal: signal ? AbortSignal.any([signal, own.signal]) : own.signal,
    });
    if (!answer.ok || !answer.body) throw failure(answer.status, parse(await answer.text()));
    for await (const { name, data } of events(answer.body)) {
      const message = parse(data);
      if (name !== "end") {
        yield message as Response;
        continue;
      }
      if (isObject(message) && isObject(message["error"])) throw failure(200, message["error"]);
      return;
    }
    throw new ConnectError("unavailable", "The server broke off before the end.");
  } catch (error) {
    if (signal?.aborted || error instanceof ConnectError) throw error;
    throw new ConnectError("unavailable", "The server cannot be reached.");
  } finally {
    own.abort();
  }
}

interface StreamedEvent {
  name: string;
  data: string;
}

/** The server-sent events of a body; comments keep the connection open and mean nothing. */
export async function* events(body: ReadableStream<Uint8Array>): AsyncGenerator<StreamedEvent> {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let text = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      text += decoder.decode(value, { stream: !done });
      const blocks = text.split("\n\n");
      text = blocks.pop() ?? "";
      for (const block of blocks) {
        const event = { name: "message", data: "" };
        for (const line of block.split("\n")) {
          const [, field, rest = ""] = /^(event|data): ?(.*)$/.exec(line) ?? [];
          if (field === "event") event.name = rest;
          else if (field === "data") event.data += rest;
        }
        if (event.data !== "") yield event;
      }
      if (done) return;
    }
  } finally {
    reader.releaseLock();
  }
}

function posted(request: unknown, timeoutMs: number) {
  const token = bearer.get();
  return {
    method: "POST",
    headers: {
      "content-type": "application/json",
      "connect-protocol-version": "1",
      "connect-timeout-ms": String(timeoutMs),
      ...(token ? { authorization: `Bearer ${token}` } : {}),
    },
    body: JSON.stringify(request),
  };
}

function parse(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

/** Reads a Connect error; what is not one (a proxy's page) is named by its HTTP status. */
export function failure(status: number, body: unknown): ConnectError {
  if (!isObject(body) || typeof body["code"] !== "string") {
    const code = CODES[status] ?? "unknown";
    return new ConnectError(code, `The server answered ${status} without saying why.`);
  }
  const details = Array.isArray(body["details"]) ? body["details"] : [];
  const message = typeof body["message"] === "string" ? body["message"] : "";
  return new ConnectError(
    body["code"],
    message || body["code"],
    details.flatMap(violations),
    details.map(requestId).find((id) => id !== "") ?? "",
  );
}

const CODES: Record<number, string> = {
  401: "unauthenticated",
  403: "permission_denied",
  404: "unimplemented",
  429: "resource_exhausted",
  502: "unavailable",
  503: "unavailable",
  504: "unavailable",
};

function violations(detail: unknown): Violation[] {
  if (!isObject(detail) || !String(detail["type"]).endsWith("google.rpc.BadRequest")) return [];
  const debug = detail["debug"];
  const listed = isObject(debug) ? debug["fieldViolations"] : undefined;
  if (!Array.isArray(listed)) return [];
  return listed.filter(isObject).map((v) => ({
    field: String(v["field"] ?? ""),
    description: String(v["description"] ?? ""),
  }));
}

function requestId(detail: unknown): string {
  if (!isObject(detail) || !String(detail["type"]).endsWith("google.rpc.RequestInfo")) return "";
  const debug = detail["debug"];
  return isObject(debug) ? String(debug["requestId"] ?? "") : "";
}

function isObject(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}
