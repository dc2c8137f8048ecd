"""`DescribeComponent`: from its request to directions, and from these to the response."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from tdb.inference.v1 import component_pb2, manifest_pb2

from services.common import addresses
from services.common.addresses import Address, Kind
from services.common.errors import InvalidArgument, inside
from services.inference import manifest, queue_messages, responses
from services.inference.engine.cancellation import CancelToken
from services.inference.engine.components import Description
from services.inference.engine.model import Model
from services.inference.scheduler import OnDevice
from services.inference.task import Task

MAX_TOKENS = 100
MAX_SIMILAR = 100
DEFAULT_LISTED = 10
DEFAULT_CIRCUITS = 3


@dataclass(frozen=True)
class Wanted:
    """What a DescribeComponentRequest asks for; `circuits` is 0 but for heads."""

    component: Address
    tokens: int
    similar: int
    circuits: int


def read(request: component_pb2.DescribeComponentRequest, model: Model) -> Wanted:
    """Makes the request canonical. Raises InvalidArgument."""
    with inside("component"):
        component = _component(request.component, model)
    request.component = str(component)
    _read_count(request, "tokens", DEFAULT_LISTED, 1, MAX_TOKENS)
    _read_count(request, "similar", DEFAULT_LISTED, 0, MAX_SIMILAR)
    if component.kind is Kind.HEAD:
        width = model.architecture.head_width
        _read_count(request, "circuits", min(DEFAULT_CIRCUITS, width), 1, width)
    elif request.HasField("circuits"):
        raise InvalidArgument(
            f"only heads have circuits; for {component} leave circuits out", field="circuits"
        )
    return Wanted(component, request.tokens, request.similar, request.circuits)


def _component(text: str, model: Model) -> Address:
    component = addresses.parse(text)
    model.shape.check(component)
    if component.is_node:
        raise InvalidArgument(
            f"{component} is a node of one run; a component is described without a prompt: name "
            f"{component.component}"
        )
    if component.kind in (Kind.QUERY, Kind.KEY, Kind.VALUE):
        head = Address(Kind.HEAD, component.layer, component.index)
        raise InvalidArgument(f"{component} is a part of a head; name {head}")
    if component.kind not in (Kind.NEURON, Kind.HEAD, Kind.LATENT):
        raise InvalidArgument(
            f"{component} has no direction of its own; name a neuron, head or latent, for example "
            "neuron.0.3 or head.0.1"
        )
    return component


def _read_count(
    request: component_pb2.DescribeComponentRequest,
    field: Literal["tokens", "similar", "circuits"],
    default: int,
    least: int,
    most: int,
) -> None:
    value = getattr(request, field) if request.HasField(field) else default
    if not least <= value <= most:
        raise InvalidArgument(f"{field} is {value}; valid is {least}..{most}", field=field)
    setattr(request, field, value)


def dictionaries_used(wanted: Wanted, model: Model) -> tuple[str, ...]:
    """A latent's own dictionary; all that are served where it is compared with their latents."""
    if wanted.component.kind is not Kind.LATENT:
        return ()
    return tuple(sorted(model.shelf.served)) if wanted.similar else (wanted.component.dictionary,)


async def answer(
    request: component_pb2.DescribeComponentRequest,
    wanted: Wanted,
    model: Model,
    on_device: OnDevice,
) -> component_pb2.DescribeComponentResponse:
    """`request` is canonical."""

    def work(cancel: CancelToken) -> tuple[Description, float]:
        started = time.perf_counter()
        found = model.describe(
            wanted.component, wanted.tokens, wanted.circuits, wanted.similar, cancel
        )
        return found, (time.perf_counter() - started) * 1e3

    finished = await on_device(work, Task("DescribeComponent"))
    description, milliseconds = finished.result
    timings = queue_messages.timings(finished, read_out_ms=milliseconds)
    used = dictionaries_used(wanted, model)
    if wanted.component.kind is Kind.LATENT and wanted.similar:
        similar = await _similar_latents(wanted, used, model, on_device, timings)
        description = replace(description, similar=similar)
    return await asyncio.to_thread(_response, request, description, model, timings, used)


async def _similar_latents(
    wanted: Wanted,
    dictionaries: Sequence[str],
    model: Model,
    on_device: OnDevice,
    timings: manifest_pb2.Timings,
) -> tuple[tuple[Address, float], ...]:
    """Of all dictionaries served, each compared in a piece of work of its own."""
    latent = wanted.component
    task = Task("DescribeComponent.similar")
    written = await on_device(lambda cancel: model.latent_write(latent), task)
    queue_messages.add_wait(timings, written)
    found: list[tuple[Address, float]] = []
    for name in dictionaries:
        work = partial(model.similar_latents, latent, written.result, name, wanted.similar)
        finished = await on_device(work, task)
        queue_messages.add_wait(timings, finished)
        found += finished.result
    # Stable: equals stay in order of dictionary and latent.
    return tuple(sorted(found, key=lambda each: -each[1])[: wanted.similar])


def _response(
    request: component_pb2.DescribeComponentRequest,
    description: Description,
    model: Model,
    timings: manifest_pb2.Timings,
    dictionaries: Sequence[str],
) -> component_pb2.DescribeComponentResponse:
    response = component_pb2.DescribeComponentResponse(
        manifest=manifest.build(
            "DescribeComponent", model, request, [], timings, dictionaries=dictionaries
        ),
        component=request.component,
    )
    vocabulary = model.vocabulary
    for each in description.directions:
        response.directions.add(
            name=each.name,
            norm=each.norm,
            output_tokens=responses.scores(each.output, vocabulary),
            input_tokens=responses.scores(each.input, vocabulary),
            key_input_tokens=responses.scores(each.key_input, vocabulary),
        )
    for component, cosine in description.similar:
        response.similar.add(component=str(component), cosine=cosine)
    return response
