"""The Connect protocol in JSON over any exposed gRPC service, built from the proto descriptors.

    POST /tdb.inference.v1.InferenceService/Attribute   body: the request in proto3 JSON

A new RPC needs no code here. A call runs: read the body within its limit, parse it, call the
service with a deadline, and leave when the client leaves; a refusal anywhere on the way is written
by `connect`. A server stream is answered in the framing that the client asks for (`streams`).
"""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from google.protobuf import message_factory
from google.protobuf.message import Message
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway import connect, messages, requests, streams
from gateway.backends import Backend, methods
from services.common.errors import (
    Cancelled,
    InvalidArgument,
    ResourceExhausted,
    Unimplemented,
)
from services.common.limits import UserLimits
from services.common.settings import Settings

OFF_LOOP_BYTES = 256 * 1024
DEFAULT_TIMEOUT_S = 120.0
MAX_TIMEOUT_S = 600.0
# A stream shows that it is alive, and building a data set takes its time.
DEFAULT_STREAM_TIMEOUT_S = 3600.0
MAX_STREAM_TIMEOUT_S = 24 * 3600.0

_T = TypeVar("_T")


@dataclass(frozen=True)
class _Method:
    """One RPC: how to parse its request and where to send it."""

    backend: str
    request: type[Message]
    streams: bool
    call: Callable[..., Any]
    limits: UserLimits


class Transcoder:
    """An ASGI endpoint for `/{service}/{method}`."""

    def __init__(self, backends: Iterable[Backend], settings: Settings) -> None:
        self._methods = {
            path: method for backend in backends for path, method in _methods_of(backend, settings)
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        method = self._methods.get(scope["path"])
        if method is None:
            await requests.drain(receive)
            refusal = connect.of_tdb_error(Unimplemented("there is no such method"), 404)
            await refusal(scope, receive, send)
            return
        try:
            framing = _framing(method, headers)
        except InvalidArgument as error:
            await requests.drain(receive)
            await connect.of_tdb_error(error, 415)(scope, receive, send)
            return
        try:
            # The service has the user's account. Who is over it by this way alone is refused here,
            # before anything is read and parsed.
            with method.limits.admit(scope["state"]["user"]):
                if framing is None:
                    response = await _unary(method, scope, receive)
                    await response(scope, receive, send)
                else:
                    await _stream(method, framing, scope, receive, send)
        except ResourceExhausted as error:
            await requests.drain(receive)
            if framing is None:
                await connect.of_tdb_error(error)(scope, receive, send)
            else:
                failure = connect.failure(error, method.backend, 0)
                await streams.Answer(framing, scope, send).end(failure)


def _methods_of(backend: Backend, settings: Settings) -> Iterable[tuple[str, _Method]]:
    limits = UserLimits(settings.requests_per_minute, settings.concurrent_requests)
    for service in backend.services:
        for descriptor in methods(service):
            request = message_factory.GetMessageClass(descriptor.input_type)
            response = message_factory.GetMessageClass(descriptor.output_type)
            path = f"/{service.full_name}/{descriptor.name}"
            streaming = descriptor.server_streaming
            kind: Any = backend.channel.unary_stream if streaming else backend.channel.unary_unary
            call = kind(
                path,
                request_serializer=request.SerializeToString,
                response_deserializer=response.FromString,
            )
            yield path, _Method(backend.name, request, streaming, call, limits)


def _framing(method: _Method, headers: Headers) -> streams.Framing | None:
    """How the client wants its stream, None for a call that does not stream. Raises
    InvalidArgument for a request of a wrong type."""
    kind = requests.media_type(headers)
    if not method.streams:
        if kind != "application/json":
            raise InvalidArgument("the content type must be application/json")
        return None
    if kind == streams.CONNECT.media_type:
        return streams.CONNECT
    if kind == "application/json" and requests.accepts(headers, streams.EVENTS.media_type):
        return streams.EVENTS
    raise InvalidArgument(
        "this call streams: send application/json with accept: text/event-stream, or "
        "application/connect+json"
    )


async def _unary(method: _Method, scope: Scope, receive: Receive) -> ASGIApp:
    headers = Headers(scope=scope)
    timeout_s = DEFAULT_TIMEOUT_S

    async def answer(body: bytes) -> Response:
        request = await _converted(messages.parse, len(body), body, method.request)
        metadata = requests.metadata(scope, headers)
        response = await method.call(request, timeout=timeout_s, metadata=metadata)
        return Response(
            await _written(response),
            media_type="application/json",
            headers={"cache-control": "no-store"},
        )

    try:
        requests.check_protocol(headers)
        timeout_s = requests.timeout(headers, default_s=timeout_s, most_s=MAX_TIMEOUT_S)
        body = await requests.body(headers, receive)
        return await requests.unless_client_leaves(answer(body), receive)
    except Exception as error:
        return connect.failure(error, method.backend, timeout_s).response()


async def _stream(
    method: _Method, framing: streams.Framing, scope: Scope, receive: Receive, send: Send
) -> None:
    headers = Headers(scope=scope)
    timeout_s = DEFAULT_STREAM_TIMEOUT_S
    answer = streams.Answer(framing, scope, send)

    async def relay(body: bytes) -> None:
        try:
            data = framing.request(body)
            request = await _converted(messages.parse, len(data), data, method.request)
            await answer.start()
            metadata = requests.metadata(scope, headers)
            call = method.call(request, timeout=timeout_s, metadata=metadata)
            await answer.relay(call, _written)
        except Exception as error:
            await answer.end(connect.failure(error, method.backend, timeout_s))
        else:
            await answer.end()

    try:
        requests.check_protocol(headers)
        timeout_s = requests.timeout(headers, default_s=timeout_s, most_s=MAX_STREAM_TIMEOUT_S)
        body = await requests.body(headers, receive)
    except Exception as error:
        await answer.end(connect.failure(error, method.backend, timeout_s))
        return
    try:
        await requests.unless_client_leaves(relay(body), receive)
    except Cancelled:  # nobody is left to be told
        connect.note(scope, "canceled")


async def _written(message: Message) -> bytes:
    return await _converted(messages.write, message.ByteSize(), message)


async def _converted(convert: Callable[..., _T], size: int, *arguments: Any) -> _T:
    """Runs a conversion; a large one in a thread, so that other calls go on meanwhile."""
    if size > OFF_LOOP_BYTES:
        return await asyncio.to_thread(convert, *arguments)
    return convert(*arguments)
