"""Cancel tokens: how a caller that left, or whose time ran out, stops work on the device.

The event loop sets the token; the torch thread looks at it between layers.
"""

import threading
import time
from collections.abc import Sequence

from services.common.errors import Cancelled, DeadlineExceeded, TdbError


class CancelToken:
    """One per request. `deadline` is on the clock of `time.monotonic`."""

    def __init__(self, deadline: float | None = None) -> None:
        self._cancelled = threading.Event()
        self._deadline = deadline

    def cancel(self) -> None:
        self._cancelled.set()

    def check(self) -> None:
        """Raises Cancelled or DeadlineExceeded once nobody waits for the result any more."""
        if self._cancelled.is_set():
            raise Cancelled("the caller left before the result was ready")
        if self._deadline is not None and time.monotonic() >= self._deadline:
            raise DeadlineExceeded("the deadline passed before the result was ready")

    def of_member(self, member: int) -> "CancelToken":
        """The token of one member of a batch."""
        return self


class SharedToken(CancelToken):
    """One for work that several wait for: it goes on as long as anyone does."""

    def __init__(self, tokens: Sequence[CancelToken]) -> None:
        super().__init__()
        self._tokens = tuple(tokens)

    def check(self) -> None:
        """Raises what the last of them raises, once all do."""
        super().check()
        gone: TdbError | None = None
        for token in self._tokens:
            try:
                token.check()
            except (Cancelled, DeadlineExceeded) as error:
                gone = error
            else:
                return
        if gone:
            raise gone

    def of_member(self, member: int) -> CancelToken:
        return self._tokens[member]
