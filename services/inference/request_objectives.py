"""Reading objectives and directions out of request messages."""

from collections.abc import Sequence

import torch
from tdb.inference.v1 import objective_pb2
from tdb.type.v1 import token_pb2

from services.common import addresses
from services.common.addresses import Kind
from services.common.errors import InvalidArgument, inside
from services.inference import request_tokens, request_tracing, tensors
from services.inference.engine.model import Model
from services.inference.engine.objectives import (
    Along,
    LogitDiff,
    LogitMinusMean,
    LogProb,
    Objective,
    Prob,
)

FINAL_NORM = "final_norm"
"""Name of the one point of `Along` that is no address: the output of the final norm."""


def objective(message: objective_pb2.Objective, model: Model, tokens: int) -> Objective:
    """The objective on a prompt of `tokens` tokens; made canonical in place."""
    kind = message.WhichOneof("kind")
    if kind is None:
        raise InvalidArgument(
            "the kind of objective is required, for example logit_diff", field="kind"
        )
    if kind == "traced_node":
        if message.HasField("position"):
            raise InvalidArgument(
                "a traced node names its own token; leave position out", field="position"
            )
        with inside(kind):
            return request_tracing.traced_node(message.traced_node, model, tokens, objective)
    position = message.position if message.HasField("position") else tokens - 1
    if not 0 <= position < tokens:
        raise InvalidArgument(
            f"position {position} does not exist; valid is 0..{tokens - 1}", field="position"
        )
    message.position = position
    with inside(kind):
        match kind:
            case "logit_diff":
                return LogitDiff(*_logit_diff(message.logit_diff, model), position)
            case "logit_minus_mean":
                return LogitMinusMean(_targets(message.logit_minus_mean.targets, model), position)
            case "log_prob":
                return LogProb(_targets(message.log_prob.targets, model), position)
            case "along":
                return Along(*_along(message.along, model), position)
            case _:
                return Prob(_targets(message.prob.targets, model), position)


def _along(
    message: objective_pb2.Along, model: Model
) -> tuple[addresses.Address | None, torch.Tensor]:
    """The point (None: the final norm's output) and the direction."""
    at = None
    if message.point != FINAL_NORM:
        with inside("point"):
            at = addresses.parse(message.point)
            model.architecture.shape.check(at)
            if at.is_node:
                raise InvalidArgument(
                    f"{at}: the objective's position says the token; write {at.component}"
                )
            if at.kind not in (Kind.EMBED, Kind.RESID_MID, Kind.RESID_POST):
                raise InvalidArgument(
                    f"{at} is no point of the residual stream; name embed, resid_mid.L, "
                    f"resid_post.L or {FINAL_NORM}"
                )
        message.point = str(at)
    if not message.HasField("direction"):
        raise InvalidArgument("a direction is required", field="direction", reason="REQUIRED")
    with inside("direction"):
        vector = direction(message.direction, model)
        width = model.architecture.width
        if vector.shape != (width,):
            raise InvalidArgument(
                f"the residual stream has width {width}, the direction has shape "
                f"{list(vector.shape)}"
            )
    return at, vector


def direction(message: objective_pb2.Direction, model: Model) -> torch.Tensor:
    """A direction as a vector [w]; made canonical in place."""
    match message.WhichOneof("of"):
        case "vector":
            with inside("vector"):
                vector = tensors.read_vector(message.vector)
        case "write_of":
            vector = _write_of(message, model)
        case "unembedding":
            with inside("unembedding"):
                targets, distractors = _logit_diff(message.unembedding, model)
            vector = model.unembedding_direction(targets, distractors)
        case _:
            raise InvalidArgument(
                "one of vector, write_of or unembedding is required", field="of", reason="REQUIRED"
            )
    length = float(torch.linalg.vector_norm(vector.double()))
    if length == 0.0:
        raise InvalidArgument("the direction has length 0, so it points nowhere")
    return vector / length if message.unit else vector


def _write_of(message: objective_pb2.Direction, model: Model) -> torch.Tensor:
    with inside("write_of"):
        address = addresses.parse(message.write_of)
        model.shape.check(address)
        if address.kind is not Kind.NEURON or address.is_node:
            raise InvalidArgument(
                f"{address} writes no single direction; name a neuron, for example neuron.3.17"
            )
    message.write_of = str(address)
    return model.neuron_write(address)


def _logit_diff(
    message: objective_pb2.LogitDiff, model: Model
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    targets = _targets(message.targets, model)
    distractors = request_tokens.token_ids(message.distractors, "distractors", model)
    for number, token_id in enumerate(distractors):
        if token_id in targets:
            token = model.vocabulary.token(token_id).text
            raise InvalidArgument(
                f"{token!r} is a target too, so its logit would cancel out",
                field=f"distractors[{number}]",
            )
    return targets, distractors


def _targets(refs: Sequence[token_pb2.TokenRef], model: Model) -> tuple[int, ...]:
    targets = request_tokens.token_ids(refs, "targets", model)
    if not targets:
        raise InvalidArgument("at least one target token is required", field="targets")
    return targets
