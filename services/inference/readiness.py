"""Whether the device still works: a warm-up pass after every error of it.

Health is a flag, so that it answers while the device is busy. It was raised after the first warm-up
pass; when memory ran out for good another pass says whether it still holds, and as long as none
succeeds the service is NOT_SERVING.
"""

import asyncio
import logging
from collections.abc import Mapping
from typing import Protocol

from services.common.errors import Unavailable
from services.inference.engine.cancellation import CancelToken
from services.inference.engine.model import Model
from services.inference.scheduler import Scheduler
from services.inference.task import Task

RETRY_S = 5.0
_log = logging.getLogger("tdb.inference")


class Health(Protocol):
    """What a server says of itself."""

    async def set_serving(self) -> None: ...

    async def set_not_serving(self) -> None: ...


class Readiness:
    """Holds a server's health to what the device does."""

    def __init__(self, health: Health, scheduler: Scheduler, models: Mapping[str, Model]) -> None:
        self._health = health
        self._scheduler = scheduler
        self._models = models
        self._check: asyncio.Task[None] | None = None

    def doubt(self) -> None:
        """Begins to try the device, unless that is under way. To be called on the event loop."""
        if self._check is None or self._check.done():
            self._check = asyncio.ensure_future(self._until_it_works())

    async def _until_it_works(self) -> None:
        while True:
            try:
                await self._scheduler.submit(self._warm_up, Task("WarmUp"))
            except Unavailable:
                return  # stopping, or lost: others say so
            except Exception as error:
                await self._health.set_not_serving()
                _log.error("the device fails its warm-up pass", exc_info=error)
                await asyncio.sleep(RETRY_S)
            else:
                await self._health.set_serving()
                return

    def _warm_up(self, _: CancelToken) -> None:
        for model in self._models.values():
            model.warm_up()
