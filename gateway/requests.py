"""What a call's HTTP request says, and reading it within its limits."""

import asyncio
import contextlib
import re
from collections.abc import Awaitable
from typing import TypeVar

from starlette.datastructures import Headers
from starlette.types import Receive, Scope

from services.common.errors import Cancelled, InvalidArgument, Unimplemented
from services.common.identity import USER_METADATA

MAX_BODY_BYTES = 4 * 1024 * 1024
# After a refused body, this much more is read and dropped, so that the client hears the refusal.
MAX_DRAINED_BYTES = 64 * 1024 * 1024

# What a header of gRPC may hold: it fails every call that has another. No token is otherwise.
_TEXT = re.compile(r"[\x20-\x7e]+\Z")

_T = TypeVar("_T")


def media_type(headers: Headers) -> str:
    """The content type without its parameters; "" where the text would not be UTF-8."""
    kind, _, parameters = headers.get("content-type", "").partition(";")
    charset = parameters.strip().lower().removeprefix("charset=").strip('"')
    return kind.strip().lower() if charset in ("", "utf-8") else ""


def accepts(headers: Headers, kind: str) -> bool:
    """Whether the client asks for answers of this media type by its name."""
    offered = ",".join(headers.getlist("accept")).lower().split(",")
    return any(each.partition(";")[0].strip() == kind for each in offered)


def check_protocol(headers: Headers) -> None:
    version = headers.get("connect-protocol-version", "1")
    if version != "1":
        raise InvalidArgument("connect-protocol-version must be 1")
    for name in ("content-encoding", "connect-content-encoding"):
        if headers.get(name, "identity") != "identity":
            raise Unimplemented("compressed request bodies are not accepted: send it as it is")


def timeout(headers: Headers, *, default_s: float, most_s: float) -> float:
    """The deadline to send on, in seconds."""
    text = headers.get("connect-timeout-ms")
    if text is None:
        return default_s
    if not (text.isascii() and text.isdigit() and 0 < len(text) <= 10 and int(text) > 0):
        raise InvalidArgument("connect-timeout-ms must be a whole number of milliseconds above 0")
    return min(int(text) / 1000, most_s)


def metadata(scope: Scope, headers: Headers) -> list[tuple[str, str]]:
    """What a service must know of the HTTP request: its id and whose it is. A user whom the proxy
    named goes on by name, one with a token by the token, which the service checks itself."""
    state = scope["state"]
    found = [("x-request-id", str(state["request_id"])), *state["trace_headers"]]
    if state["user_named"]:
        found.append((USER_METADATA, state["user"]))
    elif _TEXT.match(authorization := headers.get("authorization", "")):
        found.append(("authorization", authorization))
    return found


async def body(headers: Headers, receive: Receive) -> bytes:
    """The whole body. Raises InvalidArgument as soon as it is over the limit."""
    too_large = InvalidArgument(f"the body is over the limit of {MAX_BODY_BYTES} bytes")
    declared = headers.get("content-length", "")
    if declared.isdigit() and int(declared) > MAX_BODY_BYTES:
        await drain(receive)
        raise too_large
    parts: list[bytes] = []
    size, more = 0, True
    while more:
        event = await receive()
        if event["type"] == "http.disconnect":
            raise Cancelled("the client left before its request was read")
        parts.append(event.get("body", b""))
        size += len(parts[-1])
        more = event.get("more_body", False)
        if size > MAX_BODY_BYTES:
            if more:
                await drain(receive)
            raise too_large
    return b"".join(parts)


async def drain(receive: Receive) -> None:
    """Reads and drops what is left of a body."""
    size = 0
    while size <= MAX_DRAINED_BYTES:
        event = await receive()
        size += len(event.get("body", b""))
        if event["type"] == "http.disconnect" or not event.get("more_body", False):
            return


async def unless_client_leaves(work: Awaitable[_T], receive: Receive) -> _T:
    """Awaits `work`. When the client disconnects first, cancels it and raises Cancelled."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Cancelled("the client left")
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
