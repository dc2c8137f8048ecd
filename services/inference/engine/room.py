"""Room: the bytes that passes of a model may use, and how many rows fit into them.

    budget = held + what the running pass needs

Passes run one at a time, but some leave something behind that later pieces of work go on from:
recordings, caches of keys and values, captured points, what a harvest gathers. While it lives it is
*held*. Holders get half of the budget together (one alone may take more), so that passes of others
still run beside them, and chunks are planned for the other half. What does not fit for now is
refused for now.
"""

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from services.common.errors import ResourceExhausted
from services.inference.engine.memory import Sizes

UNLIMITED = 2**62
RETRY_S = 2.0
_MIB = 2**20


class Room:
    """The budget of one model; `memory` says what a pass takes of it."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.budget = UNLIMITED
        """Bytes; no more than there are, once the model is loaded."""
        self._held = 0
        self._lock = threading.Lock()

    @property
    def held(self) -> int:
        """Bytes that are held between passes."""
        return self._held

    @property
    def free(self) -> int:
        """Bytes that a pass may need now."""
        return self.budget - self._held

    @property
    def of_chunk(self) -> int:
        """Bytes that a chunk is planned for: whatever others come to hold, they are there."""
        return self.budget // 2

    def rows(self, most: int, row: int, held: int = 0) -> int:
        """How many rows of `row` bytes a chunk has beside what its own work holds: 1 to `most`.

        A single one that does not fit was refused before it was queued, or is tried.
        """
        return max(1, min(most, min(self.of_chunk, self.budget - held) // row))

    def most(self, needed: Callable[[int], int], most: int, available: int | None = None) -> int:
        """The largest number in 0..`most` of which the bytes `needed`, which grow with it, fit into
        those `available`; None: into the budget."""
        available = self.budget if available is None else available
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            if needed(middle) <= available:
                low = middle
            else:
                high = middle - 1
        return low

    def check(self, needed: int) -> None:
        """Before a pass. Raises ResourceExhausted where what others hold leaves too little."""
        if self._held and needed > self.free:
            raise self._busy(needed, self.free)

    def check_holder(self, needed: int) -> None:
        """Before something is made that stays. Raises ResourceExhausted where others hold too much
        already."""
        if self._held and needed > self.budget // 2 - self._held:
            raise self._busy(needed, max(0, self.budget // 2 - self._held))

    def hold(self, owner: object, size: int) -> None:
        """Counts `size` bytes as held for as long as `owner` lives."""
        self._take(size)
        weakref.finalize(owner, self._let_go, size)

    @contextmanager
    def holding(self, size: int) -> Iterator[None]:
        """Counts `size` bytes as held while it lasts. Raises ResourceExhausted where others hold
        too much already."""
        self.check_holder(size)
        self._take(size)
        try:
            yield
        finally:
            self._let_go(size)

    def _take(self, size: int) -> None:
        with self._lock:
            self._held += size

    def _let_go(self, size: int) -> None:
        with self._lock:
            self._held -= size

    def _busy(self, needed: int, free: int) -> ResourceExhausted:
        return ResourceExhausted(
            f"this needs up to {-(-needed // _MIB):,} MiB of memory, and {free // _MIB:,} MiB are "
            "free now beside the work of others that goes on; try again in a moment",
            reason="MEMORY_BUSY",
            metadata={"needed_bytes": str(needed), "free_bytes": str(free)},
            retry_after_s=RETRY_S,
        )
