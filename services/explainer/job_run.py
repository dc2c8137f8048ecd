"""One job at work: several components at once, until it is over, is told to stop, or cannot go on.

What cannot be done now is done later: while a service or the endpoint is away the job is WAITING,
tries one component after a while, and is RUNNING again once that was dealt with. What cannot be
done at all ends the job (a wrong key) or the component (a damaged record), and is said.
"""

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Protocol

from services.common import calls
from services.common.errors import (
    DeadlineExceeded,
    NotFound,
    ResourceExhausted,
    TdbError,
    Unavailable,
)
from services.explainer.database import STORE_FULL
from services.explainer.engine.budget import BudgetExceeded
from services.explainer.engine.provider_settings import (
    ProviderMisconfigured,
    ProviderNotConfigured,
)
from services.explainer.job_ledger import JobLedger
from services.explainer.job_store import ComponentState, Dealt, JobState, JobStore, StoredJob

FIRST_PAUSE_S, LONGEST_PAUSE_S = 2.0, 60.0
TRIES = 3
"""How often a component may find the endpoint away while others are answered."""
RATE_OVER = 50
"""The rate is that of so many components."""

_log = logging.getLogger("tdb.explainer")


class Skipped(Exception):
    """A component that is not worth an explanation, or has one; `reason` is stable."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Item:
    """A component that was dealt with, as those who follow hear of it."""

    component: str
    explanation_id: str = ""
    text: str = ""
    reason: str = ""


@dataclass(frozen=True)
class JobView:
    """How a job is: as it is stored, and what that leads one to expect. `tokens` in all."""

    job: StoredJob
    tokens: int | None = None
    rate: float | None = None
    seconds_left: float | None = None


@dataclass(frozen=True)
class JobEnd(JobView):
    """How a job was when it ended or was paused: the last that is heard of it."""


class Work(Protocol):
    """What a job does with a component."""

    async def __call__(
        self, position: int, component: str, ledger: JobLedger, *, tolerant: bool
    ) -> tuple[Dealt, str]:
        """What became of it, written down already, and the text of its explanation.

        Raises Skipped, or TdbError where there is no explanation. `tolerant`: the endpoint seems to
        be there and to fail for this component only.
        """

    def go_on(self) -> None:
        """Said when what was away is tried again."""


class Wish(Enum):
    """What a job was told."""

    PAUSE = auto()
    CANCEL = auto()
    CLOSE = auto()


class JobRun:
    """A job of this process."""

    def __init__(
        self,
        job: StoredJob,
        store: JobStore,
        ledger: JobLedger,
        work: Work,
        at_once: Callable[[], int],
    ) -> None:
        self._job = job
        self._store = store
        self._ledger = ledger
        self._work = work
        self._at_once = at_once
        self._counts = Counter(job.counts)
        self._reasons = Counter(job.reasons)
        self._pending: deque[tuple[int, str]] = deque()
        self._tasks: dict[asyncio.Task[tuple[Dealt, str]], tuple[int, str]] = {}
        self._wish: Wish | None = None
        self._told = asyncio.Event()
        self._answered = 0
        self._found_away: dict[int, tuple[int, int]] = {}
        self._times: deque[float] = deque(maxlen=RATE_OVER)
        self._followers: set[asyncio.Queue[Item | JobView | None]] = set()
        self.ended = asyncio.Event()
        """Set once it does not go on by itself, or only when the service is back."""

    @property
    def id(self) -> str:
        return self._job.id

    @property
    def number(self) -> int:
        return self._job.number

    @property
    def user(self) -> str:
        return self._job.user

    @property
    def state(self) -> JobState:
        return self._job.state

    def view(self) -> JobView:
        job = replace(
            self._job,
            used=self._ledger.used,
            counts=dict(self._counts),
            reasons=dict(self._reasons),
        )
        return forecast(job, self._rate())

    def follow(self) -> asyncio.Queue[Item | JobView | None]:
        """Items as they come, how the job is when its state changes, and None at the end."""
        queue: asyncio.Queue[Item | JobView | None] = asyncio.Queue()
        self._followers.add(queue)
        return queue

    def unfollow(self, queue: asyncio.Queue[Item | JobView | None]) -> None:
        self._followers.discard(queue)

    def tell(self, wish: Wish) -> None:
        """Nothing further is begun. What is on its way ends; with CANCEL, only calls that were
        sent. Who was told to cancel is not told otherwise."""
        if self._wish is not Wish.CANCEL:
            self._wish = wish
        self._told.set()
        if wish is Wish.CANCEL:
            self.cut_off()

    def cut_off(self) -> None:
        """Ends the work on components that are on their way."""
        for task in self._tasks:
            task.cancel()

    async def run(self) -> None:
        """Works until the job is over, paused, without budget or failed, or is to close."""
        calls.enter(calls.Call("ExplainMany", self._job.id, self._job.user))
        try:
            self._pending.extend(await self._store.pending(self._job.number))
            await self._until_it_stops()
        except Exception as bug:
            _log.exception("a job failed", extra={"fields": {"job": self.id}})
            await self._set(JobState.FAILED, f"a fault of ours: {type(bug).__name__}")
        finally:
            self.cut_off()
            self.let_go()

    async def stop_here(self, state: JobState) -> None:
        """Ends a job that has not begun to run."""
        await self._set(state)
        self.let_go()

    def let_go(self) -> None:
        """Lets those go who follow."""
        self.ended.set()
        self._tell(None)

    async def _until_it_stops(self) -> None:
        pause_s = FIRST_PAUSE_S
        while True:
            answered = self._answered
            if self._job.state is not JobState.WAITING and self._wish is None:
                await self._set(JobState.RUNNING)
            trouble = await self._go_on()
            if self._wish is Wish.CLOSE:
                return None
            await self._ledger.settled()
            await self._write(self._store.set_used(self._job.number, self._ledger.used))
            if not self._pending:
                return await self._set(JobState.DONE)
            if self._wish is not None:
                cancelled = self._wish is Wish.CANCEL
                return await self._set(JobState.CANCELLED if cancelled else JobState.PAUSED)
            assert trouble is not None
            if isinstance(trouble, BudgetExceeded):
                return await self._set(JobState.OUT_OF_BUDGET, trouble.message)
            if not _may_pass(trouble):
                return await self._set(JobState.FAILED, trouble.message)
            await self._set(JobState.WAITING, trouble.message)
            pause_s = FIRST_PAUSE_S if self._answered > answered else pause_s
            try:
                await asyncio.wait_for(self._told.wait(), pause_s)
            except TimeoutError:
                self._work.go_on()
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def _go_on(self) -> TdbError | None:
        """Deals with pending components until there are none, or something is in the way."""
        trouble: TdbError | None = None
        while True:
            if trouble is None and self._wish is None:
                self._begin()
            if not self._tasks:
                return trouble
            done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                trouble = await self._ended(task, *self._tasks.pop(task)) or trouble

    def _begin(self) -> None:
        # While something is away, one component finds out whether it still is.
        most = 1 if self._job.state is JobState.WAITING else max(self._at_once(), 1)
        while self._pending and len(self._tasks) < most:
            position, component = self._pending.popleft()
            tries, answered = self._found_away.get(position, (0, 0))
            tolerant = tries >= TRIES and self._answered > answered
            work = self._work(position, component, self._ledger, tolerant=tolerant)
            self._tasks[asyncio.ensure_future(work)] = position, component

    async def _ended(
        self, task: "asyncio.Task[tuple[Dealt, str]]", position: int, component: str
    ) -> TdbError | None:
        """What became of a component; what is in the way of all of them."""
        text = ""
        try:
            dealt, text = task.result()
        except asyncio.CancelledError:
            self._pending.appendleft((position, component))
            return None
        except Skipped as skipped:
            dealt = Dealt(ComponentState.SKIPPED, reason=skipped.reason)
        except TdbError as error:
            if _may_pass(error):
                tries, first = self._found_away.get(position, (0, self._answered))
                self._found_away[position] = tries + 1, first
                self._pending.append((position, component))
                return error
            if _is_everybodys(error):
                self._pending.appendleft((position, component))
                return error
            dealt = Dealt(ComponentState.FAILED, reason=error.reason)
        except Exception:
            _log.exception("a component failed", extra={"fields": {"component": component}})
            dealt = Dealt(ComponentState.FAILED, reason="INTERNAL")
        if dealt.state is not ComponentState.EXPLAINED:
            try:
                await self._store.deal(self._job.number, position, dealt, self._ledger.used_at_most)
            except TdbError as error:
                self._pending.append((position, component))
                return error
        await self._count(component, dealt, text)
        return None

    async def _count(self, component: str, dealt: Dealt, text: str) -> None:
        self._counts[ComponentState.PENDING] -= 1
        self._counts[dealt.state] += 1
        if dealt.reason:
            self._reasons[dealt.reason] += 1
        self._times.append(time.monotonic())
        if dealt.state is not ComponentState.SKIPPED:
            self._answered += 1
            if self._job.state is JobState.WAITING and self._wish is None:
                await self._set(JobState.RUNNING)
        reason = "" if dealt.state is ComponentState.EXPLAINED else dealt.reason
        self._tell(Item(component, dealt.explanation_id, text, reason))

    async def _set(self, state: JobState, message: str = "") -> None:
        if (state, message) == (self._job.state, self._job.message):
            return
        await self._write(self._store.set_state(self._job.number, state, message))
        self._job = replace(self._job, state=state, message=message)
        self._tell(self.view())

    async def _write(self, writing: Awaitable[None]) -> None:
        """What can be said again later need not be stored now, when the store is full."""
        try:
            await writing
        except TdbError as error:
            if not _may_pass(error):
                raise
            _log.warning("a job cannot be written", extra={"fields": {"why": error.message}})

    def _tell(self, what: Item | JobView | None) -> None:
        for queue in self._followers:
            queue.put_nowait(what)

    def _rate(self) -> float | None:
        """Components per second."""
        if self._job.state is not JobState.RUNNING or len(self._times) < 2:
            return None
        seconds = time.monotonic() - self._times[0]
        return (len(self._times) - 1) / seconds if seconds > 0 else None


def forecast(job: StoredJob, rate: float | None = None) -> JobView:
    """What is to be expected of a job, from what is done of it."""
    left = job.counts[ComponentState.PENDING]
    done = job.components - left
    tokens = None
    if done:
        tokens = round(job.used.tokens * job.components / done)
    return JobView(job, tokens, rate, None if rate is None else left / rate)


def _may_pass(error: TdbError) -> bool:
    is_away = isinstance(error, Unavailable | ResourceExhausted | DeadlineExceeded)
    return is_away or error.reason == STORE_FULL


def _is_everybodys(error: TdbError) -> bool:
    """Whether it would befall every component of the job."""
    if isinstance(error, BudgetExceeded | ProviderMisconfigured | ProviderNotConfigured):
        return True
    if isinstance(error, NotFound):
        return error.field == "dataset"
    return error.reason in ("DATASET_REFUSES", "INFERENCE_REFUSES")
