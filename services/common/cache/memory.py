"""The cache in this process: the values used last, bounded in bytes."""

from collections import OrderedDict

from services.common.cache.breaker import State
from services.common.cache.cache import MAX_VALUE_BYTES, Counters

ENTRY_BYTES = 200
"""What an entry takes besides its key and value, about."""


class MemoryCache:
    """For one event loop. With a bound of 0 nothing is kept."""

    name = "memory"
    state = State.CLOSED

    def __init__(self, bound: int) -> None:
        self.counters = Counters()
        self.kept_bytes = 0
        self._bound = bound
        self._values: OrderedDict[str, bytes] = OrderedDict()

    async def get(self, key: str) -> bytes | None:
        value = self._values.get(key)
        if value is None:
            self.counters.misses += 1
            return None
        self._values.move_to_end(key)
        self.counters.hits += 1
        return value

    async def put(self, key: str, value: bytes) -> None:
        if len(value) > MAX_VALUE_BYTES or _size(key, value) > self._bound:
            self.counters.too_large += 1
            return
        if (before := self._values.pop(key, None)) is not None:
            self.kept_bytes -= _size(key, before)
        self._values[key] = value
        self.kept_bytes += _size(key, value)
        self.counters.stored += 1
        while self.kept_bytes > self._bound:
            self.kept_bytes -= _size(*self._values.popitem(last=False))
            self.counters.evicted += 1

    async def aclose(self) -> None:
        """There is nothing to end."""


def _size(key: str, value: bytes) -> int:
    return len(key) + len(value) + ENTRY_BYTES
