"""The bound of the cache in this process."""

from services.common.cache.cache import open_cache
from services.common.cache.memory import ENTRY_BYTES, MemoryCache
from services.common.settings import Settings

ENTRY = ENTRY_BYTES + 1  # and a value


async def test_the_values_used_last_stay() -> None:
    cache = MemoryCache(3 * (ENTRY + 100))
    for key in "abc":
        await cache.put(key, b"x" * 100)
    assert await cache.get("a") is not None
    await cache.put("d", b"x" * 100)
    kept = [key for key in "abcd" if await cache.get(key) is not None]
    assert kept == ["a", "c", "d"]
    assert cache.counters.evicted == 1


async def test_it_is_bounded_in_bytes_not_in_values() -> None:
    cache = MemoryCache(10_000)
    for number in range(50):
        await cache.put("n", b"x" * 100 * number)
        assert cache.kept_bytes == ENTRY + 100 * number
    assert cache.counters.evicted == 0
    for number in range(500):
        await cache.put(str(number), b"x" * number)
        assert cache.kept_bytes <= 10_000
    assert await cache.get("499") is not None
    await cache.put("large", b"x" * 9_500)
    assert await cache.get("499") is None


async def test_a_value_over_the_bound_leaves_the_others() -> None:
    cache = MemoryCache(1000)
    await cache.put("a", b"x")
    await cache.put("b", b"x" * 1000)
    assert await cache.get("a") == b"x"
    assert await cache.get("b") is None
    assert cache.counters.too_large == 1


async def test_a_bound_of_nothing_keeps_nothing() -> None:
    cache = MemoryCache(0)
    await cache.put("a", b"")
    assert await cache.get("a") is None


async def test_it_is_the_cache_where_no_redis_is_named() -> None:
    assert isinstance(open_cache(Settings.from_env({})), MemoryCache)
    settings = Settings.from_env({"TDB_REDIS_URL": "redis://127.0.0.1:1"})
    redis = open_cache(settings)
    assert redis.name == "redis"
    await redis.aclose()
