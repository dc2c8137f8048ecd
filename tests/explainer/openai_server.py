"""A local server that speaks OpenAI's chat completions and embeddings as the real ones do, without
a model.

It checks what the real API checks (key, model, parameters, the rules for strict schemas) and
answers in the same shapes, streamed or whole. What the "model" says is a function of the request;
what goes wrong is a queue of faults, each for one request.
"""

import json
import math
import random
import re
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

KEY, MODEL = "sk-test-0123456789", "test-model"
EMBEDDING_MODEL = "test-embedding"
MOST_INPUTS = 2048

Alternatives = Sequence[tuple[str, float]]


@dataclass(frozen=True)
class Said:
    """What the model says: text, or tokens with their alternatives (text, probability)."""

    text: str = ""
    tokens: Sequence[tuple[str, Alternatives]] = ()
    refusal: str = ""
    finish: str = "stop"

    @property
    def pieces(self) -> list[tuple[str, Alternatives]]:
        if self.tokens:
            return list(self.tokens)
        return [(piece, ((piece, 1.0),)) for piece in re.findall(r"\d+|\s*\w+|\W", self.text)]


@dataclass(frozen=True)
class Fault:
    """What one request meets instead of the model, or on its way to it."""

    status: int = 200
    error: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    body: str | None = None
    reply: str | None = None
    delay_s: float = 0.0
    hang_up: bool = False
    stop_stream_after: int | None = None
    no_usage: bool = False


def too_many(retry_after: str = "") -> Fault:
    headers = {"retry-after": retry_after} if retry_after else {}
    return Fault(429, {"message": "Rate limit", "code": "rate_limit_exceeded"}, headers)


def failing(status: int = 500) -> Fault:
    return Fault(status, {"message": "The server had an error"})


class OpenAIServer:
    """Runs on a free port of loopback while its context is open.

    `requests`: the bodies it took; `answered`: those whose reply it sent, to somebody who was still
    there.
    """

    def __init__(self, model: Callable[[dict[str, Any]], Said | str] | None = None) -> None:
        self.model = model or (lambda body: "{}")
        self.embedding: Callable[[str], Sequence[float]] = by_words
        self.faults: deque[Fault] = deque()
        self.requests: list[dict[str, Any]] = []
        self.answered: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.unsupported: set[str] = set()
        self.pause_s = 0.0
        """Between the pieces of a streamed reply."""
        self.at_once = 0
        self.most_at_once = 0
        self._lock = threading.Lock()
        self.first = threading.Event()
        self._stopped = threading.Event()
        server = self

        class Handler(_Handler):
            owner = server

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = False
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> "OpenAIServer":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._stopped.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def wait(self, seconds: float) -> None:
        self._stopped.wait(seconds)

    def took(self, body: dict[str, Any], headers: dict[str, str]) -> Fault:
        with self._lock:
            self.requests.append(body)
            self.headers.append(headers)
            self.first.set()
            return self.faults.popleft() if self.faults else Fault()

    def count(self, change: int) -> None:
        with self._lock:
            self.at_once += change
            self.most_at_once = max(self.most_at_once, self.at_once)


