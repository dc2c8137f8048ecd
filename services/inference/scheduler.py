"""The scheduler: one joined torch thread, and the queue that feeds it.

    ticket = scheduler.enter(work, task, call)   # on the event loop; raises when the queue is full
    ticket.place()                               # where it stands
    finished = await ticket.result()

The event loop never runs the model. `fair_queue` says who is next. Work whose caller left, or whose
deadline passed, does not run; a cancel token stops it between layers once it does. Nothing waits
for a batch to fill: while the device is busy the queue fills by itself.

Out of memory frees and retries once, a batch in halves; then it is refused for now. A lost device
fails everything, and `on_lost` is told, which ends the process for a supervisor to restart.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

from services.common import calls
from services.common.calls import Call
from services.common.errors import ResourceExhausted, TdbError, Unavailable
from services.inference import lost_device
from services.inference.device_times import DeviceTimes
from services.inference.engine import out_of_memory
from services.inference.engine.cancellation import CancelToken, SharedToken
from services.inference.fair_queue import Entry, FairQueue
from services.inference.observer import SchedulerObserver, Unobserved
from services.inference.task import Finished, Place, Task

Result = TypeVar("Result")
Work = Callable[[CancelToken], Result]

PLACES_EVERY_S = 0.5
_log = logging.getLogger("tdb.scheduler")


@dataclass(frozen=True)
class QueueLimits:
    """How much may wait."""

    per_user: int = 256
    total: int = 2048


@dataclass(eq=False)
class _Job(Entry):
    """An entry of the queue and who waits for it."""

    work: Work[Any] = field(kw_only=True)
    cancel: CancelToken = field(kw_only=True)
    loop: asyncio.AbstractEventLoop = field(kw_only=True)
    future: "asyncio.Future[Any]" = field(kw_only=True)
    call: Call | None = field(kw_only=True)
    queued_at: float = field(kw_only=True)
    arrived: Place | None = None


@dataclass(frozen=True)
class QueueEntry:
    """One piece of work, as an operator sees it."""

    user: str
    call: Call | None
    kind: str
    running: bool
    place: Place
    waited_s: float
    """Since it came, or since it began to run."""


class Ticket(Generic[Result]):
    """A piece of work that was let in. Used with `with`, it is cancelled when the block ends."""

    def __init__(self, scheduler: "Scheduler", job: _Job) -> None:
        self._scheduler = scheduler
        self._job = job

    def place(self) -> Place | None:
        """Where it stands; None once it runs."""
        return self._scheduler.place(self._job)

    async def places(self) -> AsyncIterator[Place]:
        """Where it stands, whenever that changed, until it is done."""
        last = None
        while not self._job.future.done():
            await asyncio.wait({self._job.future}, timeout=PLACES_EVERY_S)
            place = self.place()
            if place and (last is None or place.position != last.position):
                last = place
                yield place

    async def result(self) -> Finished[Result]:
        """Raises what the work raises. A caller that is cancelled cancels the work."""
        try:
            finished: Finished[Result] = await self._job.future
        except asyncio.CancelledError:
            self.cancel()
            raise
        return finished

    def cancel(self) -> None:
        if not self._job.future.done():
            self._job.future.cancel()
        self._scheduler.drop(self._job)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cancel()


class OnDevice(Protocol):
    """Runs work for the call that is being served, until its deadline."""

    async def __call__(self, work: Work[Result], task: Task) -> Finished[Result]: ...

    def enter(self, work: Work[Result], task: Task) -> Ticket[Result]: ...


class Scheduler:
    """Runs work on its own thread, one piece or one batch at a time."""

    def __init__(
        self,
        limits: QueueLimits | None = None,
        observer: SchedulerObserver | None = None,
    ) -> None:
        limits = limits or QueueLimits()
        self._queue: FairQueue[_Job] = FairQueue(limits.per_user, limits.total)
        self._observer = observer or Unobserved()
        self.on_lost: Callable[[], object] | None = None
        """Called on the torch thread once the device can no longer be used."""
        self.on_trouble: Callable[[], object] | None = None
        """Called on the torch thread when memory ran out for good."""
        self._times = DeviceTimes()
        self._changed = threading.Condition()
        self._running: list[_Job] = []
        self._running_since = 0.0
        self._refusal: dict[str, Any] = {}
        """What says why nothing is let in any more, once nothing is."""
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="torch")
        self._thread.start()

    def enter(self, work: Work[Result], task: Task, call: Call | None = None) -> Ticket[Result]:
        """Queues `work`, for the call or, without one, for the service itself.

        Raises ResourceExhausted when too much waits, or when its turn would come after its
        deadline; Unavailable after `close` and once the device is lost.
        """
        with self._changed:
            try:
                job = self._let_in(work, task, call)
            except TdbError as refusal:
                self._observer.refused(refusal.reason)
                raise
            self._observer.queued(task.priority.value)
            self._changed.notify()
        return Ticket(self, job)

    def _let_in(self, work: Work[Any], task: Task, call: Call | None) -> _Job:
        if self._refusal:
            raise Unavailable(**self._refusal)
        loop = asyncio.get_running_loop()
        deadline = call.deadline if call else None
        job = _Job(
            call.user if call else calls.LOCAL_USER,
            task,
            self._times.predict(task.kind, task.tokens),
            work=work,
            # Those who share it leave one by one, each at their own deadline.
            cancel=CancelToken(None if call and call.shared else deadline),
            loop=loop,
            future=loop.create_future(),
            call=call,
            queued_at=time.monotonic(),
        )
        place = job.arrived = self._with_running(self._queue.add(job))
        if deadline is not None and place.expected_wait_s > max(deadline - job.queued_at, 0.0):
            self._queue.drop(job)
            raise ResourceExhausted(
                "the deadline would pass before the request's turn, in about "
                f"{place.expected_wait_s:.1f} s; allow more time, or try again later",
                reason="QUEUE_TOO_LONG",
                retry_after_s=min(max(place.expected_wait_s, 0.2), 30.0),
            )
        return job

    async def submit(
        self, work: Work[Result], task: Task | None = None, call: Call | None = None
    ) -> Finished[Result]:
        """`enter`, and its result."""
        return await self.enter(work, task or Task("work"), call).result()

    def place(self, job: _Job) -> Place | None:
        with self._changed:
            place = self._queue.place(job)
            return place and self._with_running(place)

    def drop(self, job: _Job) -> None:
        """Nobody waits for the job any more."""
        job.cancel.cancel()
        with self._changed:
            if self._queue.drop(job):
                self._observer.dropped(job.task.priority.value)

    def snapshot(self) -> list[QueueEntry]:
        """What runs, then what waits, in the order in which it is likely to run."""
        now = time.monotonic()
        with self._changed:
            running = [(job, True, Place(job.task.priority, 0, 0.0)) for job in self._running]
            waiting = [
                (job, False, self._with_running(place)) for job, place in self._queue.waiting()
            ]
            since = self._running_since
        return [
            QueueEntry(
                job.user,
                job.call,
                job.task.kind,
                runs,
                place,
                now - (since if runs else job.queued_at),
            )
            for job, runs, place in (*running, *waiting)
        ]

    def close(self) -> None:
        """Finishes what is queued, then joins the thread."""
        with self._changed:
            self._closed = True
            self._refusal = self._refusal or {"message": "the service is stopping"}
            self._changed.notify()
        self._thread.join()

    def _with_running(self, place: Place) -> Place:
        """Adds what is left of the work that runs to the expected wait."""
        if not self._running:
            return place
        spent = time.monotonic() - self._running_since
        left = max(sum(job.cost_s for job in self._running) - spent, 0.0)
        return Place(place.priority, place.position, place.expected_wait_s + left)

    def _run(self) -> None:
        while jobs := self._next():
            self._serve(jobs)

    def _next(self) -> list[_Job]:
        """Waits for work; empty once closed and done."""
        with self._changed:
            while True:
                jobs = self._queue.take()
                if jobs or self._closed:
                    self._running, self._running_since = jobs, time.monotonic()
                    return jobs
                self._changed.wait()

    def _serve(self, jobs: list[_Job]) -> None:
        started = self._running_since
        live = [job for job in jobs if self._is_wanted(job)]
        outcomes: list[Any] = []
        if live:
            outcomes = self._observed(live, started)
        seconds = time.monotonic() - started
        with self._changed:
            self._running = []
            if live and not any(isinstance(each, Exception) for each in outcomes):
                self._times.observe(live[0].task.kind, _padded_tokens(live), seconds)
            self._queue.settle(jobs, seconds)
        for job, outcome in zip(live, outcomes, strict=True):
            if not isinstance(outcome, Exception):
                assert job.arrived
                waited_ms = (started - job.queued_at) * 1e3
                outcome = Finished(outcome, waited_ms, job.arrived, len(live))
            _deliver(job, outcome)
        if self.on_trouble and any(map(_ran_out, outcomes)):
            self.on_trouble()

    def _observed(self, jobs: Sequence[_Job], started: float) -> list[Any]:
        """`_perform`, with everything about it told to the observer."""
        task = jobs[0].task
        for job in jobs:
            self._observer.started(task.priority.value, started - job.queued_at)
        tokens = sum(job.task.tokens for job in jobs)
        known = [job.call for job in jobs if job.call]
        padded = _padded_tokens(jobs)
        with self._observer.running(task.kind, known, len(jobs), tokens, padded):
            outcomes = self._perform(jobs)
        seconds = time.monotonic() - started
        for job in jobs:
            share = seconds * job.task.tokens / tokens
            self._observer.finished(job.user, job.task.kind, share)
        return outcomes

    def _is_wanted(self, job: _Job) -> bool:
        try:
            job.cancel.check()
        except TdbError as error:
            self._observer.dropped(job.task.priority.value)
            _deliver(job, error)
            return False
        return True

    def _perform(self, jobs: Sequence[_Job], retrying: bool = False) -> list[Any]:
        """The result or the error of each job."""
        try:
            return self._together(jobs) if len(jobs) > 1 else [jobs[0].work(jobs[0].cancel)]
        except Exception as error:
            failure = error
        if lost_device.is_lost(failure):
            self._lose(failure)
            return [Unavailable(**self._refusal) for _ in jobs]
        if out_of_memory.is_out_of_memory(failure):
            del failure  # its traceback keeps the pass and its tensors alive
            self._observer.out_of_memory(jobs[0].task.kind, retried=not retrying)
            if retrying:
                return [out_of_memory.refusal() for _ in jobs]
            out_of_memory.free()
            half = (len(jobs) + 1) // 2
            parts = [part for part in (jobs[:half], jobs[half:]) if part]
            return [each for part in parts for each in self._perform(part, retrying=True)]
        if len(jobs) == 1:
            return [failure]
        # One of them may be to blame: the others shall not pay for it.
        return [each for job in jobs for each in self._perform([job], retrying)]

    @staticmethod
    def _together(jobs: Sequence[_Job]) -> list[Any]:
        batch = jobs[0].task.batch
        assert batch
        members = [job.task.batch.member for job in jobs if job.task.batch]
        outcomes = list(batch.run(members, SharedToken([job.cancel for job in jobs])))
        for outcome in outcomes:
            if isinstance(outcome, Exception) and not isinstance(outcome, TdbError):
                raise outcome
        return outcomes

    def _lose(self, error: Exception) -> None:
        """The device is gone: refuses everything from here on."""
        _log.critical("the device is lost", exc_info=error)
        with self._changed:
            self._refusal = {
                "message": "the device failed, so the service starts again; try again in a minute",
                "reason": "DEVICE_LOST",
                "retry_after_s": 10.0,
            }
            waiting = self._queue.clear()
        for job in waiting:
            _deliver(job, Unavailable(**self._refusal))
        if self.on_lost:
            self.on_lost()


def _ran_out(outcome: object) -> bool:
    return isinstance(outcome, ResourceExhausted) and outcome.reason == out_of_memory.OUT_OF_MEMORY


def _padded_tokens(jobs: Sequence[_Job]) -> int:
    batch = jobs[0].task.batch
    if batch is None or len(jobs) == 1:
        return jobs[0].task.tokens
    return batch.padded_tokens([job.task.batch.member for job in jobs if job.task.batch])


def _deliver(job: _Job, outcome: Any) -> None:
    """Hands the outcome to whoever waits, on their loop."""
    # The event loop may have ended while the job ran: nobody waits for it then.
    with contextlib.suppress(RuntimeError):
        job.loop.call_soon_threadsafe(_settle, job.future, outcome)


def _settle(future: "asyncio.Future[Any]", outcome: Any) -> None:
    if future.cancelled():
        return
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)


class ForCall:
    """The scheduler as the call that is being served uses it: an `OnDevice`."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    async def __call__(self, work: Work[Result], task: Task) -> Finished[Result]:
        return await self.enter(work, task).result()

    def enter(self, work: Work[Result], task: Task) -> Ticket[Result]:
        return self._scheduler.enter(work, task, calls.current())
