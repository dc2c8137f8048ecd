"""The measures that scores are made of; `resampling.py` says how sure one can be of them.

A measure takes arrays and is None where it is not defined: a balanced accuracy without negatives, a
correlation with a constant.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]


def balanced_accuracy(labels: Values, probabilities: Values) -> float | None:
    """The mean of true positive and true negative rate; a half where chance decides.

    `labels` are 0 or 1. A probability above 0.5 says 1, below 0; exactly 0.5 is half right.
    """
    positive = labels == 1
    if positive.all() or not positive.any():
        return None
    said = right(probabilities)
    return float((said[positive].mean() + (1 - said[~positive]).mean()) / 2)


def right(probabilities: Values) -> Values:
    """How right each is where the label is 1."""
    return np.where(probabilities > 0.5, 1.0, np.where(probabilities < 0.5, 0.0, 0.5))


def auc(labels: Values, scores: Values) -> float | None:
    """The chance that a positive has a larger score than a negative; a tie is half a chance."""
    positive, negative = scores[labels == 1], scores[labels == 0]
    if not positive.size or not negative.size:
        return None
    return float(above(positive, negative).mean())


def above(positive: Values, negative: Values) -> Values:
    """1 where a positive is above a negative, a half where they tie, 0 where below [P, N]."""
    difference = positive[:, None] - negative[None, :]
    found: Values = (difference > 0) + 0.5 * (difference == 0)
    return found


def pearson(expected: Values, actual: Values) -> float | None:
    """The correlation coefficient; None where either does not vary."""
    if expected.size < 2 or np.ptp(expected) == 0 or np.ptp(actual) == 0:
        return None
    return float(np.corrcoef(expected, actual)[0, 1])


def mean(values: Values, _: Values) -> float | None:
    return float(values.mean()) if values.size else None


@dataclass(frozen=True)
class Calibration:
    """The line from expected to actual activations: actual = slope * expected + intercept."""

    slope: float
    intercept: float

    @classmethod
    def fit(cls, expected: Values, actual: Values) -> "Calibration":
        """Least squares; a slope below 0 becomes 0, since that would turn the explanation round."""
        variance = float(expected.var()) if expected.size else 0.0
        slope = 0.0
        if variance > 0:
            covariance = float(((expected - expected.mean()) * (actual - actual.mean())).mean())
            slope = max(covariance / variance, 0.0)
        if not expected.size:
            return cls(0.0, 0.0)
        return cls(slope, float(actual.mean()) - slope * float(expected.mean()))

    def apply(self, expected: Values) -> Values:
        return self.slope * expected + self.intercept


def explained_variance(expected: Values, actual: Values) -> float | None:
    """1 - mean squared error / variance: 1 is perfect, 0 no better than the mean."""
    variance = float(actual.var()) if actual.size else 0.0
    if variance == 0:
        return None
    return 1 - float(((actual - expected) ** 2).mean()) / variance
