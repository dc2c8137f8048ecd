"""Objectives: the scalar J that is explained (SEMANTICS section 3)."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LogitDiff:
    """Mean target logit minus mean distractor logit at `position`, in logits."""

    targets: tuple[int, ...]
    distractors: tuple[int, ...]
    position: int

    def value(self, logits: Tensor) -> Tensor:
        """[V] -> scalar."""
        value = logits[list(self.targets)].mean()
        if self.distractors:
            value = value - logits[list(self.distractors)].mean()
        return value


Objective = LogitDiff
