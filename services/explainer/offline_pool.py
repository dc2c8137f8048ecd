"""Work that only computes, in processes of its own: the event loop answers others meanwhile.

    pool = OfflinePool()
    found = await pool.run(explain, component, ...)    # in a process, which imports this module

The processes start with the first work and end when there was none for a while, with `close`, or
when the service has gone, however it went.
"""

import asyncio
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import ParamSpec, TypeVar

MAX_PROCESSES = 8
IDLE_S = 60.0
"""How long processes are kept that have nothing to do."""
AHEAD = 2
"""Components per process that are read meanwhile."""

P = ParamSpec("P")
T = TypeVar("T")


class OfflinePool:
    """As many processes as there are processors, at most MAX_PROCESSES."""

    def __init__(self, processes: int | None = None) -> None:
        self.processes = processes or min(_processors(), MAX_PROCESSES)
        self._executor: ProcessPoolExecutor | None = None
        self._starting = asyncio.Lock()
        self._at_work = 0
        self._idle: asyncio.TimerHandle | None = None

    @property
    def at_once(self) -> int:
        """How many pieces of work keep all processes busy."""
        return AHEAD * self.processes

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of `work`, which is a function of a module, in a process.

        Processes that were killed are replaced, and the work is done once more.
        """
        self._at_work += 1
        try:
            executor = await self._started()
            try:
                return await asyncio.wrap_future(executor.submit(work, *args, **kwargs))
            except BrokenProcessPool:
                if self._executor is executor:
                    self._executor = None
                executor = await self._started()
                return await asyncio.wrap_future(executor.submit(work, *args, **kwargs))
        finally:
            self._at_work -= 1
            if not self._at_work:
                self._retire_later()

    def close(self) -> None:
        """Ends the processes, once what they are at is done."""
        if self._idle:
            self._idle.cancel()
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)

    def _retire_later(self) -> None:
        if self._idle:
            self._idle.cancel()
        self._idle = asyncio.get_running_loop().call_later(IDLE_S, self._retire)

    def _retire(self) -> None:
        if not self._at_work and self._executor is not None:
            self._executor.shutdown(wait=False)
            self._executor = None

    async def _started(self) -> ProcessPoolExecutor:
        async with self._starting:
            if self._executor is None:
                # Not by a fork: gRPC's threads would not be there.
                executor = ProcessPoolExecutor(
                    self.processes, multiprocessing.get_context("spawn"), initializer=_begin
                )
                # The first work starts all of them, which takes its time.
                await asyncio.to_thread(executor.submit, os.getpid)
                self._executor = executor
            return self._executor


def _processors() -> int:
    """Those that this process may use, where the system says so."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _begin() -> None:
    """Ends this process with the service, and not at Ctrl-C: the service says when. Whoever calls
    the service comes first."""
    os.nice(10)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow, name="follow-service", daemon=True).start()


def _follow() -> None:
    service = multiprocessing.parent_process()
    assert service is not None
    wait([service.sentinel])
    os._exit(1)
