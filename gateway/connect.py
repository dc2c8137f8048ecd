"""Errors as the Connect protocol writes them in JSON.

    {"code": "invalid_argument", "message": "...", "details": [{"type", "value", "debug"}]}

`value` is the detail in base64 for generated clients, `debug` the same as JSON for those who read
it by eye or from a plain page. RetryInfo also becomes the header `Retry-After`.
"""

import base64
import math
from collections.abc import Iterable

import grpc
import grpc.aio
from google.protobuf import descriptor_pool, json_format, message_factory
from google.protobuf.any_pb2 import Any
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2
from starlette.responses import JSONResponse

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


def of_tdb_error(error: TdbError, http_status: int | None = None) -> JSONResponse:
    """The answer for a refusal of the gateway's own."""
    return _response(_name(error.code), error.message, status.details(error), http_status)


def of_rpc_error(error: grpc.aio.AioRpcError, backend: str, timeout_s: float) -> JSONResponse:
    """The answer for a service's error. Only a status that the service itself wrote is passed on
    as it is: gRPC's own texts name addresses and library internals."""
    code = _name(error.code().name)
    written = _written_status(error)
    if written is not None:
        return _response(code, written.message, [_unpacked(detail) for detail in written.details])
    sentences = {
        "unavailable": f"the {backend} service cannot be reached; it may be starting",
        "deadline_exceeded": f"no answer within the deadline of {timeout_s:g} s",
        "canceled": "the call was cancelled",
        "unimplemented": f"the {backend} service does not have this method",
        "resource_exhausted": f"a message to or from the {backend} service is over its size limit",
    }
    return _response(code, sentences.get(code, f"the {backend} service failed"), [])


def _response(
    code: str, message: str, details: Iterable[Message], http_status: int | None = None
) -> JSONResponse:
    headers = {"cache-control": "no-store"}
    written = []
    for detail in details:
        if isinstance(detail, error_details_pb2.RetryInfo):
            headers["retry-after"] = str(
                math.ceil(detail.retry_delay.ToTimedelta().total_seconds())
            )
        written.append(_detail(detail))
    if code == "unauthenticated":
        headers["www-authenticate"] = "Bearer"
    body = {"code": code, "message": message, "details": written}
    return JSONResponse(body, http_status or HTTP_STATUS[code], headers)


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
