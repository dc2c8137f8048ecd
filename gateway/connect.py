"""Errors as the Connect protocol writes them in JSON.

    {"code": "invalid_argument", "message": "...", "details": [{"type", "value", "debug"}]}

`value` is the detail in base64 for generated clients, `debug` the same as JSON for those who read
it by eye or from a plain page. RetryInfo also becomes `Retry-After`: a header of a plain answer, an
entry of the metadata that end a stream. RequestInfo holds the id that the logs have the request
under. Whatever a failure is written into, its code is noted for the gateway's own log and metrics.
"""

import base64
import logging
import math
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace

import grpc
import grpc.aio
from google.protobuf import descriptor_pool, json_format, message_factory
from google.protobuf.any_pb2 import Any
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from services.common import status
from services.common.errors import TdbError

HTTP_STATUS = {
    "canceled": 499,
    "unknown": 500,
    "invalid_argument": 400,
    "deadline_exceeded": 504,
    "not_found": 404,
    "already_exists": 409,
    "permission_denied": 403,
    "resource_exhausted": 429,
    "failed_precondition": 400,
    "aborted": 409,
    "out_of_range": 400,
    "unimplemented": 501,
    "internal": 500,
    "unavailable": 503,
    "data_loss": 500,
    "unauthenticated": 401,
}


_log = logging.getLogger("tdb.gateway")


@dataclass(frozen=True)
class Failure:
    """How a call ended when it did not end well."""

    code: str
    message: str
    details: Sequence[Message] = ()

    def response(self, http_status: int | None = None) -> ASGIApp:
        """The whole answer of a call that does not stream."""

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            headers = {"cache-control": "no-store"}
            if self._retry_after:
                headers["retry-after"] = self._retry_after
            if self.code == "unauthenticated":
                headers["www-authenticate"] = "Bearer"
            tree = self._ending(scope)._tree()
            response = JSONResponse(tree, http_status or HTTP_STATUS[self.code], headers)
            await response(scope, receive, send)

        return answer

    def end_of_stream(self, scope: Scope) -> dict[str, object]:
        """The last frame of a stream, which has no status line of its own."""
        tree: dict[str, object] = {"error": self._ending(scope)._tree()}
        if self._retry_after:
            tree["metadata"] = {"retry-after": [self._retry_after]}
        return tree

    def _ending(self, scope: Scope) -> "Failure":
        """Itself as the end of this request: noted, and with the request's id."""
        note(scope, self.code)
        if any(
            detail.DESCRIPTOR is error_details_pb2.RequestInfo.DESCRIPTOR for detail in self.details
        ):
            return self
        told = status.request_info(scope["state"]["request_id"])
        return replace(self, details=[*self.details, told])

    def _tree(self) -> dict[str, object]:
        details = [_detail(detail) for detail in self.details]
        return {"code": self.code, "message": self.message, "details": details}

    @property
    def _retry_after(self) -> str:
        for detail in self.details:
            if isinstance(detail, error_details_pb2.RetryInfo):
                return str(math.ceil(detail.retry_delay.ToTimedelta().total_seconds()))
        return ""


def note(scope: Scope, code: str) -> None:
    """Notes how the request ended, where its HTTP status does not say it."""
    scope["state"]["code"] = code


def code_of(http_status: int) -> str:
    """The code of an answer that is no call's: of a page, a probe. 0 is a client that left."""
    if http_status == 0:
        return "canceled"
    if http_status < 400:
        return "ok"
    found = (code for code, status in HTTP_STATUS.items() if status == http_status)
    return next(found, "unknown")


def of_tdb_error(error: TdbError, http_status: int | None = None) -> ASGIApp:
    """The answer for a refusal of the gateway's own."""
    return _of_tdb_error(error).response(http_status)


def failure(error: Exception, backend: str, timeout_s: float) -> Failure:
    """What ended a call to `backend`. What is neither a refusal nor the service's is a bug: it is
    logged, and the client gets the id of its log line."""
    if isinstance(error, TdbError):
        return _of_tdb_error(error)
    if isinstance(error, grpc.aio.AioRpcError):
        return _of_rpc_error(error, backend, timeout_s)
    error_id = uuid.uuid4().hex[:12]
    _log.error("unexpected error", exc_info=error, extra={"fields": {"error_id": error_id}})
    bug = TdbError(
        f"internal error {error_id}; the gateway's log has more", metadata={"error_id": error_id}
    )
    return _of_tdb_error(bug)


def _of_tdb_error(error: TdbError) -> Failure:
    return Failure(_name(error.code), status.sentence(error), status.details(error))


def _of_rpc_error(error: grpc.aio.AioRpcError, backend: str, timeout_s: float) -> Failure:
    """Only a status that the service itself wrote is passed on as it is: gRPC's own texts name
    addresses and library internals."""
    code = _name(error.code().name)
    written = _written_status(error)
    if written is not None:
        return Failure(code, written.message, [_unpacked(detail) for detail in written.details])
    sentences = {
        "unavailable": f"the {backend} service cannot be reached; it may be starting",
        "deadline_exceeded": f"no answer within the deadline of {timeout_s:g} s",
        "canceled": "the call was cancelled",
        "unimplemented": f"the {backend} service does not have this method",
        "resource_exhausted": f"a message to or from the {backend} service is over its size limit",
    }
    return Failure(code, sentences.get(code, f"the {backend} service failed"))


def _detail(detail: Message) -> dict[str, object]:
    if isinstance(detail, Any):  # of a type that this process does not know
        return {"type": detail.TypeName(), "value": _base64(detail.value)}
    return {
        "type": detail.DESCRIPTOR.full_name,
        "value": _base64(detail.SerializeToString()),
        "debug": json_format.MessageToDict(detail),
    }


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode().rstrip("=")


def _name(grpc_name: str) -> str:
    return "canceled" if grpc_name == "CANCELLED" else grpc_name.lower()


def _written_status(error: grpc.aio.AioRpcError) -> status_pb2.Status | None:
    for key, value in error.trailing_metadata() or ():
        if key == status.DETAILS_TRAILER:
            try:
                return status_pb2.Status.FromString(value)
            except DecodeError:
                return None
    return None


def _unpacked(packed: Any) -> Message:
    try:
        descriptor = descriptor_pool.Default().FindMessageTypeByName(packed.TypeName())
        message = message_factory.GetMessageClass(descriptor)()
        message.ParseFromString(packed.value)
    except (KeyError, DecodeError):
        return packed
    return message
