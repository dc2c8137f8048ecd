"""What a cache did, in the terms of Prometheus."""

from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from services.common.cache.breaker import State
from services.common.cache.cache import Cache

_EVENTS = {
    "hits": "Answers given from the cache.",
    "misses": "Answers that were not in the cache, or not to be had from it.",
    "errors": "Commands that Redis did not answer in time, or refused.",
    "damaged": "Values that were not what was written under their key; they count as misses too.",
    "stored": "Answers that were kept.",
    "too_large": "Answers that were too large to be kept.",
    "evicted": "Answers that made room for others in this process.",
}


class CacheMetrics(Collector):
    """Reads the counters when it is asked. `shared`: calls that found their work in flight."""

    def __init__(self, cache: Cache, shared: Callable[[], int]) -> None:
        self._cache = cache
        self._shared = shared

    def collect(self) -> Iterator[Metric]:
        name = self._cache.name
        for event, help in _EVENTS.items():
            counter = CounterMetricFamily(f"tdb_cache_{event}", help, labels=("cache",))
            counter.add_metric((name,), getattr(self._cache.counters, event))
            yield counter
        size = GaugeMetricFamily(
            "tdb_cache_bytes", "Bytes of answers kept in this process.", labels=("cache",)
        )
        if (kept := self._cache.kept_bytes) is not None:
            size.add_metric((name,), kept)
        yield size
        yield CounterMetricFamily(
            "tdb_shared_calls",
            "Calls answered by work that was in flight for an equal call.",
            self._shared(),
        )
        breaker = GaugeMetricFamily(
            "tdb_cache_breaker",
            "1 for the state that the circuit breaker in front of Redis is in.",
            labels=("cache", "state"),
        )
        for state in State:
            breaker.add_metric((name, state.value), float(state is self._cache.state))
        yield breaker
