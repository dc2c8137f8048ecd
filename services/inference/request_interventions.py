"""Reading interventions out of request messages."""

import torch
from tdb.inference.v1 import intervention_pb2, objective_pb2
from torch import Tensor

from services.common import addresses
from services.common.errors import InvalidArgument, inside
from services.inference import features, request_objectives, request_tokens, tensors
from services.inference.engine.interventions import (
    Add,
    Intervention,
    Mask,
    Operation,
    ProjectOut,
    Scale,
    SetTo,
    Zero,
)
from services.inference.engine.model import Model
from services.inference.engine.resolution import check_target
from services.inference.engine.targets import check_operation


def intervention(
    message: intervention_pb2.Intervention, model: Model, tokens: int, prompt: int | None = None
) -> Intervention:
    """One intervention on a sequence of `tokens` tokens; made canonical in place.

    During generation `prompt` says how many of them are the prompt's, else None.
    """
    with inside("target"):
        target = addresses.parse(message.target)
        check_target(target, model.shape, tokens)
    message.target = str(target)
    if (name := message.WhichOneof("op")) is None:
        raise InvalidArgument(
            "an operation is required, for example zero: {}", field="op", reason="REQUIRED"
        )
    check_operation(target, name)
    positions = None
    if message.HasField("positions"):
        with inside("positions"):
            positions = request_tokens.positions(message.positions, tokens, prompt)
    return Intervention(target, _operation(message, model), positions)


def _operation(message: intervention_pb2.Intervention, model: Model) -> Operation:
    match message.WhichOneof("op"):
        case "zero":
            return Zero()
        case "set":
            with inside("set"):
                return _set(message.set)
        case "scale":
            return Scale(message.scale.factor)
        case "add":
            with inside("add"):
                return _add(message.add, model)
        case "project_out":
            with inside("project_out"):
                return _project_out(message.project_out, model)
        case "mask":
            return Mask()
        case operation:
            raise features.not_built(f"intervention.{operation}", operation or "op")


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
