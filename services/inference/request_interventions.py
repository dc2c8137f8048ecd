"""Reading interventions out of request messages."""

from collections.abc import Sequence

import torch
from tdb.inference.v1 import intervention_pb2, objective_pb2
from torch import Tensor

from services.common import addresses
from services.common.errors import InvalidArgument, inside
from services.inference import request_objectives, request_tokens, tensors
from services.inference.engine.interventions import (
    Add,
    Intervention,
    Mask,
    Mean,
    Operation,
    Patch,
    ProjectOut,
    Scale,
    SetTo,
    Source,
    Zero,
)
from services.inference.engine.model import Model
from services.inference.engine.resolution import check_target
from services.inference.engine.targets import check_operation

MAX_INTERVENTIONS = 1_000
MAX_REFERENCE_PROMPTS = 64
MAX_REFERENCE_TOKENS = 16_384
MAX_PATCH_DEPTH = 4


def interventions(
    messages: Sequence[intervention_pb2.Intervention],
    model: Model,
    tokens: int,
    prompt: int | None = None,
) -> list[Intervention]:
    """Interventions on a sequence of `tokens` tokens; made canonical in place.

    During generation `prompt` says how many of them are the prompt's, else None. Fields of refusals
    begin with `interventions`.
    """
    return _Reader(model).interventions(messages, tokens, prompt, 0)


def mean(message: intervention_pb2.Intervention.Mean, model: Model) -> Mean:
    """The operation alone; made canonical in place."""
    return _Reader(model).mean(message)


def patch(message: intervention_pb2.Intervention.Patch, model: Model) -> Patch:
    """The operation alone; made canonical in place."""
    return _Reader(model).patch(message, 0)


