"""What is counted of the device, told by hand as the scheduler tells it."""

import logging
from collections.abc import Sequence

import pytest
import torch
from prometheus_client import CollectorRegistry

from services.common.calls import Call
from services.common.errors import ResourceExhausted
from services.common.server import ServiceServer
from services.inference.engine.out_of_memory import in_halves
from services.inference.metrics import DeviceMetrics
from services.inference.observer import SchedulerObserver, Unobserved
from tools import metrics_page


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry) -> DeviceMetrics:
    return DeviceMetrics(registry)


def observe(observer: SchedulerObserver) -> None:
    """Three tasks of ann and bob: two of them in one padded batch, one dropped."""
    for priority in ("interactive", "interactive", "bulk", "bulk"):
        observer.queued(priority)
    observer.refused("QUEUE_FULL")
    observer.dropped("bulk")
    calls = [Call("/x", "1", "ann"), Call("/x", "2", "bob")]
    for waited in (0.002, 2.0):
        observer.started("interactive", waited)
    with observer.running("Attribute", calls, rows=2, tokens=15, padded_tokens=20):
        pass
    observer.finished("ann", "Attribute", 0.75)
    observer.finished("bob", "Attribute", 0.25)
    observer.finished("ann", "Attribute", 0.5)
    observer.out_of_memory("Attribute", retried=True)


def test_the_queue_the_batch_and_the_time_of_users(
    metrics: DeviceMetrics, registry: CollectorRegistry
) -> None:
    def sample(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, labels)

    assert sample("tdb_queue_depth", priority="bulk") == 0
    observe(metrics)
    assert sample("tdb_queue_depth", priority="interactive") == 0
    assert sample("tdb_queue_depth", priority="bulk") == 1
    assert sample("tdb_queue_dropped_total", priority="bulk") == 1
    assert sample("tdb_queue_refused_total", reason="QUEUE_FULL") == 1
    assert sample("tdb_queue_wait_seconds_count", priority="interactive") == 2
    assert sample("tdb_queue_wait_seconds_bucket", priority="interactive", le="0.005") == 1
    assert sample("tdb_batch_rows_bucket", kind="Attribute", le="1.0") == 0
    assert sample("tdb_batch_rows_bucket", kind="Attribute", le="2.0") == 1
    assert sample("tdb_tokens_total", kind="Attribute") == 15
    assert sample("tdb_padded_tokens_total", kind="Attribute") == 20
    assert sample("tdb_device_seconds_total", user="ann", kind="Attribute") == 1.25
    assert sample("tdb_device_seconds_total", user="bob", kind="Attribute") == 0.25
    assert sample("tdb_device_work_seconds_count", kind="Attribute") == 1
    assert sample("tdb_out_of_memory_total", kind="Attribute", retried="1") == 1


def test_work_that_fails_is_timed_and_no_longer_running(
    metrics: DeviceMetrics, registry: CollectorRegistry
) -> None:
    def running() -> float | None:
        return registry.get_sample_value("tdb_device_running", {"kind": "Run"})

    def fail() -> None:
        with metrics.running("Run", [], 1, 3, 3):
            assert running() == 1
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fail()
    assert running() == 0
    assert registry.get_sample_value("tdb_device_work_seconds_count", {"kind": "Run"}) == 1


def test_lines_of_the_device_name_the_requests_that_it_works_for(
    metrics: DeviceMetrics, caplog: pytest.LogCaptureFixture
) -> None:
    calls = [Call("/x", "click-1", "ann"), Call("/x", "click-2", "bob")]
    with caplog.at_level(logging.DEBUG, "tdb.device"), metrics.running("Run", calls, 2, 6, 8):
        metrics.out_of_memory("Run", retried=True)
    warning, work = (record.fields for record in caplog.records)  # type: ignore[attr-defined]
    assert warning == {"request_ids": ["click-1", "click-2"], "kind": "Run", "retried": True}
    assert work.pop("ms") >= 0
    assert work == {
        "request_ids": ["click-1", "click-2"],
        "kind": "Run",
        "rows": 2,
        "padded_tokens": 8,
    }


def test_memory_that_runs_out_within_a_piece_of_work_is_counted(
    metrics: DeviceMetrics, registry: CollectorRegistry
) -> None:
    def work(items: Sequence[int]) -> list[int]:
        if sum(items) > 3:
            raise torch.OutOfMemoryError("full")
        return list(items)

    def count(retried: str) -> float | None:
        labels = {"kind": "Verify.chunk", "retried": retried}
        return registry.get_sample_value("tdb_out_of_memory_total", labels)

    with metrics.running("Verify.chunk", [], 1, 3, 3):
        assert in_halves(work, [1, 2, 3]) == [1, 2, 3]
        assert (count("1"), count("0")) == (1, None)
        with pytest.raises(ResourceExhausted):
            in_halves(work, [4])
    assert (count("1"), count("0")) == (2, 1)
    with pytest.raises(ResourceExhausted):
        in_halves(work, [4])  # nobody's: told to nobody
    assert (count("1"), count("0")) == (2, 1)


def test_memory_is_what_the_process_holds_when_it_is_asked(registry: CollectorRegistry) -> None:
    DeviceMetrics(registry)
    labels = {"device": "cpu", "kind": "resident"}
    size = registry.get_sample_value("tdb_device_memory_bytes", labels)
    if size is None:
        pytest.skip("a machine without /proc, or with a CUDA device in use")
    held = bytearray(b"x") * 200_000_000
    more = registry.get_sample_value("tdb_device_memory_bytes", labels)
    assert more is not None
    assert more - size > 100_000_000
    del held


def test_nobody_needs_to_watch() -> None:
    observe(Unobserved())


async def test_the_page_for_operators_lists_what_a_service_has(server: ServiceServer) -> None:
    DeviceMetrics(server.registry)
    page = metrics_page.PAGE.read_text()
    assert metrics_page.with_table(page) == page
    names = [name for name, *_ in metrics_page.described(server.registry)]
    assert "tdb_cache_hits_total" in names
    assert "tdb_requests_total" in names
    assert [name for name in names if f"| `{name}` |" not in page and name[:4] == "tdb_"] == []
