"""The one place where calls are let in and refusals become statuses.

For every unary and server-streaming call: the request id is taken or made, the user is found
(`identity`) and held to their limits (`limits`), the request is parsed and checked (`strict`), the
servicer runs, and whatever it raises is mapped:

    TdbError             its own code, with details (`status`)
    CancelledError       passed on when it is the call that was cancelled; otherwise it comes from
                         some future within, and letting it out would leave the client waiting for
                         its own deadline, or for ever: a bug like any other
    anything else        INTERNAL with an id; what happened is in the log under that id

Parsing and serialising happen here too, so that bytes which are no message are refused in the same
way and a wrong result type is logged like any other bug. One line is logged per call.
"""

import asyncio
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc
import grpc.aio
from google.protobuf.json_format import MessageToJson
from google.protobuf.message import DecodeError, Message
from tdb.channel import MAX_MESSAGE_BYTES

from services.common import calls, status, strict
from services.common.calls import Call
from services.common.errors import InvalidArgument, TdbError
from services.common.identity import USER_METADATA, Identity
from services.common.in_flight import InFlight
from services.common.limits import UserLimits
from services.common.metrics import CallMetrics
from services.common.networks import address_of_peer
from services.common.settings import Settings
from services.common.status import REQUEST_ID
from services.common.tracing import Tracing

MAX_CONCURRENT_CALLS = 4096  # of all users; the scheduler says how many may wait for the device
OFF_LOOP_BYTES = 64 * 1024
HEALTH_PREFIX = "/grpc.health.v1."

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}\Z")
_log = logging.getLogger("tdb.calls")

Context = grpc.aio.ServicerContext[Any, Any]
Metadata = Iterable[tuple[str, str | bytes]]
Handler = Any  # grpc.RpcMethodHandler: its types know only the synchronous context


