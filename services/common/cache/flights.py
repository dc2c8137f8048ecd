"""Single flight: who asks what is being worked out already gets the same answer, not another.

The first caller of a key starts the work in a task of its own; whoever comes meanwhile follows it.
All get every item from the first one on, as it comes. Nobody's leaving is felt by the others, and
when the last has left, the work is cancelled. An error reaches all, and is forgotten with the work.
"""

import asyncio
import contextvars
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Generic, TypeVar

Item = TypeVar("Item")
Work = Callable[[], AsyncIterator[Item]]


class Flights(Generic[Item]):
    """For one event loop."""

    def __init__(self) -> None:
        self.joined = 0
        """Callers that found their work in flight, since the start."""
        self._flights: dict[str, _Flight[Item]] = {}

    def __len__(self) -> int:
        return len(self._flights)

    async def follow(
        self, key: str, work: Work[Item], on_join: Callable[[], None] = lambda: None
    ) -> AsyncIterator[Item]:
        """The items of the work under `key`, which is begun with `work` where there is none.

        The work runs in a copy of its first caller's context; in there, `on_join` of everybody who
        joins is called. Raises what the work raises. Must be closed (`aclosing`) by who does not
        read it to its end.
        """
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = _Flight()
            running = self._run(key, flight, work)
            flight.task = asyncio.create_task(running, context=flight.context)
        else:
            self.joined += 1
        flight.context.run(on_join)
        flight.followers += 1
        try:
            async for item in flight.items():
                yield item
        finally:
            flight.followers -= 1
            if not flight.followers and not flight.ended:
                self._forget(key, flight)
                flight.task.cancel()

    async def _run(self, key: str, flight: "_Flight[Item]", work: Work[Item]) -> None:
        error: Exception | None = None
        try:
            async with aclosing(work()) as items:  # type: ignore[type-var]
                async for item in items:
                    flight.add(item)
        except asyncio.CancelledError:
            # Either nobody is left to see it, or something within was cancelled. Passed on to a
            # caller it would be taken for that caller's own leaving, and its client would wait.
            error = RuntimeError("the work was cancelled from within")
        except Exception as raised:
            error = raised
        self._forget(key, flight)
        flight.end(error)

    def _forget(self, key: str, flight: "_Flight[Item]") -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]


class _Flight(Generic[Item]):
    """Work under way: what came of it so far, and how many follow it."""

    task: asyncio.Task[None]

    def __init__(self) -> None:
        self.context = contextvars.copy_context()
        self.followers = 0
        self.ended = False
        self._items: list[Item] = []
        self._error: Exception | None = None
        self._changed = asyncio.Event()

    def add(self, item: Item) -> None:
        self._items.append(item)
        self._wake()

    def end(self, error: Exception | None) -> None:
        self.ended, self._error = True, error
        self._wake()

    async def items(self) -> AsyncIterator[Item]:
        seen = 0
        while True:
            while seen < len(self._items):
                seen += 1
                yield self._items[seen - 1]
            if self.ended:
                break
            await self._changed.wait()
        if self._error is not None:
            raise self._error

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
