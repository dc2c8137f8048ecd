"""The device and its queue in the terms of Prometheus; the work on it as spans of traces."""

import logging
import mmap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from services.common.calls import Call
from services.common.metrics import FirstNames
from services.common.tracing import Tracing, Untraced
from services.inference.engine import out_of_memory
from services.inference.observer import PRIORITIES

WAIT_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
WORK_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
ROWS = (1, 2, 4, 8, 16, 32, 64)

_log = logging.getLogger("tdb.device")


class DeviceMetrics:
    """A SchedulerObserver that counts, logs, and traces where that is wanted."""

    def __init__(self, registry: CollectorRegistry, tracing: Tracing | None = None) -> None:
        self._tracing = tracing or Untraced()
        self._calls: Sequence[Call] = ()
        self._user = FirstNames()
        self._depth = Gauge(
            "tdb_queue_depth",
            "Tasks that wait for the device, by class.",
            ("priority",),
            registry=registry,
        )
        self._wait = Histogram(
            "tdb_queue_wait_seconds",
            "How long tasks waited before their first work on the device began, by class.",
            ("priority",),
            buckets=WAIT_S,
            registry=registry,
        )
        self._dropped = Counter(
            "tdb_queue_dropped",
            "Tasks that did not run because their caller left or their deadline passed.",
            ("priority",),
            registry=registry,
        )
        self._refused = Counter(
            "tdb_queue_refused",
            "Tasks that were not let into the queue, by reason.",
            ("reason",),
            registry=registry,
        )
        self._rows = Histogram(
            "tdb_batch_rows",
            "Requests that shared a piece of work on the device.",
            ("kind",),
            buckets=ROWS,
            registry=registry,
        )
        self._tokens = Counter(
            "tdb_tokens", "Tokens that requests asked for.", ("kind",), registry=registry
        )
        self._padded_tokens = Counter(
            "tdb_padded_tokens",
            "Tokens that were computed; what they exceed tdb_tokens_total by was padding.",
            ("kind",),
            registry=registry,
        )
        self._work = Histogram(
            "tdb_device_work_seconds",
            "How long single pieces of work took: a batch, or a slice of bulk work.",
            ("kind",),
            buckets=WORK_S,
            registry=registry,
        )
        self._running = Gauge(
            "tdb_device_running", "Pieces of work on the device now.", ("kind",), registry=registry
        )
        self._device = Counter(
            "tdb_device_seconds",
            "Device time by user and kind of work; users after the first 100 are 'other'.",
            ("user", "kind"),
            registry=registry,
        )
        self._out_of_memory = Counter(
            "tdb_out_of_memory",
            "Times that the device ran out of memory; retried says whether the work was tried "
            "again in smaller parts.",
            ("kind", "retried"),
            registry=registry,
        )
        for priority in PRIORITIES:  # so that they are there, as 0, before anything happens
            self._depth.labels(priority)
            self._wait.labels(priority)
            self._dropped.labels(priority)
        registry.register(DeviceMemory())

    def queued(self, priority: str) -> None:
        self._depth.labels(priority).inc()

    def refused(self, reason: str) -> None:
        self._refused.labels(reason).inc()

    def dropped(self, priority: str) -> None:
        self._depth.labels(priority).dec()
        self._dropped.labels(priority).inc()

    def started(self, priority: str, waited_s: float) -> None:
        self._depth.labels(priority).dec()
        self._wait.labels(priority).observe(waited_s)

    @contextmanager
    def running(
        self, kind: str, calls: Sequence[Call], rows: int, tokens: int, padded_tokens: int
    ) -> Iterator[None]:
        self._rows.labels(kind).observe(rows)
        self._tokens.labels(kind).inc(tokens)
        self._padded_tokens.labels(kind).inc(padded_tokens)
        self._calls = calls
        started = time.perf_counter()
        try:
            with (
                self._running.labels(kind).track_inprogress(),
                self._tracing.working(kind, calls, rows=rows, padded_tokens=padded_tokens),
                out_of_memory.telling(lambda retried: self.out_of_memory(kind, retried=retried)),
            ):
                yield
        finally:
            seconds = time.perf_counter() - started
            self._work.labels(kind).observe(seconds)
            ms = round(seconds * 1000, 1)
            self._log(logging.DEBUG, "work", kind, rows=rows, padded_tokens=padded_tokens, ms=ms)
            self._calls = ()

    def finished(self, user: str, kind: str, device_s: float) -> None:
        self._device.labels(self._user(user), kind).inc(device_s)

    def out_of_memory(self, kind: str, *, retried: bool) -> None:
        self._out_of_memory.labels(kind, str(int(retried))).inc()
        self._log(logging.WARNING, "out of memory", kind, retried=retried)

    def _log(self, level: int, message: str, kind: str, **fields: object) -> None:
        ids = [call.request_id for call in self._calls]
        _log.log(level, message, extra={"fields": {"request_ids": ids, "kind": kind, **fields}})


class DeviceMemory(Collector):
    """Memory as it is when it is asked for: of each CUDA device in use, else of this process."""

    def collect(self) -> Iterator[GaugeMetricFamily]:
        family = GaugeMetricFamily(
            "tdb_device_memory_bytes",
            "Memory by device. cuda:N: 'allocated' by tensors, 'reserved' by torch, 'free' and "
            "'total' of the whole device; cpu: 'resident' of this process.",
            labels=("device", "kind"),
        )
        for device, kind, size in device_memory():
            family.add_metric((device, kind), size)
        yield family


def device_memory() -> Iterator[tuple[str, str, int]]:
    """(device, kind, bytes); nothing for a device that no longer answers."""
    if not torch.cuda.is_available() or not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        yield from _resident()
        return
    for index in range(torch.cuda.device_count()):
        if not torch.cuda.memory_reserved(index):
            continue  # not ours: asking for more would make a context there
        name = f"cuda:{index}"
        yield name, "allocated", torch.cuda.memory_allocated(index)
        yield name, "reserved", torch.cuda.memory_reserved(index)
        try:
            free, total = torch.cuda.mem_get_info(index)
        except RuntimeError:  # its context is broken, and this process is about to end
            continue
        yield name, "free", free
        yield name, "total", total


def _resident() -> Iterator[tuple[str, str, int]]:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):  # no Linux
        return
    yield "cpu", "resident", pages * mmap.PAGESIZE
