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


@dataclass(frozen=True)
class LogitMinusMean:
    """Mean target logit minus the mean over the vocabulary, padded rows included, in logits."""

    targets: tuple[int, ...]
    position: int

    def value(self, logits: Tensor) -> Tensor:
        """[V] -> scalar."""
        return logits[list(self.targets)].mean() - logits.mean()


@dataclass(frozen=True)
class LogProb:
    """Log of the summed probability of the targets, in nats."""

    targets: tuple[int, ...]
    position: int

    def value(self, logits: Tensor) -> Tensor:
        """[V] -> scalar."""
        return logits.log_softmax(-1)[list(self.targets)].logsumexp(-1)


@dataclass(frozen=True)
class Prob:
    """Summed probability of the targets, in [0, 1]."""

    targets: tuple[int, ...]
    position: int

    def value(self, logits: Tensor) -> Tensor:
        """[V] -> scalar."""
        return logits.softmax(-1)[list(self.targets)].sum()


Objective = LogitDiff | LogitMinusMean | LogProb | Prob