class _Handler(BaseHTTPRequestHandler):
    owner: OpenAIServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        self.close_connection = True
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        fault = self.owner.took(body, {k.lower(): v for k, v in self.headers.items()})
        self.owner.count(1)
        try:
            self._serve(body, fault)
        except (BrokenPipeError, ConnectionResetError):
            pass
        finally:
            self.owner.count(-1)

    def _serve(self, body: dict[str, Any], fault: Fault) -> None:
        if fault.delay_s:
            self.owner.wait(fault.delay_s)
        if fault.hang_up:
            return
        if fault.body is not None:
            self._send(fault.status, fault.body, fault.headers)
        elif fault.status != 200:
            self._send(fault.status, json.dumps({"error": fault.error}), fault.headers)
        elif refusal := _refusal(body, self.headers, self.path, self.owner.unsupported):
            status, error = refusal
            self._send(status, json.dumps({"error": error}), {})
        elif self.path == "/v1/embeddings":
            self._send(200, json.dumps(_embeddings(body, self.owner.embedding, fault)), {})
        else:
            said = self.owner.model(body) if fault.reply is None else fault.reply
            if self._has_left():
                return
            self.owner.answered.append(body)
            said = Said(said) if isinstance(said, str) else said
            if body.get("stream"):
                self._stream(body, said, fault)
            else:
                self._send(200, json.dumps(_completion(body, said, fault)), {})

    def _has_left(self) -> bool:
        """Whether the client has hung up: it pays for no reply then."""
        try:
            return not self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def _send(self, status: int, body: str, headers: dict[str, str]) -> None:
        data = body.encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.send_header("connection", "close")
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def _stream(self, body: dict[str, Any], said: Said, fault: Fault) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        for number, event in enumerate(_chunks(body, said, fault)):
            if fault.stop_stream_after == number:
                return
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
            self.wfile.flush()
            if self.owner.pause_s:
                self.owner.wait(self.owner.pause_s)
        self.wfile.write(b"data: [DONE]\n\n")


def _refusal(
    body: dict[str, Any], headers: Any, path: str, unsupported: set[str]
) -> tuple[int, dict[str, Any]] | None:
    def error(
        status: int, message: str, param: str = "", code: str = ""
    ) -> tuple[int, dict[str, Any]]:
        return status, {
            "message": message,
            "type": "invalid_request_error",
            "param": param or None,
            "code": code or None,
        }

    if headers.get("authorization") != f"Bearer {KEY}":
        return error(401, f"Incorrect key: {headers.get('authorization')}", code="invalid_api_key")
    if path == "/v1/embeddings":
        return _embeddings_refusal(body, error)
    if path != "/v1/chat/completions":
        return error(404, f"No route {path}")
    if body.get("model") != MODEL:
        return error(404, "The model does not exist", "model", "model_not_found")
    for name in sorted(unsupported & body.keys()):
        return error(400, f"Unsupported parameter: '{name}' is not supported", name)
    known = {
        "model", "messages", "max_tokens", "max_completion_tokens", "temperature", "seed",
        "response_format", "logprobs", "top_logprobs", "stream", "stream_options",
    }  # fmt: skip
    for name in sorted(body.keys() - known):
        return error(400, f"Unrecognized request argument supplied: {name}", name)
    for message in body["messages"]:
        if message["role"] not in ("system", "user") or not isinstance(message["content"], str):
            return error(400, "Invalid message", "messages")
    if "top_logprobs" in body and not (body.get("logprobs") and body["top_logprobs"] <= 20):
        return error(400, "top_logprobs is invalid", "top_logprobs")
    if "stream_options" in body and not body.get("stream"):
        return error(400, "stream_options without stream", "stream_options")
    if (form := body.get("response_format")) is not None:
        named = form["json_schema"]
        if form["type"] != "json_schema" or not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", named["name"]):
            return error(400, "Invalid response_format", "response_format")
        if not (named["strict"] is True and _is_strict(named["schema"])):
            return error(400, "Invalid schema for strict mode", "response_format")
    return None


def _embeddings_refusal(
    body: dict[str, Any], error: Callable[..., tuple[int, dict[str, Any]]]
) -> tuple[int, dict[str, Any]] | None:
    if body.get("model") != EMBEDDING_MODEL:
        return error(404, "The model does not exist", "model", "model_not_found")
    for name in sorted(body.keys() - {"model", "input", "encoding_format"}):
        return error(400, f"Unrecognized request argument supplied: {name}", name)
    given = body["input"]
    if not (isinstance(given, list) and 0 < len(given) <= MOST_INPUTS):
        return error(400, "'$.input' is invalid", "input")
    if not all(isinstance(each, str) and each for each in given):
        return error(400, "input cannot be an empty string", "input")
    if body.get("encoding_format") != "float":
        return error(400, "this server knows floats only", "encoding_format")
    return None


