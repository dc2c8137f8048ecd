"""The Connect protocol in JSON over any exposed gRPC service, built from the proto descriptors.

    POST /tdb.inference.v1.InferenceService/Attribute   body: the request in proto3 JSON

A new RPC needs no code here. A unary call runs: read the body within its limit, parse it, call the
service with a deadline, and leave when the client leaves; a refusal anywhere on the way is written
by `connect`. RPCs that stream answer UNIMPLEMENTED.
"""

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc.aio
from google.protobuf import message_factory
from google.protobuf.message import Message
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gateway import connect, messages
from gateway.backends import Backend
from services.common.errors import Cancelled, InvalidArgument, TdbError, Unimplemented

MAX_BODY_BYTES = 4 * 1024 * 1024
# After a refused body, this much more is read and dropped, so that the client hears the refusal.
MAX_DRAINED_BYTES = 64 * 1024 * 1024
OFF_LOOP_BYTES = 256 * 1024
DEFAULT_TIMEOUT_S = 120.0
MAX_TIMEOUT_S = 600.0

_log = logging.getLogger("tdb.gateway")
_T = TypeVar("_T")


@dataclass(frozen=True)
class _Method:
    """One RPC: how to parse its request and where to send it."""

    backend: str
    request: type[Message]
    streams: bool
    call: Callable[..., Awaitable[Message]]


class Transcoder:
    """An ASGI endpoint for `/{service}/{method}`."""

    def __init__(self, backends: Iterable[Backend]) -> None:
        self._methods = {
            path: method for backend in backends for path, method in _methods_of(backend)
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await self._answer(scope, receive)
        await response(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive) -> Response:
        method = self._methods.get(scope["path"])
        headers = Headers(scope=scope)
        timeout_s = DEFAULT_TIMEOUT_S
        try:
            if method is None:
                await _drain(receive)
                return connect.of_tdb_error(Unimplemented("there is no such method"), 404)
            if _media_type(headers) != "application/json":
                await _drain(receive)
                refusal = InvalidArgument("the content type must be application/json")
                return connect.of_tdb_error(refusal, 415)
            _check_protocol(headers)
            timeout_s = _timeout(headers)
            body = await _body(headers, receive)
            if method.streams:
                return await self._stream()
            work = _unary(method, body, timeout_s, _metadata(scope, headers))
            return await _unless_client_leaves(work, receive)
        except TdbError as error:
            return connect.of_tdb_error(error)
        except grpc.aio.AioRpcError as error:
            backend = method.backend if method else ""
            return connect.of_rpc_error(error, backend, timeout_s)
        except Exception:
            error_id = uuid.uuid4().hex[:12]
            _log.exception("unexpected error", extra={"fields": {"error_id": error_id}})
            bug = TdbError(
                f"internal error {error_id}; the gateway's log has more",
                metadata={"error_id": error_id},
            )
            return connect.of_tdb_error(bug)

    async def _stream(self) -> Response:
        raise Unimplemented("streaming calls are not served over HTTP yet; gRPC has them")


def _methods_of(backend: Backend) -> Iterable[tuple[str, _Method]]:
    for service in backend.services:
        for descriptor in service.methods:
            request = message_factory.GetMessageClass(descriptor.input_type)
            response = message_factory.GetMessageClass(descriptor.output_type)
            path = f"/{service.full_name}/{descriptor.name}"
            call: Any = backend.channel.unary_unary(
                path,
                request_serializer=request.SerializeToString,
                response_deserializer=response.FromString,
            )
            streams = descriptor.server_streaming or descriptor.client_streaming
            yield path, _Method(backend.name, request, streams, call)


async def _unary(
    method: _Method, body: bytes, timeout_s: float, metadata: list[tuple[str, str]]
) -> Response:
    request = await _converted(messages.parse, len(body), body, method.request)
    response = await method.call(request, timeout=timeout_s, metadata=metadata)
    content = await _converted(messages.write, response.ByteSize(), response)
    return Response(content, media_type="application/json", headers={"cache-control": "no-store"})


async def _converted(convert: Callable[..., _T], size: int, *arguments: Any) -> _T:
    """Runs a conversion; a large one in a thread, so that other calls go on meanwhile."""
    if size > OFF_LOOP_BYTES:
        return await asyncio.to_thread(convert, *arguments)
    return convert(*arguments)


async def _unless_client_leaves(work: Awaitable[Response], receive: Receive) -> Response:
    """Awaits `work`, and cancels it when the client disconnects first."""
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


def _media_type(headers: Headers) -> str:
    kind, _, parameters = headers.get("content-type", "").partition(";")
    charset = parameters.strip().lower().removeprefix("charset=").strip('"')
    return kind.strip().lower() if charset in ("", "utf-8") else ""


def _check_protocol(headers: Headers) -> None:
    version = headers.get("connect-protocol-version", "1")
    if version != "1":
        raise InvalidArgument("connect-protocol-version must be 1")
    if headers.get("content-encoding", "identity") != "identity":
        raise Unimplemented("compressed request bodies are not accepted: send it as it is")


def _timeout(headers: Headers) -> float:
    """The deadline to send on, in seconds."""
    text = headers.get("connect-timeout-ms")
    if text is None:
        return DEFAULT_TIMEOUT_S
    if not (text.isascii() and text.isdigit() and 0 < len(text) <= 10 and int(text) > 0):
        raise InvalidArgument("connect-timeout-ms must be a whole number of milliseconds above 0")
    return min(int(text) / 1000, MAX_TIMEOUT_S)


def _metadata(scope: Scope, headers: Headers) -> list[tuple[str, str]]:
    """What a service must know of the HTTP request: its id and whose it is."""
    metadata = [("x-request-id", str(scope["state"]["request_id"]))]
    if "authorization" in headers:
        metadata.append(("authorization", headers["authorization"]))
    return metadata


async def _body(headers: Headers, receive: Receive) -> bytes:
    too_large = InvalidArgument(f"the body is over the limit of {MAX_BODY_BYTES} bytes")
    declared = headers.get("content-length", "")
    if declared.isdigit() and int(declared) > MAX_BODY_BYTES:
        await _drain(receive)
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
                await _drain(receive)
            raise too_large
    return b"".join(parts)


async def _drain(receive: Receive) -> None:
    """Reads and drops what is left of a body."""
    size = 0
    while size <= MAX_DRAINED_BYTES:
        event = await receive()
        size += len(event.get("body", b""))
        if event["type"] == "http.disconnect" or not event.get("more_body", False):
            return
