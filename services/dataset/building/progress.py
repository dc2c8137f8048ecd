"""How far a build is, for whoever asks, and whom it tells when that changes."""

import threading
import time
from collections import deque
from collections.abc import Callable

from tdb.dataset.v1 import dataset_pb2

LATELY_S = 30.0
QUEUED, WAITING, RUNNING, CANCELLED, FAILED = (
    dataset_pb2.BUILD_STATE_QUEUED,
    dataset_pb2.BUILD_STATE_WAITING,
    dataset_pb2.BUILD_STATE_RUNNING,
    dataset_pb2.BUILD_STATE_CANCELLED,
    dataset_pb2.BUILD_STATE_FAILED,
)


class Progress:
    """Safe to use from several threads. The rate is that of the last LATELY_S seconds at work."""

    def __init__(self, dataset: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._build = dataset_pb2.Build(dataset=dataset, state=QUEUED)
        self._clock = clock
        self._seen: deque[tuple[float, int]] = deque()
        self._lock = threading.Lock()

    def begin(self, phase: str, unit: str, done: int, total: int, model: str) -> None:
        with self._lock:
            self._build.phase, self._build.unit, self._build.model = phase, unit, model
            self._build.done, self._build.total = done, total
            self._build.state, self._build.message = RUNNING, ""
            self._seen.clear()
            self._see()

    def at(self, done: int) -> None:
        """Never goes back: a segment that is repeated catches up first."""
        with self._lock:
            if done > self._build.done:
                self._build.done = done
                self._see()

    def total(self, total: int) -> None:
        with self._lock:
            self._build.total = total

    def waiting(self, message: str) -> None:
        """ "" when it goes on."""
        with self._lock:
            state = WAITING if message else RUNNING
            if self._build.state != state:
                self._seen.clear()
            self._build.state, self._build.message = state, message

    def ended(self, state: dataset_pb2.BuildState.ValueType, message: str = "") -> None:
        with self._lock:
            self._build.state, self._build.message = state, message

    def message(self) -> dataset_pb2.Build:
        with self._lock:
            found = dataset_pb2.Build()
            found.CopyFrom(self._build)
            if found.state != RUNNING or len(self._seen) < 2:
                return found
            (began, before), (now, done) = self._seen[0], self._seen[-1]
            if now > began and done > before:
                found.rate = (done - before) / (now - began)
                found.seconds_left = max(0, found.total - done) / found.rate
            return found

    def _see(self) -> None:
        now = self._clock()
        self._seen.append((now, self._build.done))
        while now - self._seen[0][0] > LATELY_S and len(self._seen) > 2:
            self._seen.popleft()
