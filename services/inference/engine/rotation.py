"""The model's own rotary embedding, on vectors of single tokens."""

import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn

Rotation = tuple[Tensor, Tensor]
"""Cosine and sine, [1, T, dh]."""


def rotated(
    attention: nn.Module,
    rotation: Rotation | None,
    positions: Sequence[int],
    query: Tensor,
    key: Tensor,
) -> tuple[Tensor, Tensor]:
    """Queries [n, H, dh] and keys [n, Hk, dh] of the tokens at `positions`, after rotation."""
    if rotation is None:
        return query, key
    cosine, sine = (part[0, list(positions), None].detach() for part in rotation)
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    query, key = rotate(query[:, :, None], key[:, :, None], cosine, sine)
    return query[:, :, 0], key[:, :, 0]


def unrotated(
    attention: nn.Module, rotation: Rotation | None, positions: Sequence[int], vectors: Tensor
) -> Tensor:
    """[n, dh] -> [n, dh]: the transpose of the rotation at each position."""
    if rotation is None:
        return vectors
    with torch.enable_grad():
        start = torch.zeros_like(vectors)[:, None].requires_grad_()
        found, _ = rotated(attention, rotation, positions, start, start.detach())
        (gradient,) = torch.autograd.grad(found, start, vectors[:, None])
    transposed: Tensor = gradient[:, 0]
    return transposed
