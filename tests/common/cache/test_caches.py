"""What a cache promises, over the one in this process and over a real Redis alike."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from services.common.cache.breaker import State
from services.common.cache.cache import MAX_VALUE_BYTES, Cache
from services.common.cache.memory import MemoryCache
from tests.common.cache.redis_server import RedisServer, patient

pytestmark = pytest.mark.parametrize("cache", ["memory", "redis"], indirect=True)

VALUES = {
    "nothing": b"",
    "one byte": b"\0",
    "every byte": bytes(range(256)),
    "text that shrinks": b"to be or not to be " * 4000,
    "numbers that do not": bytes((7919 * n * n) % 251 for n in range(5000)),
    "as large as may be": b"x" * MAX_VALUE_BYTES,
}


@pytest_asyncio.fixture
async def cache(request: pytest.FixtureRequest) -> AsyncIterator[Cache]:
    cache: Cache = MemoryCache(2**26)
    if request.param == "redis":
        server: RedisServer = request.getfixturevalue("redis_server")
        cache = patient(server.address)
    assert cache.name == request.param
    yield cache
    await cache.aclose()


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES.keys())
async def test_what_was_put_is_got(cache: Cache, value: bytes) -> None:
    assert await cache.get("a") is None
    await cache.put("a", value)
    assert await cache.get("a") == value
    assert await cache.get("b") is None
    counters = cache.counters
    assert (counters.hits, counters.misses, counters.stored) == (1, 2, 1)
    assert (counters.errors, counters.damaged, counters.too_large) == (0, 0, 0)
    assert cache.state is State.CLOSED


async def test_the_last_value_put_counts(cache: Cache) -> None:
    await cache.put("a", b"one")
    await cache.put("a", b"another")
    assert await cache.get("a") == b"another"


async def test_what_is_too_large_is_not_kept(cache: Cache) -> None:
    await cache.put("a", b"x" * (MAX_VALUE_BYTES + 1))
    assert await cache.get("a") is None
    assert cache.counters.too_large == 1
    assert cache.counters.stored == 0


async def test_keys_are_any_text(cache: Cache) -> None:
    keys = ["Run:ab", "Run:ab ", "run:ab", "Run:ab\r\nDEL x", "ключ"]
    for key in keys:
        await cache.put(key, key.encode())
    assert [await cache.get(key) for key in keys] == [key.encode() for key in keys]


async def test_closing_twice_does_no_harm(cache: Cache) -> None:
    await cache.put("a", b"x")
    await cache.aclose()
    await cache.aclose()
    assert isinstance(cache, MemoryCache) or await cache.get("a") == b"x"
