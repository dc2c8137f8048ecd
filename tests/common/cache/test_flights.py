"""Single flight: one computation for all who ask at once, and nobody is hurt by another."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing

import pytest

from services.common.cache.flights import Flights


class Worked:
    """Work that counts how often it was begun, and goes on when the test says so."""

    def __init__(self) -> None:
        self.begun = 0
        self.cancelled = 0
        self.go_on = asyncio.Event()
        self.error: BaseException | None = None

    async def __call__(self) -> AsyncIterator[str]:
        self.begun += 1
        yield "first"
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error:
            raise self.error
        yield "second"


@pytest.fixture
def work() -> Worked:
    return Worked()


async def all_of(flights: Flights[str], work: Callable[[], AsyncIterator[str]]) -> list[str]:
    async with aclosing(flights.follow("key", work)) as found:  # type: ignore[type-var]
        return [item async for item in found]


async def turns() -> None:
    """Lets every task that can run do so."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_all_who_ask_at_once_get_all_of_one_computation(work: Worked) -> None:
    flights = Flights[str]()
    early = [asyncio.ensure_future(all_of(flights, work)) for _ in range(50)]
    await turns()
    late = [asyncio.ensure_future(all_of(flights, work)) for _ in range(50)]
    await turns()
    work.go_on.set()
    assert await asyncio.gather(*early, *late) == [["first", "second"]] * 100
    assert (work.begun, flights.joined, len(flights)) == (1, 99, 0)


async def test_items_come_as_they_are_made(work: Worked) -> None:
    flights = Flights[str]()
    for _ in range(2):
        follower = flights.follow("key", work)
        assert await anext(follower) == "first"
        assert not work.go_on.is_set()
    work.go_on.set()
    assert [item async for item in follower] == ["second"]


async def test_other_keys_are_other_work(work: Worked) -> None:
    flights = Flights[str]()
    work.go_on.set()
    for key in ("a", "b"):
        assert [item async for item in flights.follow(key, work)] == ["first", "second"]
    assert work.begun == 2


async def test_what_is_over_is_begun_anew(work: Worked) -> None:
    flights = Flights[str]()
    work.go_on.set()
    assert await all_of(flights, work) == await all_of(flights, work)
    assert (work.begun, flights.joined) == (2, 0)


@pytest.mark.parametrize("leaver", [0, 1, 2])
async def test_who_leaves_leaves_the_others(work: Worked, leaver: int) -> None:
    flights = Flights[str]()
    waiting = [asyncio.ensure_future(all_of(flights, work)) for _ in range(3)]
    await turns()
    waiting.pop(leaver).cancel()
    await turns()
    assert work.cancelled == 0
    work.go_on.set()
    assert await asyncio.gather(*waiting) == [["first", "second"]] * 2
    assert work.begun == 1


async def test_the_last_to_leave_cancels_the_work(work: Worked) -> None:
    flights = Flights[str]()
    waiting = [asyncio.ensure_future(all_of(flights, work)) for _ in range(3)]
    await turns()
    for task in waiting:
        assert work.cancelled == 0
        task.cancel()
        await turns()
    assert work.cancelled == 1
    assert len(flights) == 0
    assert all(task.cancelled() for task in waiting)


async def test_who_comes_after_all_have_left_begins_anew(work: Worked) -> None:
    """Even before the cancelled work has noticed."""
    flights = Flights[str]()
    leaving = flights.follow("key", work)
    await anext(leaving)
    await leaving.aclose()  # type: ignore[attr-defined]
    coming = asyncio.ensure_future(all_of(flights, work))
    await turns()
    work.go_on.set()
    assert await coming == ["first", "second"]
    assert (work.begun, work.cancelled) == (2, 1)


async def test_work_that_was_never_begun_is_cancelled_too(work: Worked) -> None:
    flights = Flights[str]()
    waiting = asyncio.ensure_future(all_of(flights, work))
    await asyncio.sleep(0)
    waiting.cancel()
    await turns()
    assert len(flights) == 0
    assert work.begun == work.cancelled


async def test_an_error_reaches_all_and_is_forgotten(work: Worked) -> None:
    flights = Flights[str]()
    work.error = ValueError("no")
    waiting = [asyncio.ensure_future(all_of(flights, work)) for _ in range(5)]
    await turns()
    work.go_on.set()
    found = await asyncio.gather(*waiting, return_exceptions=True)
    assert [repr(each) for each in found] == ["ValueError('no')"] * 5
    work.error = None
    assert await all_of(flights, work) == ["first", "second"]


async def test_a_cancelled_error_from_within_is_an_error(work: Worked) -> None:
    """Let out, it would be taken for the caller's own leaving, and its client would wait."""
    flights = Flights[str]()
    work.error = asyncio.CancelledError()
    work.go_on.set()
    with pytest.raises(RuntimeError, match="cancelled from within"):
        await all_of(flights, work)
    work.error = None
    assert await all_of(flights, work) == ["first", "second"]


async def test_every_follower_has_its_own_deadline(work: Worked) -> None:
    flights = Flights[str]()

    async def until(seconds: float) -> list[str]:
        async with asyncio.timeout(seconds):
            return await all_of(flights, work)

    hurried = asyncio.ensure_future(until(0.01))
    patient = asyncio.ensure_future(until(60))
    with pytest.raises(TimeoutError):
        await hurried
    work.go_on.set()
    assert await patient == ["first", "second"]
    assert work.begun == 1
