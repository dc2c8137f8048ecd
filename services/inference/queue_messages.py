"""How work was queued, as messages."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tdb.inference.v1 import manifest_pb2, progress_pb2, queue_pb2

from services.inference.scheduler import QueueEntry
from services.inference.task import Finished, Place, Priority

if TYPE_CHECKING:  # the stubs name it, the generated module does not
    from tdb.inference.v1.queue_pb2 import _Priority

    _PRIORITIES: dict[Priority, _Priority.ValueType]

_PRIORITIES = {
    Priority.INTERACTIVE: queue_pb2.PRIORITY_INTERACTIVE,
    Priority.BULK: queue_pb2.PRIORITY_BULK,
}


def queue(place: Place) -> queue_pb2.Queue:
    return queue_pb2.Queue(
        priority=_PRIORITIES[place.priority],
        position=place.position,
        expected_wait_ms=place.expected_wait_s * 1e3,
    )


def progress(
    done: int, total: int | None, unit: str, place: Place | None = None
) -> progress_pb2.Progress:
    """`place` is where the next piece of work stands, while it waits."""
    return progress_pb2.Progress(
        done=done, total=total, unit=unit, queue=queue(place) if place else None
    )


def add_wait(timings: manifest_pb2.Timings, finished: Finished[Any]) -> None:
    """Enters how a piece of work was queued; `queue` and `shared_by` tell of the first."""
    if not timings.HasField("queue"):
        timings.queue.CopyFrom(queue(finished.place))
        timings.shared_by = finished.shared_by
    timings.queue_ms += finished.queue_ms


def timings(
    finished: Finished[Any],
    *,
    forward_ms: float = 0.0,
    backward_ms: float = 0.0,
    read_out_ms: float = 0.0,
) -> manifest_pb2.Timings:
    """Of one piece of work."""
    found = manifest_pb2.Timings(
        forward_ms=forward_ms, backward_ms=backward_ms, read_out_ms=read_out_ms
    )
    add_wait(found, finished)
    return found


def entries(queued: Sequence[QueueEntry]) -> list[queue_pb2.QueueEntry]:
    return [
        queue_pb2.QueueEntry(
            user=each.user if each.call else "",
            method=each.call.method.removeprefix("/") if each.call else "",
            kind=each.kind,
            request_id=each.call.request_id if each.call else "",
            running=each.running,
            queue=queue(each.place),
            waited_ms=each.waited_s * 1e3,
        )
        for each in queued
    ]
