"""Room: the bytes that passes of a model may use, and how many rows fit into them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from services.common.errors import ResourceExhausted
from services.inference.engine.memory import Sizes

UNLIMITED = 2**62


@dataclass
class Room:
    """The budget of one model; `memory` says what a pass takes of it."""

    sizes: Sizes
    budget: int = UNLIMITED
    """Bytes; no more than there are, once the model is loaded."""
    held: int = 0
    """Bytes that long work holds between its passes."""

    @contextmanager
    def holding(self, size: int) -> Iterator[None]:
        """Keeps bytes for what long work holds. Raises ResourceExhausted where other such work
        holds so many that there are not enough for now."""
        if self.held and self.held + size > self.budget:
            raise ResourceExhausted(
                f"{size:,} bytes are needed between passes, and other long work holds "
                f"{self.held:,} of {self.budget:,}; try again once it is done",
                reason="MEMORY_HELD",
                retry_after_s=30.0,
            )
        self.held += size
        try:
            yield
        finally:
            self.held -= size

    def rows(self, most: int, row: int, held: int = 0) -> int:
        """How many rows of `row` bytes fit beside what is `held`: 1 to `most`.

        A single one that does not fit was refused before it was queued, or is tried.
        """
        return max(1, min(most, (self.budget - held) // row))

    def most(self, needed: Callable[[int], int], most: int) -> int:
        """The largest number in 0..`most` of which the bytes `needed` fit; they grow with it."""
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            if needed(middle) <= self.budget:
                low = middle
            else:
                high = middle - 1
        return low
