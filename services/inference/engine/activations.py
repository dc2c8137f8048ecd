"""Activations of one point on one run, whole, as the model's own numbers."""

import math

import torch
from torch import Tensor

from services.common.errors import FailedPrecondition
from services.inference.engine.architecture import Architecture
from services.inference.engine.captured import Pass
from services.inference.engine.points import Point, shape


def size(point: Point, architecture: Architecture, tokens: int) -> int:
    """Bytes of the point's activations on a prompt of `tokens` tokens."""
    elements = math.prod(shape(point, architecture, tokens))
    return elements * architecture.w_u.element_size()


def read(point: Point, architecture: Architecture, current: Pass, row: int) -> Tensor:
    """The point's activations on one row, its real tokens only, contiguous on the CPU.

    The pass must have been run with the point among those to keep, and for `logits` at every
    position. Raises FailedPrecondition (reason NON_FINITE).
    """
    values = _values(point, architecture, current, row)
    tokens = len(current.rows[row].token_ids)
    for axis, name in enumerate(point.axes):
        if name in ("token", "query", "key"):
            values = values.narrow(axis, 0, tokens)
    if not torch.isfinite(values).all():
        raise FailedPrecondition(
            f"the model's numbers overflow: {point} is not finite; look for an intervention that "
            "sets a very large value",
            reason="NON_FINITE",
        )
    return values.detach().to(architecture.w_u.dtype).cpu().contiguous()


def _values(point: Point, architecture: Architecture, current: Pass, row: int) -> Tensor:
    if point.name == "final_norm":
        return current.final_output[row]
    if point.name == "logits":
        return current.logits[row]
    if point.layer is None or point in current.kept:
        return current.kept[point][row]
    if point.name == "resid_mid":
        return current.middles[point.layer][row]
    if point.name == "mlp_act":
        return current.neurons[point.layer][row]
    site = current.attention[point.layer]
    match point.name:
        case "q":
            return site.query[row].transpose(0, 1)
        case "k":
            return site.keys_per_head(row).transpose(0, 1)
        case "v":
            return site.values_per_head(row).transpose(0, 1)
        case "attn_probs":
            return site.used(row)
        case "z":
            return site.z[row]
        case _:
            return site.scores(row, architecture.layers[point.layer].scaling)
