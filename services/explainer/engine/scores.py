"""What a score is: a number with its interval, its n, and what went wrong on the way."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from services.explainer.engine import resampling, statistics
from services.explainer.engine.replies import FailureKind


class Scorer(StrEnum):
    """What was asked about an explanation."""

    DETECTION = "detection"
    FUZZING = "fuzzing"
    SIMULATION = "simulation"
    INTERVENTION = "intervention"
    HEAD_PAIRS = "head_pairs"


class Measure(StrEnum):
    """How the answers became one number; `chance` says what guessing gives."""

    BALANCED_ACCURACY = "balanced_accuracy"
    AUC = "auc"
    PEARSON = "pearson"
    EXPLAINED_VARIANCE = "explained_variance"
    ACCURACY = "accuracy"

    @property
    def chance(self) -> float:
        return 0.0 if self in (Measure.PEARSON, Measure.EXPLAINED_VARIANCE) else 0.5


@dataclass(frozen=True, kw_only=True)
class Score:
    """One measure of one explanation.

    `n` items were answered and are in `value`; `failures` counts those that were not, by kind, and
    they are in nothing. `low` and `high` bound the bootstrap 95 % interval over documents. `value`
    and the interval are None where they are not defined (too few answers, or all alike). `judge` is
    who answered: a model's name, or `offline`.
    """

    scorer: Scorer
    measure: Measure
    value: float | None
    low: float | None
    high: float | None
    n: int
    failures: Mapping[FailureKind, int]
    seed: int
    judge: str

    @property
    def failed(self) -> int:
        return sum(self.failures.values())


@dataclass(frozen=True)
class Answer:
    """What the judge said of one item, and what is true: probability 0..1 of `label` 0 or 1."""

    label: int
    said: float | FailureKind
    document: str


_MEASURES: dict[Measure, Callable[[statistics.Values, statistics.Values], float | None]] = {
    Measure.BALANCED_ACCURACY: statistics.balanced_accuracy,
    Measure.AUC: statistics.auc,
}


def classification(
    scorer: Scorer,
    measures: Sequence[Measure],
    answers: Sequence[Answer],
    *,
    seed: int,
    judge: str,
) -> tuple[Score, ...]:
    """One score per measure of answers to yes-or-no questions."""
    answered = [(each, each.said) for each in answers if not isinstance(each.said, FailureKind)]
    failures = Counter(each.said for each in answers if isinstance(each.said, FailureKind))
    labels = np.array([each.label for each, _ in answered], dtype=np.float64)
    said = np.array([probability for _, probability in answered], dtype=np.float64)
    documents = [each.document for each, _ in answered]
    return tuple(
        measured(
            scorer, measure, _MEASURES[measure], labels, said, documents, failures, seed, judge
        )
        for measure in measures
    )


def measured(
    scorer: Scorer,
    measure: Measure,
    function: Callable[[statistics.Values, statistics.Values], float | None],
    first: statistics.Values,
    second: statistics.Values,
    documents: Sequence[str],
    failures: Mapping[FailureKind, int],
    seed: int,
    judge: str,
    n: int | None = None,
) -> Score:
    """The score function(first, second) with its interval; `n` items, or one per value."""
    value = function(first, second) if first.size else None
    interval = None
    if value is not None:
        interval = resampling.bootstrap(function, first, second, documents, seed=seed)
    low, high = interval or (None, None)
    return Score(
        scorer=scorer,
        measure=measure,
        value=value,
        low=low,
        high=high,
        n=first.size if n is None else n,
        failures=dict(failures),
        seed=seed,
        judge=judge,
    )
