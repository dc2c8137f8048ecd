"""Every counter of a cache is a metric."""

from dataclasses import fields

from prometheus_client import generate_latest

from services.common.cache.cache import Counters
from services.common.cache.memory import MemoryCache
from services.common.cache.metrics import CacheMetrics
from services.common.metrics import new_registry


async def test_what_a_cache_did_is_told() -> None:
    cache = MemoryCache(1000)
    registry = new_registry()
    registry.register(CacheMetrics(cache, lambda: 7))
    await cache.put("a", b"x")
    await cache.get("a")
    await cache.get("b")
    await cache.get("c")
    lines = generate_latest(registry).decode().splitlines()
    for each in fields(Counters):
        count = getattr(cache.counters, each.name)
        assert f'tdb_cache_{each.name}_total{{cache="memory"}} {count:.1f}' in lines
    assert 'tdb_cache_misses_total{cache="memory"} 2.0' in lines
    assert f'tdb_cache_bytes{{cache="memory"}} {cache.kept_bytes:.1f}' in lines
    assert "tdb_shared_calls_total 7.0" in lines
    assert 'tdb_cache_breaker{cache="memory",state="closed"} 1.0' in lines
    assert 'tdb_cache_breaker{cache="memory",state="open"} 0.0' in lines
