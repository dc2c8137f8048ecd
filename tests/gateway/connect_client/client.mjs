// The official Connect client against a gateway: node client.mjs BASE_URL SCENARIO
// Prints one line of JSON: what the client saw.

import { Code, ConnectError, createClient } from "@connectrpc/connect";
import { createConnectTransport } from "@connectrpc/connect-web";
import { EchoService } from "./gen/echo_pb.js";
import { BadRequestSchema, RetryInfoSchema } from "./gen/google/rpc/error_details_pb.js";
import { InferenceService } from "./gen/tdb/inference/v1/service_pb.js";

const [baseUrl, scenario] = process.argv.slice(2);
const transport = createConnectTransport({ baseUrl });
const echo = createClient(EchoService, transport);
const inference = createClient(InferenceService, transport);

function seen(reason) {
  const error = ConnectError.from(reason);
  return {
    code: Code[error.code],
    message: error.rawMessage,
    fields: error
      .findDetails(BadRequestSchema)
      .flatMap((bad) => bad.fieldViolations.map((violation) => violation.field)),
    retrySeconds: error
      .findDetails(RetryInfoSchema)
      .map((retry) => Number(retry.retryDelay.seconds)),
    retryAfter: error.metadata.get("retry-after"),
  };
}

async function refusal(call) {
  try {
    await call();
  } catch (reason) {
    return { error: seen(reason) };
  }
  return { error: null };
}

async function reading(request, options, onMessage) {
  const messages = [];
  try {
    for await (const message of echo.items(request, options)) {
      messages.push([message.index, message.text]);
      onMessage?.();
    }
  } catch (reason) {
    return { messages, error: seen(reason) };
  }
  return { messages, error: null };
}

const scenarios = {
  async unary() {
    const answer = await echo.echo({ text: "a b é" });
    return {
      text: answer.text,
      size: String(answer.size),
      isBigInt: typeof answer.size === "bigint",
    };
  },
  async models() {
    const answer = await inference.listModels({});
    return { names: answer.models };
  },
  refused: () => refusal(() => echo.echo({ text: "refused" })),
  busy: () => refusal(() => echo.echo({ text: "busy" })),
  timeout: () => refusal(() => echo.echo({ text: "slow" }, { timeoutMs: 1500 })),
  stream: () => reading({ text: "x", count: 5 }),
  streamError: () => reading({ text: "busy", count: 2 }),
  streamRefused: () => reading({ text: "refused", count: 0 }),
  streamTimeout: () => reading({ text: "slow", count: 1 }, { timeoutMs: 1500 }),
  async cancel() {
    const leaving = new AbortController();
    return reading({ text: "slow", count: 1 }, { signal: leaving.signal }, () => leaving.abort());
  },
};

console.log(JSON.stringify(await scenarios[scenario]()));
