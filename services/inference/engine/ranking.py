"""Ranking: the top k nodes by absolute value, exactly k, ties by address.

Each group gives its own top k on the device; only those candidates leave it and are merged.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from services.inference.engine.columns import Column, NodeGroup
from services.inference.engine.numerics import precise


def top_indices(values: Tensor, k: int, group: NodeGroup) -> Tensor:
    """[size] -> [min(k, size)]: flat indices of the largest absolute values, ties by address."""
    magnitudes = values.abs()
    k = min(k, magnitudes.numel())
    top = torch.topk(magnitudes, k)
    threshold = top.values[-1]
    tied = magnitudes == threshold
    above = top.indices[top.values > threshold]
    if int(tied.sum()) == k - above.numel():
        return top.indices
    candidates = tied.nonzero()[:, 0]
    by_address = candidates[group.order(candidates).argsort()]
    return torch.cat([above, by_address[: k - above.numel()]])


@dataclass(frozen=True)
class Selection:
    """Nodes picked from the groups of one run: parallel arrays of group number and flat index."""

    groups: NDArray[np.int64]
    indices: NDArray[np.int64]


def select(groups: Sequence[NodeGroup], column: Column, k: int) -> Selection:
    """The top k nodes over all `groups`, which must stand in address order."""
    candidates = []
    for number, group in enumerate(groups):
        group.prepare(k)
        values = group.column(column)
        indices = top_indices(values, k, group)
        candidates.append(
            (
                np.full(indices.numel(), number),
                indices.cpu().numpy(),
                precise(values[indices].abs()).cpu().numpy(),
                group.order(indices).cpu().numpy(),
            )
        )
    numbers, flat, magnitudes, order = (
        np.concatenate(parts) for parts in zip(*candidates, strict=True)
    )
    best = np.lexsort((order, numbers, -magnitudes))[:k]
    return Selection(numbers[best], flat[best])
