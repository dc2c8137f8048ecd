"""The exception tree every service raises from, free of grpc so that engines can use it.

    TdbError
    ├── InvalidArgument        can never work on this model
    ├── NotFound               the thing the call is about does not exist
    ├── FailedPrecondition     not in this deployment
    ├── ResourceExhausted      only for now; carries when to come back
    ├── DeadlineExceeded       the caller's time ran out
    ├── Cancelled              the caller left
    ├── Unavailable            starting or draining
    ├── Unauthenticated        no or a wrong token
    ├── PermissionDenied       not for this user
    └── Unimplemented          a field or RPC that is not built yet, named

`services.common.interceptor` maps them to gRPC statuses; anything else that escapes is a bug and
becomes INTERNAL with an id that is in the log. A field path is in proto names
(`run.interventions[0].target`). Code that knows only its own part of a request raises with the
part's path, and callers put the rest in front with `inside`.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class TdbError(Exception):
    """A refusal: one sentence, the field it is about, a stable reason.

    `code` is the gRPC status name. `field` is a proto field path, "" where no field is at fault.
    """

    code = "INTERNAL"
    default_reason = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        field: str = "",
        reason: str = "",
        metadata: dict[str, str] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.reason = reason or self.default_reason
        self.metadata = metadata or {}
        self.retry_after_s = retry_after_s


class InvalidArgument(TdbError):
    code = "INVALID_ARGUMENT"
    default_reason = "INVALID_ARGUMENT"


class NotFound(TdbError):
    code = "NOT_FOUND"
    default_reason = "NOT_FOUND"


class FailedPrecondition(TdbError):
    code = "FAILED_PRECONDITION"
    default_reason = "FAILED_PRECONDITION"


class ResourceExhausted(TdbError):
    """Waiting helps: always give `retry_after_s`."""

    code = "RESOURCE_EXHAUSTED"
    default_reason = "RESOURCE_EXHAUSTED"


class DeadlineExceeded(TdbError):
    code = "DEADLINE_EXCEEDED"
    default_reason = "DEADLINE_EXCEEDED"


class Cancelled(TdbError):
    code = "CANCELLED"
    default_reason = "CANCELLED"


class Unavailable(TdbError):
    code = "UNAVAILABLE"
    default_reason = "UNAVAILABLE"


class Unauthenticated(TdbError):
    code = "UNAUTHENTICATED"
    default_reason = "UNAUTHENTICATED"


class PermissionDenied(TdbError):
    code = "PERMISSION_DENIED"
    default_reason = "PERMISSION_DENIED"


class Unimplemented(TdbError):
    code = "UNIMPLEMENTED"
    default_reason = "UNIMPLEMENTED"


@contextmanager
def inside(path: str) -> Iterator[None]:
    """Puts `path` in front of the field of any refusal raised within: `prompt` -> `run.prompt`."""
    try:
        yield
    except TdbError as error:
        if error.field.startswith("["):
            error.field = path + error.field
        else:
            error.field = f"{path}.{error.field}" if error.field else path
        raise
