"""Measures against values worked out by hand."""

import numpy as np
import pytest

from services.explainer.engine import resampling, statistics
from services.explainer.engine.replies import FailureKind
from services.explainer.engine.scores import Answer, Measure, Scorer, classification
from services.explainer.engine.statistics import Calibration


def array(*values: float) -> statistics.Values:
    return np.array(values, dtype=np.float64)


def test_balanced_accuracy_weighs_both_classes_alike() -> None:
    labels = array(1, 1, 1, 1, 0, 0)
    said = array(0.9, 0.6, 0.6, 0.4, 0.1, 0.7)
    assert statistics.balanced_accuracy(labels, said) == (3 / 4 + 1 / 2) / 2
    assert statistics.balanced_accuracy(labels, array(*[0.9] * 6)) == 0.5, "plain: 4 of 6"
    assert statistics.balanced_accuracy(labels, array(*[0.5] * 6)) == 0.5
    assert statistics.balanced_accuracy(array(1, 1), array(1, 1)) is None


def test_auc_counts_pairs_in_order() -> None:
    labels, said = array(1, 1, 0, 0), array(0.9, 0.3, 0.3, 0.1)
    assert statistics.auc(labels, said) == (1 + 1 + 0.5 + 1) / 4
    assert statistics.auc(labels, -said) == 0.5 / 4
    assert statistics.auc(array(0, 0), array(1, 2)) is None


def test_pearson_is_the_correlation() -> None:
    assert statistics.pearson(array(0, 1, 2), array(0, 2, 1)) == pytest.approx(0.5)
    assert statistics.pearson(array(1, 2, 3), array(20, 40, 60)) == pytest.approx(1.0)
    assert statistics.pearson(array(1, 2, 3), array(5, 5, 5)) is None


def test_calibration_is_a_line_that_never_turns_round() -> None:
    assert Calibration.fit(array(0, 10), array(1, 21)) == Calibration(2.0, 1.0)
    assert Calibration.fit(array(0, 10), array(4, 0)) == Calibration(0.0, 2.0)
    assert Calibration.fit(array(3, 3), array(4, 0)) == Calibration(0.0, 2.0)


def test_explained_variance_punishes_the_wrong_unit() -> None:
    actual = array(0, 2, 4)
    assert statistics.explained_variance(actual, actual) == 1.0
    assert statistics.explained_variance(array(2, 2, 2), actual) == 0.0
    assert statistics.explained_variance(10 * actual, actual) == pytest.approx(-201.5)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        values = generator.normal(size=40)
        groups = [str(place) for place in range(40)]
        interval = resampling.bootstrap(
            statistics.mean, values, values, groups, seed=seed, resamples=200
        )
        assert interval is not None
        covered += interval[0] <= 0.0 <= interval[1]
    assert 0.88 <= covered / 200 <= 0.99


def test_values_of_one_document_are_not_independent() -> None:
    """Ten copies of each value say nothing new; drawing them one by one would claim they do."""
    values = np.repeat(np.arange(10.0), 10)
    whole = [str(int(value)) for value in values]
    alone = [str(place) for place in range(100)]
    wide = resampling.bootstrap(statistics.mean, values, values, whole, seed=1)
    narrow = resampling.bootstrap(statistics.mean, values, values, alone, seed=1)
    assert wide is not None
    assert narrow is not None
    assert wide[1] - wide[0] > 2 * (narrow[1] - narrow[0])


def test_a_seed_gives_the_same_interval() -> None:
    values, groups = np.arange(9.0), list("abcdefghi")
    found = [
        resampling.bootstrap(statistics.mean, values, values, groups, seed=seed)
        for seed in (1, 1, 2)
    ]
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    "measure",
    [
        statistics.balanced_accuracy,
        statistics.auc,
        statistics.pearson,
        statistics.explained_variance,
        statistics.mean,
    ],
)
@pytest.mark.parametrize("silent", [False, True])
def test_the_interval_is_that_of_measuring_each_draw(
    measure: resampling.Measure, silent: bool
) -> None:
    """Against drawing documents one by one and measuring what they hold."""
    generator = np.random.default_rng(5)
    groups = [str(each) for each in generator.integers(12, size=40)]
    first = generator.integers(2, size=40).astype(np.float64)
    # Half of the probabilities tie, and far from 0: what is subtracted must not drown them.
    second = np.round(generator.random(40), 1) + (1e3 if measure is statistics.pearson else 0)
    if silent:  # draws without the one document that is not silent have no correlation
        first = np.where(np.array(groups) == groups[0], first, 0.0)
        second = np.where(np.array(groups) == groups[0], second, 0.0)
    names = sorted(set(groups))
    places = [[at for at, each in enumerate(groups) if each == name] for name in names]
    drawn = np.random.default_rng(3).integers(len(names), size=(1000, len(names)))
    found = []
    for draw in drawn:
        chosen = [at for name in draw for at in places[name]]
        value = measure(first[chosen], second[chosen])
        if value is not None:
            found.append(value)
    assert silent == (len(found) < 1000) or measure is statistics.mean
    low, high = np.percentile(found, [2.5, 97.5])
    interval = resampling.bootstrap(measure, first, second, groups, seed=3)
    assert interval == pytest.approx((low, high), abs=1e-9)
    other = resampling.bootstrap(measure, first, second, list(map(str, range(40))), seed=3)
    assert other != pytest.approx((low, high), abs=1e-9), "documents count, not values"


def test_failures_are_counted_and_in_no_number() -> None:
    answers = [
        Answer(1, 0.9, "a"),
        Answer(0, 0.2, "b"),
        Answer(1, FailureKind.REFUSED, "c"),
        Answer(0, FailureKind.MALFORMED, "d"),
        Answer(0, FailureKind.MALFORMED, "e"),
        Answer(1, 0.8, "f"),
        Answer(0, 0.6, "g"),
    ]
    score, ranked = classification(
        Scorer.DETECTION, (Measure.BALANCED_ACCURACY, Measure.AUC), answers, seed=3, judge="x"
    )
    assert (score.value, ranked.value) == (0.75, 1.0)
    assert (score.n, score.failed) == (4, 3)
    assert score.failures == {FailureKind.REFUSED: 1, FailureKind.MALFORMED: 2}
    assert (score.seed, score.judge, score.measure) == (3, "x", Measure.BALANCED_ACCURACY)
    assert score.low is not None
    assert score.low <= 0.75


def test_nothing_answered_is_no_number() -> None:
    answers = [Answer(1, FailureKind.REFUSED, "a"), Answer(0, FailureKind.REFUSED, "b")]
    (score,) = classification(Scorer.FUZZING, (Measure.AUC,), answers, seed=0, judge="x")
    assert (score.value, score.low, score.high, score.n, score.failed) == (None, None, None, 0, 2)
