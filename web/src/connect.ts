/**
 * The Connect protocol, unary and in JSON: one POST per call.
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
  const headers: Record<string, string> = {
    "content-type": "application/json",
    "connect-protocol-version": "1",
    "connect-timeout-ms": String(timeoutMs),
  };
  const token = bearer.get();
  if (token) headers["authorization"] = `Bearer ${token}`;

  const deadline = AbortSignal.timeout(timeoutMs + 1_000); // the server's own answer comes first
  let status: number;
  let body: unknown;
  try {
    const answer = await fetch(address(method), {
      method: "POST",
      headers,
      body: JSON.stringify(request),
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
  return new ConnectError(body["code"], message || body["code"], details.flatMap(violations));
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

function isObject(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}
