"""Long work in slices: each is a piece of work of its own, so that other calls get in between."""

from collections.abc import AsyncGenerator, Callable, Generator
from dataclasses import dataclass
from typing import Any, TypeVar

from tdb.inference.v1 import manifest_pb2

from services.inference import queue_messages
from services.inference.engine.cancellation import CancelToken
from services.inference.scheduler import OnDevice
from services.inference.task import Place, Task

Response = TypeVar("Response")


@dataclass(frozen=True)
class Slice:
    """One piece of long work."""

    work: Callable[[CancelToken], Any]
    task: Task


async def run(
    steps: Generator[Slice | Response, Any, None],
    on_device: OnDevice,
    timings: manifest_pb2.Timings,
    waiting: Callable[[Place], Response],
) -> AsyncGenerator[Response, None]:
    """Runs the slices that `steps` yields and sends it their results; yields its responses.

    While a slice waits for the device, `waiting` makes the responses that say where it stands.
    """
    result: Any = None
    while True:
        try:
            step = steps.send(result)
        except StopIteration:
            return
        result = None
        if not isinstance(step, Slice):
            yield step
            continue
        with on_device.enter(step.work, step.task) as ticket:
            async for place in ticket.places():
                yield waiting(place)
            finished = await ticket.result()
        queue_messages.add_wait(timings, finished)
        result = finished.result
