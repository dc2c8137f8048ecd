"""Replies that were paid for once, by the hash of endpoint, model and question.

An entry is text without any key or name of a user. Only answers are kept: never a failure, never
what was cut off or is not what was asked for.
"""

from collections import OrderedDict
from typing import Protocol


class ResponseCache(Protocol):
    """Where replies are kept; the service has one on disk, so that no job pays twice."""

    async def get(self, key: str) -> str | None: ...

    async def put(self, key: str, value: str) -> None: ...


class MemoryCache:
    """The last `capacity` replies, in this process."""

    def __init__(self, capacity: int = 10_000) -> None:
        self._capacity = capacity
        self._kept: OrderedDict[str, str] = OrderedDict()

    async def get(self, key: str) -> str | None:
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    async def put(self, key: str, value: str) -> None:
        self._kept[key] = value
        self._kept.move_to_end(key)
        while len(self._kept) > self._capacity:
            self._kept.popitem(last=False)
