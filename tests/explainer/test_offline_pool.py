"""Processes that compute: replaced when they are killed, ended when there is nothing to do."""

import asyncio
import os
import signal
import time

import pytest

from services.explainer import offline_pool
from services.explainer.offline_pool import OfflinePool


async def test_killed_processes_are_replaced_and_idle_ones_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = OfflinePool(1)
    try:
        first = await pool.run(os.getpid)
        assert await pool.run(os.getppid) == os.getpid()
        with pytest.raises(ZeroDivisionError):
            await pool.run(divmod, 1, 0)
        waiting = [asyncio.ensure_future(pool.run(time.sleep, 0.05)) for _ in range(3)]
        await asyncio.sleep(0)
        os.kill(first, signal.SIGKILL)
        await asyncio.gather(*waiting)
        second = await pool.run(os.getpid)
        assert second != first, "all of them share the one that takes its place"
        monkeypatch.setattr(offline_pool, "IDLE_S", 0.0)
        assert await pool.run(os.getpid) == second
        await asyncio.sleep(0.01)
        assert await pool.run(os.getpid) != second
    finally:
        pool.close()
