"""Health after errors of the device."""

import asyncio
from typing import Any

import pytest

from services.inference import readiness
from services.inference.engine.cancellation import CancelToken
from services.inference.readiness import Readiness
from services.inference.scheduler import Scheduler
from tests.inference.test_scheduler import OutOfMemoryError, scheduler

__all__ = ["scheduler"]


class Health:
    def __init__(self) -> None:
        self.said: list[str] = []
        self.serving = asyncio.Event()

    async def set_serving(self) -> None:
        self.said.append("SERVING")
        self.serving.set()

    async def set_not_serving(self) -> None:
        self.said.append("NOT_SERVING")


class Failing:
    """A model whose first warm-up passes fail."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.tries = 0

    def warm_up(self) -> None:
        self.tries += 1
        if self.tries <= self.failures:
            raise ValueError("the device is in trouble")


async def trouble(scheduler: Scheduler, model: Any) -> Health:
    """What health says once memory has run out for good."""
    health = Health()
    checked = Readiness(health, scheduler, {"tiny": model})
    loop = asyncio.get_running_loop()
    scheduler.on_trouble = lambda: loop.call_soon_threadsafe(checked.doubt)

    def work(cancel: CancelToken) -> None:
        raise OutOfMemoryError("CUDA out of memory")

    with pytest.raises(Exception, match="ran out of memory"):
        await scheduler.submit(work)
    await asyncio.wait_for(health.serving.wait(), 5)
    return health


async def test_a_device_that_still_works_stays_serving(scheduler: Scheduler) -> None:
    model = Failing(0)
    assert (await trouble(scheduler, model)).said == ["SERVING"]
    assert model.tries == 1


async def test_a_device_that_fails_is_not_serving_until_it_works(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readiness, "RETRY_S", 0.01)
    health = await trouble(scheduler, Failing(3))
    assert health.said == ["NOT_SERVING"] * 3 + ["SERVING"]


async def test_other_errors_raise_no_doubt(scheduler: Scheduler) -> None:
    doubts: list[int] = []
    scheduler.on_trouble = lambda: doubts.append(1)
    with pytest.raises(ZeroDivisionError):
        await scheduler.submit(lambda cancel: 1 / 0)
    await scheduler.submit(lambda cancel: None)
    assert not doubts
