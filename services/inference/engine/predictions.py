"""Predictions: what logits say follows a position, as the few numbers that leave the device."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

AT_ONCE = 64
"""Positions read at a time, so that a call can be cancelled between."""


@dataclass(frozen=True)
class Prediction:
    """One possible next token."""

    token_id: int
    logit: float
    probability: float


@dataclass(frozen=True)
class NextTokens:
    """What is predicted to follow one position: the most likely, and those asked for by id."""

    position: int
    top: tuple[Prediction, ...]
    named: tuple[Prediction, ...]


@dataclass(frozen=True)
class Predicting:
    """What is wanted of each position; ids from `listed` on are never among the most likely."""

    top_k: int
    named: tuple[int, ...]
    listed: int

    def read(self, positions: Sequence[int], logits: Tensor) -> list[NextTokens]:
        """Of logits [P, V] at as many positions."""
        likely = torch.topk(logits[:, : self.listed], min(self.top_k, self.listed)).indices
        named = torch.tensor(self.named, dtype=torch.long, device=logits.device)
        ids = torch.cat([likely, named.expand(len(positions), -1)], dim=1)
        values = logits.gather(1, ids).tolist()
        probabilities = logits.float().softmax(-1).gather(1, ids).tolist()
        found = []
        for position, *numbers in zip(positions, ids.tolist(), values, probabilities, strict=True):
            each = [Prediction(*prediction) for prediction in zip(*numbers, strict=True)]
            top = likely.shape[1]
            found.append(NextTokens(position, tuple(each[:top]), tuple(each[top:])))
        return found
