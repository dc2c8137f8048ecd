"""The torch thread and its queue: sharing passes, leaving, failing, losing the device."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import pytest
import pytest_asyncio

from services.common.calls import Call
from services.common.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
)
from services.inference.device_times import DeviceTimes
from services.inference.engine.cancellation import CancelToken, SharedToken
from services.inference.scheduler import QueueLimits, Scheduler
from services.inference.task import Batch, Finished, Priority, Task


@pytest.fixture
def scheduler() -> Iterator[Scheduler]:
    scheduler = Scheduler(QueueLimits(per_user=8, total=16))
    yield scheduler
    scheduler.close()


class Blocker:
    """Holds the device until told otherwise."""

    def __init__(self) -> None:
        self.began, self.released = threading.Event(), threading.Event()

    def __call__(self, cancel: CancelToken) -> None:
        self.began.set()
        assert self.released.wait(10)

    async def begin(self, scheduler: Scheduler) -> "asyncio.Task[Finished[None]]":
        running = asyncio.ensure_future(scheduler.submit(self, Task("block")))
        await asyncio.to_thread(self.began.wait, 10)
        return running


@pytest_asyncio.fixture
async def busy(scheduler: Scheduler) -> AsyncIterator[Blocker]:
    blocker = Blocker()
    running = await blocker.begin(scheduler)
    yield blocker
    blocker.released.set()
    await asyncio.gather(running, return_exceptions=True)


def call(user: str, seconds: float | None = None) -> Call:
    deadline = None if seconds is None else time.monotonic() + seconds
    return Call("/tdb.Service/Work", f"id of {user}", user, deadline)


class Doubling:
    """Doubles numbers, several in one pass; remembers which passes there were."""

    def __init__(self) -> None:
        self.passes: list[list[int]] = []
        self.failing: Exception | None = None
        self.most = 100

    def task(self, number: int) -> Task:
        return Task("double", 1, batch=Batch("k", number, lambda each: True, len, self.many))

    def many(self, members: Sequence[int], cancel: CancelToken) -> Sequence[Any]:
        self.passes.append(list(members))
        cancel.check()
        if len(members) > self.most:
            raise OutOfMemoryError("not enough")
        if self.failing:
            raise self.failing
        return [InvalidArgument("negative") if number < 0 else 2 * number for number in members]

    def enter(self, scheduler: Scheduler, number: int, user: str) -> Any:
        def alone(cancel: CancelToken) -> Any:
            if number == 13:
                raise ZeroDivisionError
            (result,) = self.many([number], cancel)
            if isinstance(result, Exception):
                raise result
            return result

        return scheduler.enter(alone, self.task(number), call(user)).result()


class OutOfMemoryError(RuntimeError):
    """As torch calls it."""


async def test_what_waits_meanwhile_shares_a_pass(scheduler: Scheduler, busy: Blocker) -> None:
    doubling = Doubling()
    waiting = [
        asyncio.ensure_future(doubling.enter(scheduler, number, f"user {number}"))
        for number in range(5)
    ]
    await asyncio.sleep(0)
    busy.released.set()
    finished = await asyncio.gather(*waiting)
    assert [each.result for each in finished] == [0, 2, 4, 6, 8]
    assert doubling.passes == [[0, 1, 2, 3, 4]]
    assert {each.shared_by for each in finished} == {5}
    assert [each.place.position for each in finished] == [1, 2, 3, 4, 5]


async def test_a_refusal_of_one_leaves_the_others(scheduler: Scheduler, busy: Blocker) -> None:
    doubling = Doubling()
    waiting = [doubling.enter(scheduler, number, "ada") for number in (1, -1, 2)]
    busy.released.set()
    first, refused, last = await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance(first, Finished)
    assert isinstance(last, Finished)
    assert (first.result, last.result) == (2, 4)
    assert isinstance(refused, InvalidArgument)
    assert doubling.passes == [[1, -1, 2]]


async def test_a_bug_in_a_shared_pass_costs_only_whose_it_is(
    scheduler: Scheduler, busy: Blocker
) -> None:
    doubling = Doubling()
    doubling.failing = ValueError("a bug that shows only in the shared pass")

    async def alone(number: int) -> Any:
        def work(cancel: CancelToken) -> int:
            if number == 13:
                raise ZeroDivisionError
            return 2 * number

        return await scheduler.enter(work, doubling.task(number), call("ada")).result()

    waiting = [asyncio.ensure_future(alone(number)) for number in (1, 13, 2)]
    await asyncio.sleep(0)
    busy.released.set()
    first, broken, last = await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance(first, Finished)
    assert isinstance(last, Finished)
    assert (first.result, last.result) == (2, 4)
    assert isinstance(broken, ZeroDivisionError)


async def test_out_of_memory_halves_a_shared_pass_once(scheduler: Scheduler, busy: Blocker) -> None:
    doubling = Doubling()
    doubling.most = 2
    waiting = [doubling.enter(scheduler, number, "ada") for number in range(4)]
    busy.released.set()
    finished = await asyncio.gather(*waiting)
    assert [each.result for each in finished] == [0, 2, 4, 6]
    assert doubling.passes == [[0, 1, 2, 3], [0, 1], [2, 3]]


async def test_out_of_memory_twice_is_refused_for_now(scheduler: Scheduler) -> None:
    attempts = []

    def work(cancel: CancelToken) -> None:
        attempts.append(1)
        raise OutOfMemoryError("CUDA out of memory")

    with pytest.raises(ResourceExhausted, match="ran out of memory") as refused:
        await scheduler.submit(work)
    assert len(attempts) == 2
    assert refused.value.retry_after_s
    assert (await scheduler.submit(lambda cancel: 7)).result == 7


async def test_out_of_memory_that_passes_is_not_noticed(scheduler: Scheduler) -> None:
    attempts = []

    def work(cancel: CancelToken) -> int:
        attempts.append(1)
        if len(attempts) == 1:
            raise OutOfMemoryError("CUDA out of memory")
        return 7

    assert (await scheduler.submit(work)).result == 7


async def test_who_left_does_not_run_and_leaves_the_pass(
    scheduler: Scheduler, busy: Blocker
) -> None:
    doubling = Doubling()
    waiting = [
        asyncio.ensure_future(doubling.enter(scheduler, number, "ada")) for number in range(3)
    ]
    await asyncio.sleep(0)
    waiting[1].cancel()
    await asyncio.sleep(0)
    busy.released.set()
    finished = await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance(finished[1], asyncio.CancelledError)
    assert doubling.passes == [[0, 2]]


async def test_a_passed_deadline_is_not_run(scheduler: Scheduler, busy: Blocker) -> None:
    ran = []
    late = scheduler.enter(lambda cancel: ran.append(1), Task("late"), call("ada", 0.05))
    await asyncio.sleep(0.1)
    busy.released.set()
    with pytest.raises(DeadlineExceeded, match="the deadline passed"):
        await late.result()
    assert not ran


async def test_a_wait_beyond_the_deadline_is_refused_at_once(scheduler: Scheduler) -> None:
    await scheduler.submit(lambda cancel: time.sleep(0.3), Task("slow"))
    slow = [
        scheduler.enter(lambda cancel: time.sleep(0.3), Task("slow"), call("ada")) for _ in range(3)
    ]
    with pytest.raises(ResourceExhausted, match="the deadline would pass") as refused:
        scheduler.enter(lambda cancel: None, Task("slow"), call("ada", 0.2))
    assert refused.value.reason == "QUEUE_TOO_LONG"
    for each in slow:
        each.cancel()


async def test_the_bounds_of_the_queue(scheduler: Scheduler, busy: Blocker) -> None:
    tickets = [scheduler.enter(lambda cancel: None, Task("w"), call("ada")) for _ in range(8)]
    with pytest.raises(ResourceExhausted, match="you have 8"):
        scheduler.enter(lambda cancel: None, Task("w"), call("ada"))
    scheduler.enter(lambda cancel: None, Task("w"), call("bob"))
    for each in tickets:
        each.cancel()
    scheduler.enter(lambda cancel: None, Task("w"), call("ada"))


async def test_a_ticket_says_where_it_stands_until_it_runs(
    scheduler: Scheduler, busy: Blocker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.inference.scheduler.PLACES_EVERY_S", 0.01)
    before = scheduler.enter(lambda cancel: None, Task("w"), call("ada"))
    ticket = scheduler.enter(lambda cancel: 7, Task("w", priority=Priority.BULK), call("bob"))
    positions = []
    async for place in ticket.places():
        positions.append(place.position)
        if len(positions) == 1:
            before.cancel()
        else:
            busy.released.set()
    assert positions == [2, 1]
    assert (await ticket.result()).result == 7
    assert ticket.place() is None


async def test_a_block_that_ends_early_cancels_its_ticket(
    scheduler: Scheduler, busy: Blocker
) -> None:
    ran = []
    with scheduler.enter(lambda cancel: ran.append(1), Task("w")):
        pass
    busy.released.set()
    await scheduler.submit(lambda cancel: None)
    assert not ran


async def test_the_snapshot_says_who_waits_for_what(scheduler: Scheduler, busy: Blocker) -> None:
    scheduler.enter(lambda cancel: None, Task("sweep", priority=Priority.BULK), call("ada"))
    scheduler.enter(lambda cancel: None, Task("click"), call("bob"))
    seen = scheduler.snapshot()
    assert [(each.kind, each.user, each.running) for each in seen] == [
        ("block", "local", True),
        ("click", "bob", False),
        ("sweep", "ada", False),
    ]
    assert [each.place.position for each in seen] == [0, 1, 2]
    assert seen[1].call
    assert seen[1].call.request_id == "id of bob"
    assert all(each.waited_s >= 0 for each in seen)


async def test_a_lost_device_fails_everything_and_tells(
    scheduler: Scheduler, busy: Blocker
) -> None:
    told = threading.Event()
    scheduler.on_lost = told.set

    def lose(cancel: CancelToken) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    losing = scheduler.enter(lose, Task("w"), call("ada"))
    behind = scheduler.enter(lambda cancel: 7, Task("w"), call("ada"))
    busy.released.set()
    for ticket in (losing, behind):
        with pytest.raises(Unavailable, match="the device failed") as refused:
            await ticket.result()
        assert refused.value.reason == "DEVICE_LOST"
    assert told.is_set()
    with pytest.raises(Unavailable, match="the device failed"):
        scheduler.enter(lambda cancel: None, Task("w"))


async def test_another_error_loses_nothing(scheduler: Scheduler) -> None:
    def fail(cancel: CancelToken) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        await scheduler.submit(fail)
    assert (await scheduler.submit(lambda cancel: 7)).result == 7


async def test_closing_finishes_what_is_queued_and_refuses_the_rest() -> None:
    scheduler = Scheduler()
    blocker = Blocker()
    running = await blocker.begin(scheduler)
    queued = asyncio.ensure_future(scheduler.submit(lambda cancel: 7))
    await asyncio.sleep(0)
    closing = asyncio.ensure_future(asyncio.to_thread(scheduler.close))
    await asyncio.to_thread(_until_closed, scheduler)
    with pytest.raises(Unavailable, match="stopping"):
        await scheduler.submit(lambda cancel: None)
    blocker.released.set()
    await closing
    assert (await queued).result == 7
    await running
    assert not scheduler._thread.is_alive()


def _until_closed(scheduler: Scheduler) -> None:
    while not scheduler._closed:
        time.sleep(0.01)


def test_a_shared_token_lives_as_long_as_one_of_its_members() -> None:
    left, late = CancelToken(), CancelToken(time.monotonic() - 1)
    there = CancelToken()
    left.cancel()
    SharedToken([left, late, there]).check()
    there.cancel()
    with pytest.raises(Cancelled):
        SharedToken([left, late, there]).check()
    with pytest.raises(DeadlineExceeded):
        SharedToken([left, late]).check()


def test_device_times_are_learnt_by_kind() -> None:
    times = DeviceTimes()
    assert times.predict("Attribute", 100) == 0
    for tokens in (10, 100, 50, 20) * 5:
        times.observe("Attribute", tokens, 0.05 + 0.002 * tokens)
        times.observe("Run", tokens, 0.001)
    assert times.predict("Attribute", 200) == pytest.approx(0.45, rel=1e-6)
    assert times.predict("Run", 200) == pytest.approx(0.001)
    for _ in range(200):
        times.observe("Attribute", 100, 1.0)
    assert times.predict("Attribute", 100) == pytest.approx(1.0, rel=0.01)
