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

    The pass must have been run with the point among those to keep, for latents with their
    dictionary, and for `logits` at every position. Raises FailedPrecondition (reason NON_FINITE).
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
    if point.dictionary:
        site = current.sites.found[point.dictionary]
        return site.values(row, site.clean(row, len(current.rows[row].token_ids)))
    if point.layer is None or point in current.kept:
        return current.kept[point][row]
    if point.name == "resid_mid":
        return current.middles[point.layer][row]
    attention = current.attention[point.layer]
    match point.name:
        case "q":
            return attention.query[row].transpose(0, 1)
        case "k":
            return attention.keys_per_head(row).transpose(0, 1)
        case "v":
            return attention.values_per_head(row).transpose(0, 1)
        case "attn_probs":
            return attention.used(row)
        case "z":
            return attention.z[row]
        case _:
            return attention.scores(row, architecture.layers[point.layer].scaling)