class _Bug(TdbError):
    """What the client sees of an unexpected error."""


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every handler of a server; stands first and alone."""

    def __init__(self, settings: Settings, metrics: CallMetrics, tracing: Tracing) -> None:
        self.metrics = metrics
        self.tracing = tracing
        self._identity = Identity.of_service(settings)
        self.limits = UserLimits(
            settings.requests_per_minute, settings.concurrent_requests, MAX_CONCURRENT_CALLS
        )
        self.in_flight = InFlight()
        self._log_prompts = settings.log_prompts

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        # No such method: gRPC itself answers UNIMPLEMENTED. Health answers everybody, always.
        if handler is None or method.startswith(HEALTH_PREFIX):
            return handler
        served = _Served(self, handler, method, handler_call_details.invocation_metadata or ())
        if handler.request_streaming:
            return grpc.stream_stream_rpc_method_handler(
                served.relay, handler.request_deserializer, handler.response_serializer
            )
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(served.stream)
        return grpc.unary_unary_rpc_method_handler(served.unary)

    def user_of(self, metadata: Metadata, context: Context) -> str:
        """Raises Unauthenticated, PermissionDenied."""
        values = [(name, value) for name, value in metadata if isinstance(value, str)]
        return self._identity.user(
            [value for name, value in values if name == USER_METADATA],
            address_of_peer(context.peer()),
            dict(values).get("authorization", ""),
            _common_name(context),
        )

    def log_call(self, call: Call, code: str, seconds: float, more: dict[str, Any]) -> None:
        fields = {
            "request_id": call.request_id,
            "user": call.user,
            "method": call.method,
            "code": code,
            "ms": round(seconds * 1000, 1),
        }
        _log.info("call", extra={"fields": {**fields, **more}})

    def loggable(self, request: Message | None) -> dict[str, Any]:
        if not self._log_prompts or request is None:
            return {}
        return {"request": MessageToJson(request, indent=None)[:4096]}


class _Served:
    """One call of one method, from bytes to bytes."""

    def __init__(
        self,
        interceptor: CallInterceptor,
        handler: Handler,
        method: str,
        metadata: Metadata,
    ) -> None:
        self._interceptor = interceptor
        self._handler = handler
        self._method = method
        self._metadata = tuple(metadata)
        given = str(dict(self._metadata).get(REQUEST_ID, ""))
        self._request_id = given if _REQUEST_ID.match(given) else uuid.uuid4().hex
        self._request: Message | None = None
        self._sent_bytes = 0

    async def unary(self, data: bytes, context: Context) -> bytes:
        async with self._guard(context):
            request = await self._parsed(data)
            return self._serialize(await self._handler.unary_unary(request, context))
        raise AssertionError("the guard lets nothing end quietly")

    async def stream(self, data: bytes, context: Context) -> AsyncIterator[bytes]:
        async with self._guard(context):
            request = await self._parsed(data)
            async for response in self._handler.unary_stream(request, context):
                yield self._serialize(response)

    async def relay(self, requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
        """A call with a stream of requests: gRPC's own reflection, which reads them itself."""
        async with self._guard(context):
            async for response in self._handler.stream_stream(requests, context):
                yield response

    async def _parsed(self, data: bytes) -> Message:
        """In a thread where it takes long, so that other calls, and health, go on meanwhile."""
        if len(data) > OFF_LOOP_BYTES:
            return await asyncio.to_thread(self._parse, data)
        return self._parse(data)

    def _parse(self, data: bytes) -> Message:
        try:
            request: Message = self._handler.request_deserializer(data)
        except DecodeError:
            raise InvalidArgument("the bytes of the request are not a valid message") from None
        self._request = request
        strict.check(request)
        return request

    def _serialize(self, response: Message) -> bytes:
        data: bytes = self._handler.response_serializer(response)
        if len(data) > MAX_MESSAGE_BYTES:
            raise InvalidArgument(
                f"the answer is a message of {len(data):,} bytes; at most {MAX_MESSAGE_BYTES:,} "
                "are sent in one: ask for less at a time",
                reason="ANSWER_TOO_LARGE",
                metadata={"limit": str(MAX_MESSAGE_BYTES)},
            )
        self._sent_bytes += len(data)
        return data

    @asynccontextmanager
    async def _guard(self, context: Context) -> AsyncIterator[None]:
        """Sets the call's surroundings, maps what is raised within, logs how it ended."""
        started = time.monotonic()
        remaining = context.time_remaining()
        headers = {name: value for name, value in self._metadata if isinstance(value, str)}
        span = self._interceptor.tracing.serve(
            self._method.lstrip("/"), headers, request_id=self._request_id
        )
        call = Call(
            method=self._method,
            request_id=self._request_id,
            user="",
            deadline=None if remaining is None else started + remaining,
            trace=span.trace,
        )
        calls.enter(call)
        metrics = self._interceptor.metrics
        metrics.began(call.method)
        context.set_trailing_metadata(((REQUEST_ID, call.request_id),))
        code = "OK"
        more: dict[str, Any] = {}
        try:
            call = replace(call, user=self._interceptor.user_of(self._metadata, context))
            calls.enter(call)
            with self._interceptor.in_flight.admit(), self._interceptor.limits.admit(call.user):
                yield
        except TdbError as error:
            code, more = error.code, {"reason": error.reason, "field": error.field}
            await context.abort_with_status(status.of_error(error, call.request_id))
        except grpc.aio.AbortError:
            code = context.code().name
            raise
        except GeneratorExit:
            code = _left(call)
            raise
        except (Exception, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError) and _is_cancelling():
                code = _left(call)
                raise
            bug = _Bug("", reason="INTERNAL", metadata={"error_id": uuid.uuid4().hex[:12]})
            bug.message = f"internal error {bug.metadata['error_id']}; the server's log has more"
            code, more = bug.code, dict(bug.metadata)
            _log.error(
                "unexpected error",
                exc_info=error,
                extra={"fields": {"request_id": call.request_id, "method": call.method, **more}},
            )
            await context.abort_with_status(status.of_error(bug, call.request_id))
        finally:
            seconds = time.monotonic() - started
            reason = str(more.get("reason", ""))
            metrics.ended(call.method, code, reason, seconds, self._sent_bytes)
            span.end(code, user=call.user)
            self._interceptor.log_call(
                call, code, seconds, {**more, **self._interceptor.loggable(self._request)}
            )


def _common_name(context: Context) -> str:
    """Of the peer's certificate; "" where it showed none."""
    for name in context.auth_context().get("x509_common_name", ()):
        return name.decode(errors="replace")
    return ""


def _left(call: Call) -> str:
    """What the client saw when it is no longer there: its deadline, or its own cancelling."""
    return "DEADLINE_EXCEEDED" if call.remaining_s() == 0 else "CANCELLED"


def _is_cancelling() -> bool:
    """Whether this very call is being cancelled: gRPC cancels the task that serves it."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
