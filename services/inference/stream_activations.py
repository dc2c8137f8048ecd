"""`StreamActivations`: from its request to one pass, and from its points to the stream's messages.

The pass is one piece of work on the device and each point another, so that other calls get in
between; pieces of a point are cut as the client takes them. Until the last is taken the pass is
kept, so what all open streams keep is bounded: slow readers must not fill the device.
"""

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from tdb.inference.v1 import run_pb2
from torch import Tensor

from services.common.errors import ResourceExhausted
from services.inference import (
    manifest,
    queue_messages,
    request_points,
    requests,
    responses,
    tensors,
)
from services.inference.engine.cancellation import CancelToken
from services.inference.engine.model import Captured, Model
from services.inference.engine.points import Point
from services.inference.requests import ReadRun
from services.inference.scheduler import OnDevice
from services.inference.task import Place, Task

CHUNK_BYTES = 2**20
MAX_HELD_BYTES = 2 * request_points.MAX_STREAM_BYTES
RETRY_S = 5.0


class Held:
    """The activations that open streams keep until they are read, in bytes."""

    def __init__(self) -> None:
        self._bytes = 0

    @contextmanager
    def keep(self, wanted: "Wanted") -> Iterator[None]:
        """While a stream is open. Raises ResourceExhausted where all together keep too much."""
        if self._bytes + wanted.bytes > MAX_HELD_BYTES:
            raise ResourceExhausted(
                f"open streams of activations keep {self._bytes:,} bytes that are not read yet, "
                f"and this needs {wanted.bytes:,} of {MAX_HELD_BYTES:,} in all; try again once "
                "they are read",
                reason="STREAMS_FULL",
                retry_after_s=RETRY_S,
            )
        self._bytes += wanted.bytes
        try:
            yield
        finally:
            self._bytes -= wanted.bytes


@dataclass(frozen=True)
class Wanted:
    """What a StreamActivationsRequest asks for."""

    run: ReadRun
    points: tuple[Point, ...]
    bytes: int
    """Of all points."""


def read(request: run_pb2.StreamActivationsRequest, model: Model) -> Wanted:
    """Makes the request canonical. Raises InvalidArgument, FailedPrecondition (no tokenizer)."""
    run = requests.required_run(request, model)
    tokens = len(run.token_ids)
    points = request_points.of_stream(request, model, tokens)
    return Wanted(run, points, request_points.size(points, model, tokens))


async def stream(
    request: run_pb2.StreamActivationsRequest, wanted: Wanted, model: Model, on_device: OnDevice
) -> AsyncIterator[run_pb2.StreamActivationsResponse]:
    """Progress, each point's header and pieces, and the summary. `request` is canonical."""
    run, points = wanted.run, wanted.points
    yield _progress(0, len(points))
    begun = on_device.enter(
        lambda cancel: model.capture(run.token_ids, run.edits, points, cancel),
        Task("StreamActivations", len(run.token_ids)),
    )
    with begun:
        async for place in begun.places():
            yield _progress(0, len(points), place)
        finished = await begun.result()
    captured = finished.result
    timings = queue_messages.timings(finished, forward_ms=captured.forward_ms)
    for number, point in enumerate(points):
        task = Task("StreamActivations.point", len(run.token_ids))
        taken = await on_device(partial(_read, captured, point), task)
        values, read_ms = taken.result
        queue_messages.add_wait(timings, taken)
        timings.read_out_ms += read_ms
        header = run_pb2.PointHeader(
            point=str(point),
            axes=point.axes,
            data_type=tensors.DATA_TYPES[values.dtype],
            shape=values.shape,
        )
        yield run_pb2.StreamActivationsResponse(point=header)
        for piece in tensors.pieces(values, CHUNK_BYTES):
            yield run_pb2.StreamActivationsResponse(chunk=piece)
        yield _progress(number + 1, len(points))
    summary = run_pb2.StreamActivationsSummary(
        manifest=manifest.build("StreamActivations", model, request, [run.token_ids], timings),
        receipts=[responses.receipt(each) for each in captured.receipts],
    )
    yield run_pb2.StreamActivationsResponse(summary=summary)


def _read(captured: Captured, point: Point, cancel: CancelToken) -> tuple[Tensor, float]:
    started = time.perf_counter()
    values = captured.read(point)
    return values, (time.perf_counter() - started) * 1e3


def _progress(
    done: int, total: int, place: Place | None = None
) -> run_pb2.StreamActivationsResponse:
    return run_pb2.StreamActivationsResponse(
        progress=queue_messages.progress(done, total, "points", place)
    )
