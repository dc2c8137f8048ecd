"""How well an estimate ranks and scales what was measured."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

FEWEST = 3
"""Two points correlate perfectly whatever they are."""


def pearson(left: Sequence[float], right: Sequence[float]) -> float | None:
    """Pearson's correlation in [-1, 1]; None for fewer than 3 points or a constant column."""
    return _pearson(np.asarray(left, np.float64), np.asarray(right, np.float64))


def spearman(left: Sequence[float], right: Sequence[float]) -> float | None:
    """Pearson's correlation of the ranks, ties averaged; None where that is."""
    return _pearson(_ranks(left), _ranks(right))


def _ranks(values: Sequence[float]) -> NDArray[np.float64]:
    """From 0; equal values share the mean of the ranks they take up."""
    _, places, counts = np.unique(
        np.asarray(values, np.float64), return_inverse=True, return_counts=True
    )
    last = np.cumsum(counts) - 1
    means: NDArray[np.float64] = (last - (counts - 1) / 2)[places]
    return means


def _pearson(left: NDArray[np.float64], right: NDArray[np.float64]) -> float | None:
    if len(left) < FEWEST or np.ptp(left) == 0 or np.ptp(right) == 0:
        return None
    left, right = left - left.mean(), right - right.mean()
    left, right = left / np.linalg.norm(left), right / np.linalg.norm(right)
    return float(np.clip(left @ right, -1.0, 1.0))
