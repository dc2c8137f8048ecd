"""Sampling: which token follows, from its logits and one random number.

Tokens are ordered likeliest first, ties by id. Temperature comes first, then top-k, then top-p of
what top-k left; then one number from a seeded generator on the CPU picks along the cumulative
probabilities. The same seed gives two runs the same numbers, so that where their probabilities are
alike they choose alike.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """Temperature 0 is greedy, and then there is no seed and nothing to cut."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0


class Sampler:
    """Chooses one token after another."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._generator = torch.Generator().manual_seed(sampling.seed)

    def choose(self, logits: Tensor) -> int:
        """The next token's id, of logits [V] in float64 on the CPU."""
        if self._sampling.temperature == 0.0:
            return int(logits.argmax())  # the first of equals
        ordered, ids = torch.sort(logits, descending=True, stable=True)
        ordered = ordered[: self._sampling.top_k]
        weights = ((ordered - ordered[0]) / self._sampling.temperature).exp()
        reached = weights.cumsum(0) / weights.sum()
        # A token belongs to the nucleus while those before it have not reached top_p.
        kept = int((reached - weights / weights.sum() < self._sampling.top_p).sum())
        reached = reached[: max(kept, 1)]
        number = torch.rand((), generator=self._generator, dtype=torch.float64)
        place = int(torch.searchsorted(reached, number * reached[-1], right=True))
        return int(ids[min(place, len(reached) - 1)])