class _Reader:
    """Reads the interventions of one run and of the runs that its own take values from."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._sources: dict[bytes, Source] = {}
        self._reference_tokens = 0

    def interventions(
        self,
        messages: Sequence[intervention_pb2.Intervention],
        tokens: int,
        prompt: int | None,
        depth: int,
    ) -> list[Intervention]:
        """`depth` counts the patches around them."""
        if len(messages) > MAX_INTERVENTIONS:
            raise InvalidArgument(
                f"{len(messages)} interventions are given; at most {MAX_INTERVENTIONS} are "
                "applied in one run",
                field="interventions",
            )
        read = []
        for number, message in enumerate(messages):
            with inside(f"interventions[{number}]"):
                read.append(self._intervention(message, tokens, prompt, depth))
        return read

    def _intervention(
        self,
        message: intervention_pb2.Intervention,
        tokens: int,
        prompt: int | None,
        depth: int,
    ) -> Intervention:
        with inside("target"):
            target = addresses.parse(message.target)
            check_target(target, self._model.shape, tokens)
        message.target = str(target)
        name = message.WhichOneof("op")
        if name is None:
            raise InvalidArgument(
                "an operation is required, for example zero: {}", field="op", reason="REQUIRED"
            )
        check_operation(target, name)
        positions = None
        if message.HasField("positions"):
            with inside("positions"):
                positions = request_tokens.positions(message.positions, tokens, prompt)
        with inside(name):
            return Intervention(target, self._operation(message, name, depth), positions)

    def _operation(
        self, message: intervention_pb2.Intervention, name: str, depth: int
    ) -> Operation:
        match name:
            case "zero":
                return Zero()
            case "set":
                return _set(message.set)
            case "scale":
                return Scale(message.scale.factor)
            case "add":
                return _add(message.add, self._model)
            case "mean":
                return self.mean(message.mean)
            case "patch":
                return self.patch(message.patch, depth)
            case "project_out":
                return _project_out(message.project_out, self._model)
            case _:
                return Mask()

    def mean(self, message: intervention_pb2.Intervention.Mean) -> Mean:
        if not 1 <= len(message.prompts) <= MAX_REFERENCE_PROMPTS:
            raise InvalidArgument(
                f"{len(message.prompts)} reference prompts are given; valid is "
                f"1..{MAX_REFERENCE_PROMPTS}",
                field="prompts",
            )
        prompts = []
        for number, prompt in enumerate(message.prompts):
            with inside(f"prompts[{number}]"):
                ids = request_tokens.canonical_ids(prompt, self._model)
                prompts.append(self._source(prompt.SerializeToString(), Source(ids)))
        return Mean(tuple(prompts), message.per_position)

    def patch(self, message: intervention_pb2.Intervention.Patch, depth: int) -> Patch:
        with inside("source"):
            if not message.HasField("source"):
                raise InvalidArgument("the run to patch from is required", reason="REQUIRED")
            if depth == MAX_PATCH_DEPTH:
                raise InvalidArgument(
                    f"patches are nested more than {MAX_PATCH_DEPTH} deep; patch from a run that "
                    "needs fewer runs itself"
                )
            source = self._run(message.source, depth + 1)
        alignment = tuple((pair.to, pair.source) for pair in message.alignment)
        return Patch(source, alignment or None)

    def _run(self, run: intervention_pb2.Run, depth: int) -> Source:
        if not run.HasField("prompt"):
            raise InvalidArgument("a prompt is required", field="prompt", reason="REQUIRED")
        with inside("prompt"):
            ids = request_tokens.canonical_ids(run.prompt, self._model)
        edits = self.interventions(run.interventions, len(ids), None, depth)
        key = run.prompt.SerializeToString() if not edits else b"run" + run.SerializeToString()
        return self._source(key, Source(ids, tuple(edits)))

    def _source(self, key: bytes, source: Source) -> Source:
        """The same object for the same run, so that it is run once. `key` is its canonical text."""
        if key not in self._sources:
            self._reference_tokens += len(source.token_ids)
            if self._reference_tokens > MAX_REFERENCE_TOKENS:
                raise InvalidArgument(
                    f"the runs that values are taken from have more than {MAX_REFERENCE_TOKENS} "
                    "tokens together, the most that are read for one run"
                )
            self._sources[key] = source
        return self._sources[key]


def _set(message: intervention_pb2.Intervention.Set) -> SetTo:
    match message.WhichOneof("to"):
        case "value":
            return SetTo(message.value)
        case "vector":
            with inside("vector"):
                return SetTo(tensors.read_vector(message.vector))
        case _:
            raise InvalidArgument("a value is required, for example set: {value: 0.5}", field="to")


def _add(message: intervention_pb2.Intervention.Add, model: Model) -> Add:
    match message.WhichOneof("addend"):
        case "value":
            if message.HasField("strength"):
                raise InvalidArgument(
                    "strength multiplies a direction; with value it means nothing",
                    field="strength",
                )
            if message.relative:
                raise InvalidArgument(
                    "relative scales a direction; with value it means nothing", field="relative"
                )
            return Add(message.value)
        case "direction":
            strength = message.strength if message.HasField("strength") else 1.0
            if message.relative:
                return Add(strength * _unit(message.direction, model), relative=True)
            with inside("direction"):
                return Add(strength * request_objectives.direction(message.direction, model))
        case _:
            raise InvalidArgument(
                "one of value or direction is required, for example add: {value: 0.5}",
                field="addend",
            )


def _project_out(message: intervention_pb2.Intervention.ProjectOut, model: Model) -> ProjectOut:
    if not message.HasField("direction"):
        raise InvalidArgument("a direction is required", field="direction", reason="REQUIRED")
    return ProjectOut(_unit(message.direction, model))


def _unit(message: objective_pb2.Direction, model: Model) -> Tensor:
    """A direction whose own length does not count, as a vector [w] of length 1."""
    with inside("direction"):
        if message.unit:
            raise InvalidArgument(
                "only where the direction points counts here, so unit means nothing; leave it out",
                field="unit",
            )
        vector = request_objectives.direction(message, model)
    length: Tensor = torch.linalg.vector_norm(vector)
    return vector / length
