"""A server stream over HTTP, in either of two framings.

    Connect  `application/connect+json`: envelopes of a flag byte, the length as four bytes, and
             that much JSON; the last one has flag 2 and holds {} or {"error": ...}
    events   `text/event-stream`, for `curl -N`: `data:` and one message as JSON each time, then
             `event: end` with the same {} or error; a comment every 15 s of silence

Once a call is known to be a stream, whatever becomes of it is in the stream: the HTTP status is 200
and a refusal is the last frame. Each message waits until the one before it has been taken.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message
from starlette.types import Scope, Send

from gateway.connect import Failure
from services.common.errors import InvalidArgument

HEARTBEAT_S = 15.0

_PREFIX = 5  # bytes before each envelope's JSON
_COMPRESSED = 1
_END = 2


@dataclass(frozen=True)
class Framing:
    """How requests and answers of one media type are wrapped."""

    media_type: str
    request: Callable[[bytes], bytes]
    message: Callable[[bytes], bytes]
    end: Callable[[bytes], bytes]
    heartbeat: bytes = b""  # empty: this framing has nothing that means nothing


def _envelope(flags: int, data: bytes) -> bytes:
    return bytes([flags]) + len(data).to_bytes(4, "big") + data


def _opened(body: bytes) -> bytes:
    """The JSON in the one envelope of a request."""
    if len(body) < _PREFIX:
        raise InvalidArgument("the body must be one envelope: a flag byte, four of length, JSON")
    if body[0] & _COMPRESSED:
        raise InvalidArgument("the envelope is compressed, and no connect-content-encoding is set")
    if body[0]:
        raise InvalidArgument(f"the envelope has flags {body[0]}; a request's are 0")
    length = int.from_bytes(body[1:_PREFIX], "big")
    if length != len(body) - _PREFIX:
        raise InvalidArgument(
            f"the envelope says {length} bytes and {len(body) - _PREFIX} follow; "
            "a request is exactly one envelope"
        )
    return body[_PREFIX:]


CONNECT = Framing(
    media_type="application/connect+json",
    request=_opened,
    message=lambda data: _envelope(0, data),
    end=lambda data: _envelope(_END, data),
)
EVENTS = Framing(
    media_type="text/event-stream",
    request=lambda body: body,
    message=lambda data: b"data: " + data + b"\n\n",
    end=lambda data: b"event: end\ndata: " + data + b"\n\n",
    heartbeat=b": keep-alive\n\n",
)


class Answer:
    """The answer to one streaming call. Starts itself with the first thing that is sent."""

    def __init__(self, framing: Framing, scope: Scope, send: Send) -> None:
        self._framing = framing
        self._scope = scope
        self._send = send
        self._started = False

    async def start(self) -> None:
        headers = {
            "content-type": self._framing.media_type,
            "cache-control": "no-store",
            "x-accel-buffering": "no",
        }
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        self._started = True
        await self._send({"type": "http.response.start", "status": 200, "headers": raw})

    async def relay(self, call: Any, write: Callable[[Message], Awaitable[bytes]]) -> None:
        """Sends what `call`, a gRPC stream, brings until it ends. Cancels it on any way out; raises
        what it ended with."""
        try:
            # Its reader, `call.read()`, forgets what has arrived once the call has ended.
            responses = aiter(call)
            while (message := await self._next(responses)) is not None:
                await self._write(self._framing.message(await write(message)))
        finally:
            call.cancel()

    async def end(self, failure: Failure | None = None) -> None:
        tree = failure.end_of_stream(self._scope) if failure else {}
        data = json.dumps(tree, ensure_ascii=False, separators=(",", ":")).encode()
        await self._write(self._framing.end(data), more=False)

    async def _next(self, responses: AsyncIterator[Message]) -> Message | None:
        """The next message, with heartbeats while there is none; None at the end."""
        reading = asyncio.ensure_future(anext(responses, None))
        try:
            while not (await asyncio.wait({reading}, timeout=HEARTBEAT_S))[0]:
                if self._framing.heartbeat:
                    await self._write(self._framing.heartbeat)
            return reading.result()
        finally:
            reading.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await reading

    async def _write(self, data: bytes, *, more: bool = True) -> None:
        if not self._started:
            await self.start()
        await self._send({"type": "http.response.body", "body": data, "more_body": more})
