"""A circuit breaker: what has failed three times in a row is left alone for a while.

Closed, everything passes. The third failure in a row opens it for 5 s, in which nothing passes.
Then one call passes as a probe: it closes the breaker, or opens it for twice as long, up to a
minute.
"""

import time
from collections.abc import Callable
from enum import StrEnum

FAILURES = 3
FIRST_PAUSE_S = 5.0
LONGEST_PAUSE_S = 60.0


class State(StrEnum):
    CLOSED = "closed"
    OPEN = "open"
    PROBING = "probing"


class Breaker:
    """Every admitted call ends in one of `succeeded`, `failed` and `abandoned`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.state = State.CLOSED
        self.pause_s = FIRST_PAUSE_S
        """How long it is open, or would be."""
        self._clock = clock
        self._failures = 0
        self._opened_at = 0.0

    def admits(self) -> bool:
        """Whether a call may go on now; if so while the breaker is open, it is the probe."""
        if self.state is State.OPEN and self._clock() - self._opened_at >= self.pause_s:
            self.state = State.PROBING
            return True
        return self.state is State.CLOSED

    def succeeded(self) -> bool:
        """Whether this closed the breaker."""
        closed = self.state is not State.CLOSED
        self.state = State.CLOSED
        self.pause_s = FIRST_PAUSE_S
        self._failures = 0
        return closed

    def failed(self) -> bool:
        """Whether this opened a closed breaker."""
        if self.state is State.OPEN:  # a call from before it opened
            return False
        self._failures += 1
        if self.state is State.PROBING:
            self.pause_s = min(2 * self.pause_s, LONGEST_PAUSE_S)
            self._open()
            return False
        if self._failures < FAILURES:
            return False
        self._open()
        return True

    def abandoned(self) -> None:
        """The caller left before the call ended: nothing is known, so the next one is the probe."""
        if self.state is State.PROBING:
            self.state = State.OPEN

    def _open(self) -> None:
        self.state = State.OPEN
        self._opened_at = self._clock()
