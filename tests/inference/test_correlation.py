"""Correlations against their definitions."""

import pytest

from services.inference.engine.correlation import pearson, spearman


def test_ranks_correlate_whatever_the_scale() -> None:
    assert spearman([1, 2, 3, 4], [1, 10, 100, 1e6]) == pytest.approx(1)
    assert pearson([1, 2, 3, 4], [1, 10, 100, 1e6]) == pytest.approx(0.7748, abs=1e-3)
    assert spearman([1, 2, 3, 4], [9, 4, 1, 0]) == pytest.approx(-1)


def test_ties_share_their_mean_rank() -> None:
    # Ranks 0, 1.5, 1.5, 3 and 0, 1, 2, 3: covariance 4.5, variances 4.5 and 5.
    assert spearman([1, 2, 2, 3], [5, 6, 7, 8]) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)


@pytest.mark.parametrize("columns", [([1, 2], [3, 4]), ([1, 1, 1], [1, 2, 3]), ([], [])])
def test_too_few_points_or_a_constant_column_have_none(
    columns: tuple[list[float], list[float]],
) -> None:
    assert pearson(*columns) is None
    assert spearman(*columns) is None
