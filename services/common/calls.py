"""What is known about the gRPC call being served: who asks, under which id, until when.

The interceptor sets it; anything below a servicer may read it with `current()`.
"""

import time
from contextvars import ContextVar
from dataclasses import dataclass, replace

LOCAL_USER = "local"


@dataclass(frozen=True)
class Call:
    """`user` is who calls (`identity`), "local" where nothing says who may. `deadline` is in
    `time.monotonic` seconds, None when the client set none. `trace` is for `tracing`."""

    method: str
    request_id: str
    user: str = LOCAL_USER
    deadline: float | None = None
    trace: object = None
    shared: bool = False
    """Whether others may wait for the same: each leaves at a deadline of its own, and `deadline` is
    the latest of them."""

    def remaining_s(self) -> float | None:
        """Seconds left, never negative; None without a deadline."""
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())


_current: ContextVar[Call | None] = ContextVar("tdb_call", default=None)


def current() -> Call | None:
    return _current.get()


def enter(call: Call) -> None:
    _current.set(call)


def share(joining: Call | None) -> None:
    """Said where the work for a call is done: `joining`, which may be that call, waits for it."""
    call = current()
    if call is None:
        return
    deadlines = [call.deadline, joining.deadline if joining else None]
    known = [each for each in deadlines if each is not None]
    latest = max(known) if len(known) == len(deadlines) else None
    enter(replace(call, deadline=latest, shared=True))
