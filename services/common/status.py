"""A refusal as gRPC sends it: code, sentence, and `google.rpc` details that programs can read.

    BadRequest   the field path in proto names, where a field is at fault
    ErrorInfo    a stable reason, domain "tdb", metadata
    RetryInfo    when to come back, where waiting helps
    RequestInfo  the id that the logs of every service have this call under

gRPC clients retry by the trailer `grpc-retry-pushback-ms` and ignore RetryInfo, so both are sent.
"""

import math
from collections.abc import Sequence

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from services.common.errors import TdbError

DOMAIN = "tdb"
DETAILS_TRAILER = "grpc-status-details-bin"
PUSHBACK_TRAILER = "grpc-retry-pushback-ms"
REQUEST_ID = "x-request-id"

# Trailers have room for 8 KiB; beyond, the client would see RESOURCE_EXHAUSTED and no reason. A
# sentence stands there three times, once with three characters for each byte.
SENTENCE_BYTES = 1000
FIELD_BYTES = 400

Metadata = Sequence[tuple[str, str | bytes]]


class CallStatus(grpc.Status):
    """What `abort_with_status` wants."""

    def __init__(self, code: grpc.StatusCode, details: str, trailers: Metadata) -> None:
        self.code = code
        self.details = details
        self.trailing_metadata = tuple(trailers)


def of_error(error: TdbError, request_id: str) -> CallStatus:
    """The status of a refusal."""
    code = grpc.StatusCode[error.code]
    status = status_pb2.Status(
        code=code.value[0],  # (number, name)
        message=sentence(error),
        details=[_packed(detail) for detail in (*details(error), request_info(request_id))],
    )
    trailers: list[tuple[str, str | bytes]] = [
        (DETAILS_TRAILER, status.SerializeToString()),
        (REQUEST_ID, request_id),
    ]
    if error.retry_after_s is not None:
        trailers.append((PUSHBACK_TRAILER, str(math.ceil(error.retry_after_s * 1000))))
    return CallStatus(code, sentence(error), trailers)


def sentence(error: TdbError) -> str:
    """The message of a refusal, without the middle where it quotes something long."""
    return _short(error.message, SENTENCE_BYTES)


def request_info(request_id: str) -> Message:
    info: Message = error_details_pb2.RequestInfo(request_id=request_id)
    return info


def details(error: TdbError) -> list[Message]:
    """The `google.rpc` messages that go with a refusal."""
    found: list[Message] = []
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=_short(error.field, FIELD_BYTES),
            description=sentence(error),
            reason=error.reason,
        )
        found.append(error_details_pb2.BadRequest(field_violations=[violation]))
    found.append(
        error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata)
    )
    if error.retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        found.append(retry)
    return found


def _short(text: str, most: int) -> str:
    data = text.encode(errors="replace")
    if len(data) <= most:
        return text
    half = most // 2 - 4
    return f"{data[:half].decode(errors='ignore')} ... {data[-half:].decode(errors='ignore')}"


def _packed(message: Message) -> Any:
    packed = Any()
    packed.Pack(message)
    return packed
