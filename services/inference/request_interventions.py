"""Reading interventions out of request messages."""

from tdb.inference.v1 import intervention_pb2

from services.common import addresses
from services.common.errors import InvalidArgument, inside
from services.inference import features, request_objectives, request_tokens, tensors
from services.inference.engine.interventions import (
    Add,
    Intervention,
    Operation,
    Scale,
    SetTo,
    Zero,
    check_target,
)
from services.inference.engine.model import Model


def intervention(
    message: intervention_pb2.Intervention, model: Model, tokens: int, prompt: int | None = None
) -> Intervention:
    """One intervention on a sequence of `tokens` tokens; made canonical in place.

    During generation `prompt` says how many of them are the prompt's, else None.
    """
    with inside("target"):
        target = addresses.parse(message.target)
        check_target(target, model.architecture.shape, tokens)
    message.target = str(target)
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
        case None:
            raise InvalidArgument(
                "an operation is required, for example zero: {}", field="op", reason="REQUIRED"
            )
        case operation:
            raise features.not_built(f"intervention.{operation}", operation)


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
    if message.relative:
        raise features.not_built("intervention.add.relative", "relative")
    match message.WhichOneof("addend"):
        case "value":
            if message.HasField("strength"):
                raise InvalidArgument(
                    "strength multiplies a direction; with value it means nothing",
                    field="strength",
                )
            return Add(message.value)
        case "direction":
            with inside("direction"):
                vector = request_objectives.direction(message.direction, model)
            return Add(vector * (message.strength if message.HasField("strength") else 1.0))
        case _:
            raise InvalidArgument(
                "one of value or direction is required, for example add: {value: 0.5}",
                field="addend",
            )
