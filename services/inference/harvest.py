"""`Harvest`: from its request to batches on the device, and from their states to the stream.

Every batch is a slice of bulk work, and so is every group's state when it is read off.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Generator
from contextlib import aclosing
from functools import partial
from typing import Any

from tdb.inference.v1 import harvest_pb2, manifest_pb2

from services.common.errors import InvalidArgument, inside
from services.common.harvest import wire
from services.common.harvest.state import Keep, State
from services.inference import manifest, queue_messages, slices
from services.inference.engine.cancellation import CancelToken
from services.inference.engine.harvesting import groups
from services.inference.engine.harvesting.harvest import AskedHarvest, CorpusSequence, Harvest
from services.inference.engine.model import Model
from services.inference.scheduler import OnDevice
from services.inference.slices import Slice
from services.inference.task import Place, Priority, Task

MAX_GROUPS = 10_000
MAX_TOKENS = 262_144
MAX_SEQUENCES = 65_536
MAX_SUMMED_TOKENS = 4_096

_DEFAULTS = Keep()
_VALID = {"top_k": (1, 1_000), "random": (0, 1_000), "strata": (0, 64), "per_stratum": (1, 100)}
"""The least and the most that can be kept."""


def read(request: harvest_pb2.HarvestRequest, model: Model) -> AskedHarvest:
    """Makes the request canonical. Raises InvalidArgument."""
    if not request.groups:
        raise InvalidArgument(
            "at least one group of components is required, for example neuron.0",
            field="groups",
            reason="REQUIRED",
        )
    if len(request.groups) > MAX_GROUPS:
        raise InvalidArgument(
            f"{len(request.groups)} groups are named; at most {MAX_GROUPS}", field="groups"
        )
    with inside("groups"):
        wanted = groups.all_of(request.groups, model.shape)
    keep = _keep(request)
    tokens = _tokens(request, model)
    return AskedHarvest(wanted, keep, _sequences(request, model), tokens)


def _keep(request: harvest_pb2.HarvestRequest) -> Keep:
    if not request.HasField("top_k"):
        request.top_k = _DEFAULTS.top
    if not request.HasField("random"):
        request.random = _DEFAULTS.random
    if not request.HasField("strata"):
        request.strata = _DEFAULTS.strata
    if not request.HasField("per_stratum"):
        request.per_stratum = _DEFAULTS.per_stratum
    if not request.HasField("seed"):
        request.seed = _DEFAULTS.seed
    given = {
        "top_k": request.top_k,
        "random": request.random,
        "strata": request.strata,
        "per_stratum": request.per_stratum,
    }
    for field, value in given.items():
        least, most = _VALID[field]
        if not least <= value <= most:
            raise InvalidArgument(f"{value} is given; valid is {least}..{most}", field=field)
    return Keep(request.top_k, request.random, request.strata, request.per_stratum, request.seed)


def _tokens(request: harvest_pb2.HarvestRequest, model: Model) -> tuple[int, ...]:
    """Those whose activations are summed, ascending."""
    if len(request.tokens) > MAX_SUMMED_TOKENS:
        raise InvalidArgument(
            f"{len(request.tokens)} tokens are given; activations are summed at "
            f"{MAX_SUMMED_TOKENS} at most",
            field="tokens",
        )
    found: set[int] = set()
    for number, token in enumerate(request.tokens):
        with inside(f"tokens[{number}]"):
            model.vocabulary.check_id(token)
            if token in found:
                raise InvalidArgument(f"token {token} is listed twice; name it once")
        found.add(token)
    ordered = tuple(sorted(found))
    request.tokens[:] = ordered
    return ordered


def _sequences(request: harvest_pb2.HarvestRequest, model: Model) -> tuple[CorpusSequence, ...]:
    if not request.sequences:
        raise InvalidArgument(
            "at least one sequence is required", field="sequences", reason="REQUIRED"
        )
    if len(request.sequences) > MAX_SEQUENCES:
        raise InvalidArgument(
            f"{len(request.sequences)} sequences are given; one call reads at most {MAX_SEQUENCES}",
            field="sequences",
        )
    total = sum(len(each.ids) for each in request.sequences)
    if total > MAX_TOKENS:
        raise InvalidArgument(
            f"the sequences have {total:,} tokens together; one call reads at most {MAX_TOKENS:,}: "
            "harvest the corpus in segments and merge their states",
            field="sequences",
            reason="TOO_LARGE",
        )
    context = model.architecture.context
    found: dict[int, int] = {}
    sequences = []
    for number, each in enumerate(request.sequences):
        with inside(f"sequences[{number}]"):
            if each.index < 0:
                raise InvalidArgument("sequences are numbered from 0", field="index")
            if each.index in found:
                raise InvalidArgument(
                    f"{each.index} is the index of sequences[{found[each.index]}] already",
                    field="index",
                )
            found[each.index] = number
            if not 1 <= len(each.ids) <= context:
                raise InvalidArgument(
                    f"the sequence has {len(each.ids)} tokens; this model reads 1 to {context}",
                    field="ids",
                )
            ids = tuple(each.ids)
            if not 0 <= min(ids) <= max(ids) < model.architecture.vocabulary:
                for place, token in enumerate(ids):
                    with inside(f"ids[{place}]"):
                        model.vocabulary.check_id(token)
            sequences.append(CorpusSequence(each.index, ids))
    return tuple(sequences)


async def stream(
    request: harvest_pb2.HarvestRequest, asked: AskedHarvest, model: Model, on_device: OnDevice
) -> AsyncIterator[harvest_pb2.HarvestResponse]:
    """Progress, the state of each group, and the summary. `request` is canonical."""
    timings = manifest_pb2.Timings()
    counted = _Counted(sum(len(each.ids) for each in asked.sequences))
    with model.room.holding(asked.state_bytes):
        events = slices.run(
            _steps(asked, model, counted, timings),
            on_device,
            timings,
            lambda place: counted.progress(place),
        )
        async with aclosing(events):
            async for event in events:
                yield event

    def summary() -> harvest_pb2.HarvestSummary:
        return harvest_pb2.HarvestSummary(
            manifest=manifest.build("Harvest", model, request, [], timings),
            sequences=len(asked.sequences),
            tokens=counted.total,
        )

    # Many sequences take their time to be written down; the loop must not wait for it.
    yield harvest_pb2.HarvestResponse(summary=await asyncio.to_thread(summary))


class _Counted:
    """Tokens that are done."""

    def __init__(self, total: int) -> None:
        self.done = 0
        self.total = total

    def progress(self, place: Place | None = None) -> harvest_pb2.HarvestResponse:
        return harvest_pb2.HarvestResponse(
            progress=queue_messages.progress(self.done, self.total, "tokens", place)
        )


def _steps(
    asked: AskedHarvest, model: Model, counted: _Counted, timings: manifest_pb2.Timings
) -> Generator[Slice | harvest_pb2.HarvestResponse, Any, None]:
    harvest = model.harvest(asked)
    yield counted.progress()
    for number in range(len(harvest.batches)):
        tokens = harvest.tokens(number)
        task = Task("Harvest.batch", tokens, Priority.BULK)
        timings.forward_ms += yield Slice(partial(_batch, harvest, number), task)
        counted.done += tokens
        yield counted.progress()
    for group in asked.groups:
        task = Task("Harvest.state", group.components, Priority.BULK)
        state, milliseconds = yield Slice(partial(_finish, harvest, group), task)
        timings.read_out_ms += milliseconds
        yield harvest_pb2.HarvestResponse(state=wire.header(state))
        for piece in wire.pieces(state):
            yield harvest_pb2.HarvestResponse(chunk=piece)


def _batch(harvest: Harvest, number: int, cancel: CancelToken) -> float:
    """Milliseconds."""
    started = time.perf_counter()
    harvest.batch(number, cancel)
    return (time.perf_counter() - started) * 1e3


def _finish(harvest: Harvest, group: groups.Group, cancel: CancelToken) -> tuple[State, float]:
    started = time.perf_counter()
    state = harvest.finish(group, cancel)
    return state, (time.perf_counter() - started) * 1e3
