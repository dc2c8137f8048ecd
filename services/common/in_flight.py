"""The calls that run, so that a server can end after the last of them.

gRPC's own graceful stop cancels whatever arrives before its clients have heard of it, and they see
CANCELLED, which says nothing of another try. So calls are refused here, by a status of ours, until
none runs.
"""

import asyncio
import contextlib
from collections.abc import Iterator

from services.common.errors import Unavailable


class InFlight:
    """Belongs to one event loop."""

    def __init__(self) -> None:
        self._running = 0
        self._stopping = False
        self._none_runs = asyncio.Event()
        self._none_runs.set()

    @contextlib.contextmanager
    def admit(self) -> Iterator[None]:
        """Around a call. Raises Unavailable once the server is stopping."""
        if self._stopping:
            raise Unavailable("the service is stopping; try again in a moment", reason="STOPPING")
        self._running += 1
        self._none_runs.clear()
        try:
            yield
        finally:
            self._running -= 1
            if not self._running:
                self._none_runs.set()

    async def end(self, within_s: float) -> None:
        """Lets nothing more in, and waits for what runs, `within_s` at most."""
        self._stopping = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._none_runs.wait(), within_s)
