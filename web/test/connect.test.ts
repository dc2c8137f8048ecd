// A stream as the gateway writes it, however the network cuts it up.
import { afterEach, expect, test, vi } from "vitest";
import { ConnectError, events, stream } from "../src/connect";

vi.stubGlobal("sessionStorage", { getItem: () => null });
vi.stubGlobal("document", { baseURI: "http://box/prefix/#x" });
afterEach(() => vi.restoreAllMocks());

async function all<T>(each: AsyncIterable<T>): Promise<T[]> {
  const found: T[] = [];
  for await (const one of each) found.push(one);
  return found;
}

function body(text: string, size: number): ReadableStream<Uint8Array> {
  const bytes = new TextEncoder().encode(text);
  return new ReadableStream({
    start(controller) {
      for (let at = 0; at < bytes.length; at += size)
        controller.enqueue(bytes.slice(at, at + size));
      controller.close();
    },
  });
}

const text =
  'data: {"node":{"node":"é"}}\n\n: keep-alive\n\ndata: {"n":2}\n\nevent: end\ndata: {}\n\n';

test.each([1, 2, 7, 1000])("events survive pieces of %i bytes", async (size) => {
  const found = await all(events(body(text, size)));
  expect(found).toEqual([
    { name: "message", data: '{"node":{"node":"é"}}' },
    { name: "message", data: '{"n":2}' },
    { name: "end", data: "{}" },
  ]);
});

async function streamed(answer: string, status = 200): Promise<unknown[]> {
  vi.stubGlobal("fetch", () => Promise.resolve(new Response(body(answer, 5), { status })));
  return all(stream("x.Y/Z", {}));
}

test("a stream's messages end with its end", async () => {
  expect(await streamed(text)).toEqual([{ node: { node: "é" } }, { n: 2 }]);
});

test.each([
  ['event: end\ndata: {"error":{"code":"invalid_argument","message":"no"}}\n\n', 200, "no"],
  ['data: {"n":1}\n\n', 200, "The server broke off before the end."],
  ['{"code":"unauthenticated","message":"a token is needed"}', 401, "a token is needed"],
])("%s is a failure", async (answer, status, message) => {
  const error = await streamed(answer, status).catch((error: unknown) => error);
  expect(error).toBeInstanceOf(ConnectError);
  expect((error as ConnectError).message).toBe(message);
});

test("leaving the loop ends the call", async () => {
  let signal: AbortSignal | undefined;
  vi.stubGlobal("fetch", (_: string, options: { signal: AbortSignal }) => {
    signal = options.signal;
    return Promise.resolve(new Response(body(text, 5)));
  });
  for await (const _ of stream("x.Y/Z", {})) break;
  expect(signal?.aborted).toBe(true);
});
