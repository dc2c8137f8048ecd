"""What the scheduler tells whoever watches it: metrics and traces, neither of which it knows.

Every method returns at once and never raises. They may be called from any thread: `queued`,
`refused` and `dropped` come from the event loop, the others from the torch thread.
`priority` is the class in lower case, "interactive" or "bulk"; `kind` is the kind of work, such as
"Attribute"; times are in seconds.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from services.common.calls import Call

PRIORITIES = ("interactive", "bulk")


class SchedulerObserver(Protocol):
    """One task is `refused`, or `queued` and then either `dropped` or `started`.

    A batch of several tasks runs in one `running`; a task in slices has one `running` for each
    slice, and `started` only before the first.
    """

    def queued(self, priority: str) -> None:
        """A task was let in and waits."""

    def refused(self, reason: str) -> None:
        """A task was not let in; `reason` is that of the error, such as "QUEUE_FULL"."""

    def dropped(self, priority: str) -> None:
        """A task that waited will not run: its caller left, or its deadline passed."""

    def started(self, priority: str, waited_s: float) -> None:
        """A task's first work begins, `waited_s` after it was queued."""

    def running(
        self,
        kind: str,
        calls: Sequence[Call],
        rows: int,
        tokens: int,
        padded_tokens: int,
    ) -> AbstractContextManager[None]:
        """Surrounds one piece of work on the device: a batch of `rows` requests, or a slice.

        `calls` are those that it is done for, as `calls.current()` was when each was queued; none
        for the service's own work. `tokens` are those asked for, `padded_tokens` those computed.
        """
        return nullcontext()

    def finished(self, user: str, kind: str, device_s: float) -> None:
        """One request's share of a piece of work on the device."""

    def out_of_memory(self, kind: str, *, retried: bool) -> None:
        """The device ran out of memory; `retried` says whether the work is tried again, smaller."""


class Unobserved:
    """Nobody watches."""

    def queued(self, priority: str) -> None: ...

    def refused(self, reason: str) -> None: ...

    def dropped(self, priority: str) -> None: ...

    def started(self, priority: str, waited_s: float) -> None: ...

    def running(
        self,
        kind: str,
        calls: Sequence[Call],
        rows: int,
        tokens: int,
        padded_tokens: int,
    ) -> AbstractContextManager[None]:
        return nullcontext()

    def finished(self, user: str, kind: str, device_s: float) -> None: ...

    def out_of_memory(self, kind: str, *, retried: bool) -> None: ...