def by_words(text: str) -> list[float]:
    """A vector of length 1 that depends on which words stand in the text, wherever they do."""
    vector = [0.0] * 64
    for word in re.findall(r"\w+", text.casefold()):
        draw = random.Random(word)
        vector = [value + draw.gauss(0, 1) for value in vector]
    length = math.sqrt(sum(value * value for value in vector)) or 1.0
    return [value / length for value in vector]


def _embeddings(
    body: dict[str, Any], embedding: Callable[[str], Sequence[float]], fault: Fault
) -> dict[str, Any]:
    tokens = sum(len(text) // 4 + 1 for text in body["input"])
    whole = {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": list(embedding(text))}
            for index, text in enumerate(body["input"])
        ],
        "model": EMBEDDING_MODEL,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
    if fault.no_usage:
        del whole["usage"]
    return whole


def _is_strict(schema: dict[str, Any]) -> bool:
    match schema["type"]:
        case "object":
            return (
                schema["additionalProperties"] is False
                and sorted(schema["required"]) == sorted(schema["properties"])
                and all(_is_strict(each) for each in schema["properties"].values())
            )
        case "array":
            return _is_strict(schema["items"])
    return schema["type"] in ("string", "integer", "number", "boolean")


def _entry(token: str, probability: float) -> dict[str, Any]:
    logprob = math.log(probability) if probability > 0 else -9999.0
    return {"token": token, "logprob": logprob, "bytes": list(token.encode())}


def _logprobs(body: dict[str, Any], pieces: list[tuple[str, Alternatives]]) -> Any:
    if not body.get("logprobs"):
        return None
    content = []
    for token, alternatives in pieces:
        entry = _entry(token, dict(alternatives).get(token, 0.0))
        top = [_entry(*each) for each in alternatives[: body.get("top_logprobs", 0)]]
        content.append({**entry, "top_logprobs": top})
    return {"content": content, "refusal": None}


def usage_of(body: dict[str, Any], said: Said) -> dict[str, int]:
    prompt = sum(len(message["content"]) for message in body["messages"]) // 4
    completion = len(said.pieces)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def _completion(body: dict[str, Any], said: Said, fault: Fault) -> dict[str, Any]:
    text = "".join(piece for piece, _ in said.pieces)
    message = {
        "role": "assistant",
        "content": None if said.refusal else text,
        "refusal": said.refusal or None,
    }
    choice = {
        "index": 0,
        "message": message,
        "finish_reason": said.finish,
        "logprobs": _logprobs(body, said.pieces),
    }
    whole = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": MODEL,
        "choices": [choice],
        "usage": usage_of(body, said),
    }
    if fault.no_usage:
        del whole["usage"]
    return whole


def _chunks(body: dict[str, Any], said: Said, fault: Fault) -> list[dict[str, Any]]:
    def chunk(choices: list[Any], **more: Any) -> dict[str, Any]:
        return {
            "id": "chatcmpl-1",
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": MODEL,
            "choices": choices,
            **more,
        }

    def choice(delta: dict[str, Any], finish: str | None = None, logprobs: Any = None) -> Any:
        return {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": logprobs}

    found = [chunk([choice({"role": "assistant", "content": ""})])]
    if said.refusal:
        found.append(chunk([choice({"refusal": said.refusal})]))
    else:
        for piece in said.pieces:
            logprobs = _logprobs(body, [piece])
            found.append(chunk([choice({"content": piece[0]}, logprobs=logprobs)]))
    found.append(chunk([choice({}, said.finish)]))
    if body.get("stream_options", {}).get("include_usage") and not fault.no_usage:
        found.append(chunk([], usage=usage_of(body, said)))
    return found
