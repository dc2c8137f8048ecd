"""The jobs of this service: asked for once, at work until they are over, whoever listens.

A job is on disk before its first message is sent, and goes on after a restart. Each user has one
job at work, the others of that user wait in their order; jobs of different users share evenly what
can be done at once.
"""

import asyncio
import math
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace

from services.common.errors import FailedPrecondition, TdbError, Unavailable
from services.explainer.job_ledger import JobLedger
from services.explainer.job_run import (
    Item,
    JobEnd,
    JobRun,
    JobView,
    Wish,
    Work,
    forecast,
)
from services.explainer.job_store import JobState, JobStore, StoredJob

PROGRESS_S = 0.5
"""How often those who follow hear how far a job is, at most."""
MAX_UNDER_WAY = 1_000


@dataclass(frozen=True)
class Tools:
    """What a job works with: its account, what it does, and how much of that at once for all jobs
    that share the `place` (the endpoint, or the processors)."""

    ledger: JobLedger
    work: Work
    place: str
    at_once: int


class Jobs:
    """Jobs by id. `equip` gives each its tools; it raises TdbError where they are not there."""

    def __init__(
        self,
        store: JobStore,
        equip: Callable[[StoredJob], Tools],
    ) -> None:
        self._store = store
        self._equip = equip
        self._runs: dict[str, JobRun] = {}
        self._places: dict[str, str] = {}
        self._queues: dict[str, deque[JobRun]] = defaultdict(deque)
        self._workers: dict[str, asyncio.Task[None]] = {}
        self._closing = False

    async def start(self) -> None:
        """Goes on with the jobs that an earlier process left."""
        for job in await self._store.under_way():
            await self._enter(job)

    async def close(self, grace_s: float) -> None:
        """Gives what is on its way so long to end; the jobs go on when the service is back."""
        self._closing = True
        for queue in self._queues.values():
            for run in queue:
                run.let_go()
            queue.clear()
        runs = list(self._runs.values())
        for run in runs:
            run.tell(Wish.CLOSE)
            run.let_go()
        workers = list(self._workers.values())
        if workers:
            await asyncio.wait(workers, timeout=grace_s)
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)

    async def ask(self, request: str, user: str, components: Sequence[str]) -> str:
        """The id of a new job, which is on disk and in its queue."""
        if len(self._runs) >= MAX_UNDER_WAY:
            raise FailedPrecondition(
                f"{MAX_UNDER_WAY} jobs are under way: wait for some to end, or cancel them",
                reason="TOO_MANY_JOBS",
            )
        job = await self._store.add(request, user, components)
        await self._enter(job)
        return job.id

    async def get(self, id: str) -> JobView:
        """Raises NotFound."""
        run = self._runs.get(id)
        return run.view() if run else forecast(await self._store.get(id))

    async def list(self) -> list[JobView]:
        """The newest first."""
        return [
            self._runs[job.id].view() if job.id in self._runs else forecast(job)
            for job in await self._store.list()
        ]

    async def follow(self, id: str) -> AsyncGenerator[JobView | Item, None]:
        """How it is, then components as they are dealt with and how far it is, and at last how it
        ended or was paused. Raises NotFound; Unavailable when the service stops."""
        if id not in self._runs:
            stored = await self._store.get(id)
            if id not in self._runs:
                yield JobEnd(**vars(forecast(stored)))
                return
        run = self._runs[id]
        queue = run.follow()
        try:
            yield run.view()
            async for item in _as_they_come(queue, run.ended):
                yield run.view() if item is None else item
        finally:
            run.unfollow(queue)
        if run.state.is_under_way:
            raise Unavailable("the service stops; the job goes on when it is back", retry_after_s=1)
        yield JobEnd(**vars(run.view()))

    async def pause(self, id: str) -> JobView:
        """Raises NotFound, FailedPrecondition where it is not under way."""
        if id not in self._runs:
            job = await self._store.get(id)
            if id not in self._runs:
                raise FailedPrecondition(
                    f"the job is {job.state}, so there is nothing to pause", reason="JOB_STOPPED"
                )
        return await self._tell(self._runs[id], Wish.PAUSE, JobState.PAUSED)

    async def cancel(self, id: str) -> JobView:
        """Raises NotFound, FailedPrecondition where it is over."""
        if id not in self._runs:
            job = await self._store.get(id)
            if job.state.is_over:
                raise FailedPrecondition(f"the job is {job.state} already", reason="JOB_OVER")
            if id not in self._runs:
                await self._store.set_state(job.number, JobState.CANCELLED)
                return await self.get(id)
        return await self._tell(self._runs[id], Wish.CANCEL, JobState.CANCELLED)

    async def resume(self, id: str, request: str | None = None) -> JobView:
        """Goes on, with `request` in place of the earlier one. Raises NotFound, TdbError."""
        job = await self._store.get(id)
        if id in self._runs:
            raise FailedPrecondition(
                "the job is under way; pause it first where its budget is to be another",
                reason="JOB_UNDER_WAY",
            )
        if job.state.is_over:
            raise FailedPrecondition(
                f"the job is {job.state}: ask for another one", reason="JOB_OVER"
            )
        job = replace(job, request=job.request if request is None else request)
        run = self._run(job)  # refused here where its tools are not there
        self._enqueue(run)
        await self._store.restart(job.number, job.request)
        return run.view()

    async def _enter(self, job: StoredJob) -> None:
        """Puts a job in its queue; one that has lost its tools has failed."""
        try:
            self._enqueue(self._run(job))
        except TdbError as error:
            await self._store.set_state(job.number, JobState.FAILED, error.message)

    def _run(self, job: StoredJob) -> JobRun:
        tools = self._equip(job)

        def share() -> int:
            at_work = sum(
                run.state is JobState.RUNNING
                for run in self._runs.values()
                if self._places[run.id] == tools.place
            )
            return math.ceil(tools.at_once / max(at_work, 1))

        self._places[job.id] = tools.place
        job = replace(job, state=JobState.QUEUED, message="")
        return JobRun(
            job,
            self._store,
            tools.ledger,
            tools.work,
            share,
        )

    def _enqueue(self, run: JobRun) -> None:
        self._runs[run.id] = run
        self._queues[run.user].append(run)
        if run.user not in self._workers and not self._closing:
            self._workers[run.user] = asyncio.ensure_future(self._serve(run.user))

    async def _serve(self, user: str) -> None:
        queue = self._queues[user]
        while queue:
            run = queue.popleft()
            await run.run()
            self._forget(run)
        del self._workers[user], self._queues[user]

    def _forget(self, run: JobRun) -> None:
        del self._runs[run.id], self._places[run.id]

    async def _tell(self, run: JobRun, wish: Wish, at_once: JobState) -> JobView:
        if run in self._queues[run.user]:
            self._queues[run.user].remove(run)
            await run.stop_here(at_once)
            self._forget(run)
        else:
            run.tell(wish)
            # Also if the service ends before what is on its way does.
            await self._store.stop(run.number, at_once)
        return run.view()


async def _as_they_come(
    queue: "asyncio.Queue[Item | JobView | None]", ended: asyncio.Event
) -> AsyncIterator[Item | JobView | None]:
    """What a queue holds, until all has come; None where items have come and it is time to say how
    far the job is."""
    loop = asyncio.get_running_loop()
    due: float | None = None
    while not (ended.is_set() and queue.empty()):
        try:
            async with asyncio.timeout_at(due):
                said = await queue.get()
        except TimeoutError:
            due = None
            yield None
            continue
        if isinstance(said, Item) and due is None:
            due = loop.time() + PROGRESS_S
        if said is not None:
            yield said
        if due is not None and loop.time() >= due:
            due = None
            yield None
