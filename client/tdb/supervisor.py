"""Starts the services of one machine, waits until all are ready, keeps them up, stops them.

Before ready, whatever dies ends everything: the user is there and reads why. After ready a dead
service is started again, after a pause that doubles, at most five times in ten minutes. Ports are
taken once: a service that was given any free port comes back on the same one.
"""

import asyncio
import contextlib
import http.client
import json
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tdb.children import Child, Service, say

RESTARTS = 5
RESTART_WINDOW_S = 600.0
FIRST_PAUSE_S = 0.5
POLL_S = 0.2
REMIND_S = 10.0


class SupervisorError(Exception):
    """What ended everything, in one sentence."""


@dataclass(frozen=True)
class Plan:
    """What to supervise. Services start in order; the last one is the gateway, whose `/readyz`
    speaks for all. `host` is where to connect to it."""

    services: Sequence[Service]
    env: Mapping[str, str]
    host: str
    log_folder: Path
    stop_grace_s: float
    loading: str


class Supervisor:
    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._env = dict(plan.env)
        self._children: dict[str, Child] = {}
        self._restarts: dict[str, list[float]] = {}
        self._restarting: set[asyncio.Task[Child]] = set()
        # What happens: a child ended, or None when the user wants us to stop.
        self._events: asyncio.Queue[Child | None] = asyncio.Queue()
        self._asked_to_stop = False
        # Children watch the reading end and end when the writing end closes: with us.
        self._lifeline, self._held = os.pipe()

    async def run(self) -> None:
        """Supervises until SIGTERM, SIGINT or SIGHUP. Raises SupervisorError for anything else that
        ends it. No child is left, however it ends."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self._stop)
        try:
            if await self._become_ready():
                await self._keep_up()
            say("Stopping.")
        finally:
            await self._stop_children()
            os.close(self._lifeline)
            os.close(self._held)

    def _stop(self) -> None:
        if self._asked_to_stop:  # asked twice: no more waiting
            for child in self._children.values():
                child.kill()
        self._asked_to_stop = True
        self._events.put_nowait(None)

    async def _become_ready(self) -> bool:
        """Starts everything and prints the URL. False when the user stopped it first."""
        starting = asyncio.ensure_future(self._start_all())
        event = asyncio.ensure_future(self._events.get())
        await asyncio.wait({starting, event}, return_when=asyncio.FIRST_COMPLETED)
        if event.done():
            starting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await starting
            if (child := event.result()) is not None:
                raise SupervisorError(child.failure())
            return False
        event.cancel()
        print(f"http://{_bracketed(self._plan.host)}:{starting.result()}", flush=True)
        return True

    async def _start_all(self) -> int:
        """Starts every service and waits until all are ready; the gateway's port."""
        port = 0
        for service in self._plan.services:
            child = await self._start(service)
            port = await child.listening
            # From here on this port is settled, for the services that follow and for restarts.
            self._env[service.port_variable] = str(port)
            say(f"{service.name}: listening on port {port}")
        say(self._plan.loading)
        began = reminded = time.monotonic()
        while awaited := await asyncio.to_thread(_ask_ready, self._plan.host, port):
            if time.monotonic() - reminded > REMIND_S:
                reminded = time.monotonic()
                say(f"Still waiting after {reminded - began:.0f} s: {awaited}")
            await asyncio.sleep(POLL_S)
        return port

    async def _start(self, service: Service) -> Child:
        child = await Child.start(service, self._env, self._lifeline, self._plan.log_folder)
        self._children[service.name] = child
        child.ended.add_done_callback(lambda _: self._events.put_nowait(child))
        return child

    async def _keep_up(self) -> None:
        """Restarts what dies, until the user stops us."""
        while (child := await self._events.get()) is not None:
            now = time.monotonic()
            before = self._restarts.get(child.service.name, [])
            recent = [moment for moment in before if now - moment < RESTART_WINDOW_S]
            why = child.failure().rstrip(".")
            if len(recent) >= RESTARTS:
                raise SupervisorError(
                    f"{why}; it was restarted {RESTARTS} times in ten minutes, so everything is "
                    "stopped"
                )
            self._restarts[child.service.name] = [*recent, now]
            pause = FIRST_PAUSE_S * 2 ** len(recent)
            say(f"{why}; starting it again in {pause:g} s")
            task = asyncio.ensure_future(self._start_later(child.service, pause))
            self._restarting.add(task)
            task.add_done_callback(self._restarting.discard)

    async def _start_later(self, service: Service, pause: float) -> Child:
        await asyncio.sleep(pause)
        child = await self._start(service)
        say(f"{service.name}: listening again on port {await child.listening}")
        return child

    async def _stop_children(self) -> None:
        """The gateway first: what it is still answering needs the others."""
        for task in tuple(self._restarting):
            task.cancel()
        await asyncio.gather(*self._restarting, return_exceptions=True)
        for child in reversed(self._children.values()):
            await child.stop(self._plan.stop_grace_s)


def _ask_ready(host: str, port: int) -> str:
    """What `/readyz` still waits for; "" when everything is ready."""
    connection = http.client.HTTPConnection(host, port, timeout=5)
    try:
        connection.request("GET", "/readyz")
        response = connection.getresponse()
        body = json.loads(response.read())
        if response.status == 200:
            return ""
        return ", ".join(f"{name}: {reason}" for name, reason in body["awaited"].items())
    except (OSError, http.client.HTTPException, ValueError) as error:
        return f"gateway: {error}"
    finally:
        connection.close()


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
