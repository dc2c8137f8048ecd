"""`StreamOutputTokens`: what many components promote and suppress, a block at a time.

Every block is a slice of bulk work: one product with the unembedding.
"""

import time
from collections.abc import AsyncIterator, Generator
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any

from tdb.inference.v1 import manifest_pb2, output_tokens_pb2

from services.common.addresses import Kind
from services.common.errors import InvalidArgument, inside
from services.inference import manifest, queue_messages, slices, tensors
from services.inference.engine.cancellation import CancelToken
from services.inference.engine.components import Extremes
from services.inference.engine.harvesting import groups
from services.inference.engine.harvesting.groups import Group
from services.inference.engine.model import Model
from services.inference.scheduler import OnDevice
from services.inference.slices import Slice
from services.inference.task import Place, Priority, Task

MAX_TOKENS = 100
DEFAULT_TOKENS = 10
AT_ONCE = 128
"""Components of a block."""

Response = output_tokens_pb2.StreamOutputTokensResponse


@dataclass(frozen=True)
class Wanted:
    """Components `first` to `stop` of a group, `tokens` on either side of each."""

    group: Group
    first: int
    stop: int
    tokens: int


def read(request: output_tokens_pb2.StreamOutputTokensRequest, model: Model) -> Wanted:
    """Makes the request canonical. Raises InvalidArgument."""
    with inside("group"):
        group = groups.parse(request.group, model.shape)
        if group.kind is Kind.HEAD:
            raise InvalidArgument(
                f"{group}: heads write no direction of their own; DescribeComponent lists those of "
                "a head's circuit"
            )
    if not 0 <= request.first < group.components:
        raise InvalidArgument(
            f"{group} has the components 0..{group.components - 1}", field="first"
        )
    left = group.components - request.first
    if not request.HasField("count"):
        request.count = left
    if not 1 <= request.count <= left:
        raise InvalidArgument(
            f"{group} has {left} components from {request.first} on; at least 1 is needed",
            field="count",
        )
    if not request.HasField("tokens"):
        request.tokens = DEFAULT_TOKENS
    if not 1 <= request.tokens <= MAX_TOKENS:
        raise InvalidArgument(
            f"tokens is {request.tokens}; valid is 1..{MAX_TOKENS}", field="tokens"
        )
    return Wanted(group, request.first, request.first + request.count, request.tokens)


async def stream(
    request: output_tokens_pb2.StreamOutputTokensRequest,
    wanted: Wanted,
    model: Model,
    on_device: OnDevice,
) -> AsyncIterator[Response]:
    """`request` is canonical."""
    timings = manifest_pb2.Timings()
    done = 0

    def progress(place: Place | None = None) -> Response:
        total = wanted.stop - wanted.first
        return Response(progress=queue_messages.progress(done, total, "components", place))

    events = slices.run(_steps(wanted, model, timings), on_device, timings, progress)
    yield progress()
    async with aclosing(events):
        async for event in events:
            yield event
            if event.HasField("tokens"):
                done += event.tokens.promoted.shape[0]
    names = (wanted.group.dictionary,) if wanted.group.dictionary else ()
    yield Response(
        summary=output_tokens_pb2.StreamOutputTokensSummary(
            manifest=manifest.build(
                "StreamOutputTokens", model, request, [], timings, dictionaries=names
            ),
            components=wanted.stop - wanted.first,
        )
    )


def _steps(
    wanted: Wanted, model: Model, timings: manifest_pb2.Timings
) -> Generator[Slice | Response, Any, None]:
    for first in range(wanted.first, wanted.stop, AT_ONCE):
        stop = min(first + AT_ONCE, wanted.stop)
        task = Task("StreamOutputTokens", stop - first, Priority.BULK)
        found, milliseconds = yield Slice(partial(_block, model, wanted, first, stop), task)
        timings.read_out_ms += milliseconds
        yield Response(tokens=_message(first, found))


def _block(
    model: Model, wanted: Wanted, first: int, stop: int, cancel: CancelToken
) -> tuple[Extremes, float]:
    cancel.check()
    started = time.perf_counter()
    found = model.output_tokens(wanted.group, first, stop, wanted.tokens)
    return found, (time.perf_counter() - started) * 1e3


def _message(first: int, found: Extremes) -> output_tokens_pb2.OutputTokens:
    return output_tokens_pb2.OutputTokens(
        first=first,
        promoted=tensors.write(found.largest),
        promoted_scores=tensors.write(found.largest_scores),
        suppressed=tensors.write(found.smallest),
        suppressed_scores=tensors.write(found.smallest_scores),
    )
