"""What every cache can do, and which of them the settings choose."""

from dataclasses import dataclass
from typing import Protocol

from services.common.cache.breaker import State
from services.common.settings import Settings

MAX_VALUE_BYTES = 4 * 2**20
"""Larger values are not kept: they are mostly tensors, which are as soon computed as fetched."""


@dataclass
class Counters:
    """What happened since the start. Every `get` is a hit or a miss."""

    hits: int = 0
    misses: int = 0
    errors: int = 0
    """Commands that Redis did not answer in time, or refused."""
    damaged: int = 0
    """Values found that are not what this program wrote under the key; each is a miss."""
    stored: int = 0
    too_large: int = 0
    """Values over MAX_VALUE_BYTES, or over the whole bound, which were not kept."""
    evicted: int = 0
    """Values that made room for others in this process; Redis counts its own."""


class Cache(Protocol):
    """Values by key. Neither method raises because of the cache."""

    name: str
    """`memory` or `redis`."""
    counters: Counters

    @property
    def kept_bytes(self) -> int | None:
        """In this process now; None where it keeps nothing itself."""
        ...

    @property
    def state(self) -> State:
        """Of the circuit breaker; always CLOSED where there is none."""
        ...

    async def get(self, key: str) -> bytes | None:
        """None: not there, or not to be had now."""
        ...

    async def put(self, key: str, value: bytes) -> None:
        """Keeps a value, as far as there is room for it."""
        ...

    async def aclose(self) -> None:
        """Ends connections."""
        ...


def open_cache(settings: Settings) -> Cache:
    """Redis where TDB_REDIS_URL names one, else this process. Connects when it is first used."""
    if settings.redis is None:
        from services.common.cache.memory import MemoryCache

        return MemoryCache(settings.cache_bytes)
    from services.common.cache.redis import RedisCache  # only those who use it need redis-py

    return RedisCache(settings.redis)
