"""A service in this process on an event loop of its own, so that plain code can call it."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from typing import Protocol

from services.common.server import ServiceServer
from services.common.settings import Settings
from services.inference.engine.model import Model
from services.inference.scheduler import Scheduler
from services.inference.server import build_server


class Listening(Protocol):
    port: int


@contextmanager
def in_thread(serving: AbstractAsyncContextManager[Listening]) -> Iterator[int]:
    """Keeps `serving` on a thread; its port."""
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()
    ready = threading.Event()
    ports: list[int] = []

    async def serve() -> None:
        async with serving as server:
            ports.append(server.port)
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), name="service")
    thread.start()
    try:
        assert ready.wait(30)
        yield ports[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


@asynccontextmanager
async def inference(models: dict[str, Model], **variables: str) -> AsyncIterator[ServiceServer]:
    """Serves `models`, the first by default."""
    names = ",".join(f"{name}=/" for name in models)
    settings = Settings.from_env(
        {"TDB_MODEL": names, "TDB_LOG_LEVEL": "error", "TDB_DRAIN_SECONDS": "1", **variables}
    )
    scheduler = Scheduler()
    try:
        async with build_server(settings, scheduler, models, port=0) as server:
            await server.set_serving()
            yield server
    finally:
        await asyncio.to_thread(scheduler.close)
