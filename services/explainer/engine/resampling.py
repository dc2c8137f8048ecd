"""How sure one can be of a measure: its bootstrap interval over documents.

Whole documents are drawn, since the values of one are not independent. A draw is how often each
document comes, all draws together a matrix [draws, documents]; every measure is a function of sums
over documents, so that it is worked out for all draws by a few products of matrices.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.explainer.engine import statistics
from services.explainer.engine.statistics import Values

RESAMPLES = 1000
_DEFINED = 0.5

Measure = Callable[[Values, Values], float | None]


def bootstrap(
    measure: Measure,
    first: Values,
    second: Values,
    groups: Sequence[str],
    *,
    seed: int,
    resamples: int = RESAMPLES,
) -> tuple[float, float] | None:
    """The 95 % percentile interval of measure(first, second), drawing whole groups.

    A draw for which the measure is not defined counts for nothing; None where that is half of them
    or more.
    """
    if not first.size:
        return None
    draws = _Draws.of(groups, seed, resamples)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = _OF_DRAWS[measure](draws, first, second)
    found = values[np.isfinite(values)]
    if len(found) <= _DEFINED * resamples:
        return None
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


@dataclass(frozen=True)
class _Draws:
    """`counts` [draws, G]: how often each draw has each group; `member` [n]: each value's group."""

    counts: Values
    member: NDArray[np.intp]

    @classmethod
    def of(cls, groups: Sequence[str], seed: int, draws: int) -> "_Draws":
        names, member = np.unique(np.array(groups, dtype=object).astype(str), return_inverse=True)
        drawn = np.random.default_rng(seed).integers(len(names), size=(draws, len(names)))
        cells = drawn + np.arange(draws)[:, None] * len(names)
        counts = np.bincount(cells.ravel(), minlength=draws * len(names))
        return cls(counts.reshape(draws, len(names)).astype(np.float64), member)

    def by_group(self, values: Values) -> Values:
        """The sum of the values of each group [G]."""
        found = np.bincount(self.member, weights=values, minlength=self.counts.shape[1])
        return found.astype(np.float64)

    def sums(self, values: Values) -> Values:
        """The sum of the values of each draw [draws]."""
        found: Values = self.counts @ self.by_group(values)
        return found

    def vary(self, values: Values) -> NDArray[np.bool_]:
        """Whether the values of a draw are not all the same [draws]."""
        groups = self.counts.shape[1]
        low, high = np.full(groups, np.inf), np.full(groups, -np.inf)
        np.minimum.at(low, self.member, values)
        np.maximum.at(high, self.member, values)
        drawn = self.counts > 0
        lowest = np.where(drawn, low, np.inf).min(axis=1)
        highest = np.where(drawn, high, -np.inf).max(axis=1)
        varying: NDArray[np.bool_] = highest > lowest
        return varying


def _balanced_accuracy(draws: _Draws, labels: Values, probabilities: Values) -> Values:
    right = statistics.right(probabilities)
    positives, negatives = draws.sums(labels), draws.sums(1 - labels)
    found: Values = draws.sums(labels * right) / positives / 2
    return found + draws.sums((1 - labels) * (1 - right)) / negatives / 2


def _auc(draws: _Draws, labels: Values, scores: Values) -> Values:
    positive, negative = np.flatnonzero(labels == 1), np.flatnonzero(labels != 1)
    groups = draws.counts.shape[1]
    # How often a positive of one group is above a negative of another [G, G].
    above = np.zeros((groups, groups))
    at = draws.member[positive][:, None], draws.member[negative][None, :]
    np.add.at(above, at, statistics.above(scores[positive], scores[negative]))
    pairs = draws.sums(labels) * draws.sums(1 - labels)
    found: Values = ((draws.counts @ above) * draws.counts).sum(axis=1) / pairs
    return found


def _pearson(draws: _Draws, expected: Values, actual: Values) -> Values:
    # Without their mean, so that little is lost when sums of squares are subtracted.
    x, y = expected - expected.mean(), actual - actual.mean()
    n, sum_x, sum_y = draws.sums(np.ones_like(x)), draws.sums(x), draws.sums(y)
    covariance = draws.sums(x * y) - sum_x * sum_y / n
    variances = (draws.sums(x * x) - sum_x**2 / n) * (draws.sums(y * y) - sum_y**2 / n)
    varying = draws.vary(expected) & draws.vary(actual)
    return np.where(varying, np.clip(covariance / np.sqrt(variances), -1, 1), np.nan)


def _explained_variance(draws: _Draws, expected: Values, actual: Values) -> Values:
    y = actual - actual.mean()
    n, sum_y = draws.sums(np.ones_like(y)), draws.sums(y)
    error = draws.sums((actual - expected) ** 2)
    variance = draws.sums(y * y) - sum_y**2 / n
    return np.where(draws.vary(actual), 1 - error / variance, np.nan)


def _mean(draws: _Draws, values: Values, _: Values) -> Values:
    found: Values = draws.sums(values) / draws.sums(np.ones_like(values))
    return found


_OF_DRAWS: dict[Measure, Callable[[_Draws, Values, Values], Values]] = {
    statistics.balanced_accuracy: _balanced_accuracy,
    statistics.auc: _auc,
    statistics.pearson: _pearson,
    statistics.explained_variance: _explained_variance,
    statistics.mean: _mean,
}
