"""The torch thread: one joined worker takes work from a queue; the event loop never runs the model.

Work whose caller left, or whose deadline passed, is dropped before it runs; a cancel token stops it
between layers once it does. First come, first served: the fair scheduler is its own part.
"""

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from services.common.errors import ResourceExhausted, TdbError, Unavailable
from services.inference.engine.cancellation import CancelToken

QUEUE_LIMIT = 256

Result = TypeVar("Result")


@dataclass(frozen=True)
class Finished(Generic[Result]):
    """A result and how long it waited for the device."""

    result: Result
    queue_ms: float


class OnDevice(Protocol):
    """Runs work on the torch thread for the call that is being served, until its deadline."""

    def __call__(
        self, work: Callable[[CancelToken], Result]
    ) -> Coroutine[Any, Any, Finished[Result]]: ...


@dataclass(frozen=True)
class _Job:
    work: Callable[[CancelToken], Any]
    cancel: CancelToken
    loop: asyncio.AbstractEventLoop
    future: "asyncio.Future[Any]"
    queued_at: float


class TorchWorker:
    """Runs callables one at a time on its own thread, in the order they came."""

    def __init__(self) -> None:
        self._jobs: queue.Queue[_Job | None] = queue.Queue(QUEUE_LIMIT)
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="torch")
        self._thread.start()

    async def submit(
        self, work: Callable[[CancelToken], Result], deadline: float | None = None
    ) -> Finished[Result]:
        """Runs `work` on the torch thread. `deadline` is on the clock of `time.monotonic`.

        Raises what `work` raises, ResourceExhausted when the queue is full, Unavailable after
        `close`. A caller that is cancelled cancels its work.
        """
        if self._closed:
            raise Unavailable("the service is stopping")
        loop = asyncio.get_running_loop()
        job = _Job(work, CancelToken(deadline), loop, loop.create_future(), time.perf_counter())
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            raise ResourceExhausted(
                f"{QUEUE_LIMIT} requests are waiting already; try again in a few seconds",
                retry_after_s=2.0,
            ) from None
        try:
            finished: Finished[Result] = await job.future
        except asyncio.CancelledError:
            job.cancel.cancel()
            raise
        return finished

    def close(self) -> None:
        """Finishes what is queued, then joins the thread."""
        if not self._closed:
            self._closed = True
            self._jobs.put(None)
            self._thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            started = time.perf_counter()
            try:
                job.cancel.check()
                outcome: Any = Finished(job.work(job.cancel), (started - job.queued_at) * 1e3)
            except Exception as error:
                outcome = _out_of_memory(error) or error
            try:
                job.loop.call_soon_threadsafe(_deliver, job.future, outcome)
            except RuntimeError:
                continue  # the event loop ended while the job ran: nobody waits for it


def _deliver(future: "asyncio.Future[Any]", outcome: Any) -> None:
    if future.cancelled():
        return
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)


def _out_of_memory(error: Exception) -> TdbError | None:
    """PyTorch's out-of-memory errors as a refusal; told by name, so that this needs no device."""
    text = str(error)
    if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        return ResourceExhausted(
            "the device ran out of memory; try a shorter prompt, or again later", retry_after_s=5.0
        )
    return None
