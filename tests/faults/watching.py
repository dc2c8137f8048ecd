"""What the tests look at: work on the device as it begins, and what a process holds."""

import asyncio
import contextlib
import gc
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil
import pytest

from services.common.calls import Call
from services.inference.observer import Unobserved


@dataclass
class SlowDevice(Unobserved):
    """Counts the work that began by its kind, and makes each piece take `seconds` longer."""

    seconds: float = 0.0
    begun: list[str] = field(default_factory=list)

    @contextmanager
    def running(
        self, kind: str, calls: Sequence[Call], rows: int, tokens: int, padded_tokens: int
    ) -> Iterator[None]:
        self.begun.append(kind)
        time.sleep(self.seconds)
        yield


@dataclass(frozen=True)
class Held:
    """What this process holds that must be given back."""

    descriptors: int
    threads: int
    children: int

    @classmethod
    def now(cls) -> "Held":
        gc.collect()
        process = psutil.Process()
        return cls(process.num_fds(), threading.active_count(), len(process.children()))

    def exceeds(self, other: "Held") -> bool:
        return (
            self.descriptors > other.descriptors
            or self.threads > other.threads
            or self.children > other.children
        )


async def until(what: str, condition: Callable[[], bool], within_s: float = 20.0) -> None:
    """Waits for `condition`; fails with `what` when it does not come."""
    end = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > end:
            pytest.fail(f"not within {within_s:g} s: {what}")
        await asyncio.sleep(0.02)


class Cut:
    """A proxy on a port of its own whose connections can be cut as a client's machine dies: at
    once, without a word."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._writers: list[asyncio.StreamWriter] = []
        self.port = 0

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator["Cut"]:
        server = await asyncio.start_server(self._relay, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            self.cut()
            server.close()
            await server.wait_closed()

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._target)
        self._writers += [writer, back]
        with contextlib.suppress(ConnectionError):
            await asyncio.gather(self._copy(reader, back), self._copy(there, writer))

    @staticmethod
    async def _copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await source.read(65536):
                sink.write(data)
                await sink.drain()
        sink.close()
