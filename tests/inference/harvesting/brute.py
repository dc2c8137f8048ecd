"""Harvests by brute force: all activations of all sequences at once, in float64 and plain numpy.

`Seen` is a sequence with its activations, wherever they come from. The hash of draws is written out
again here in Python's integers.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.common.harvest import bins, reading
from services.common.harvest.state import Keep, State

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Seen:
    index: int
    ids: tuple[int, ...]
    activations: Floats
    """[P, N]"""


@cache
def salt(seed: int, group: str, purpose: str) -> int:
    digest = hashlib.sha256(f"{seed}\0{group}\0{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def draw(seed: int, group: str, purpose: str, component: int, sequence: int) -> int:
    """64 bits of SplitMix64, after the salt of the group."""
    mask = 2**64 - 1
    state = ((component << 31 | sequence) * 0x9E3779B97F4A7C15) & mask
    state = (state + salt(seed, group, purpose)) & mask
    state = ((state ^ state >> 30) * 0xBF58476D1CE4E5B9) & mask
    state = ((state ^ state >> 27) * 0x94D049BB133111EB) & mask
    return state ^ state >> 31


def bin_of(value: float) -> int:
    """By the edges alone."""
    if value > 0:
        return int(np.searchsorted(bins.EDGES, value, side="right")) - 1
    return int(np.searchsorted(bins.EDGES, value, side="left")) - 1


def random_kept(seen: Sequence[Seen], keep: Keep, group: str, component: int) -> list[int]:
    drawn = sorted(
        (draw(keep.seed, group, "random", component, each.index) >> 33, each.index) for each in seen
    )
    return [index for _, index in drawn[: keep.random]]


def top_kept(seen: Sequence[Seen], keep: Keep, component: int) -> list[int]:
    ordered = sorted((-each.activations[:, component].max(), each.index) for each in seen)
    return [index for _, index in ordered[: keep.top]]


def strata_kept(seen: Sequence[Seen], keep: Keep, group: str, component: int) -> list[int]:
    by_bin: dict[int, list[tuple[int, int]]] = {}
    for each in seen:
        largest = float(each.activations[:, component].max())
        if largest > 0:
            key = draw(keep.seed, group, "strata", component, each.index) >> 40
            by_bin.setdefault(bin_of(largest), []).append((key, each.index))
    return [
        index
        for stratum in sorted(by_bin, reverse=True)[: keep.strata]
        for _, index in sorted(by_bin[stratum])[: keep.per_stratum]
    ]


def check_counts(
    counts: NDArray[np.int64], values: NDArray[np.floating[Any]], rounding: float
) -> None:
    if not rounding:
        expected = np.bincount([bin_of(value) for value in values], minlength=bins.BINS)
        assert np.array_equal(counts, expected)
        return
    below = np.cumsum(counts)[:-1]
    edges = bins.EDGES[1:-1, None]
    assert ((values < edges - rounding).sum(1) <= below).all()
    assert (below <= (values <= edges + rounding).sum(1)).all()
    assert counts.sum() == len(values)


def moments(values: NDArray[np.float64]) -> tuple[float, ...]:
    """Mean, variance, skewness, kurtosis; the last two NaN where nothing varies."""
    mean = values.mean()
    variance = ((values - mean) ** 2).mean()
    if variance <= (1e-6 * np.abs(values).max()) ** 2:
        return mean, 0.0, np.nan, np.nan
    deviations = (values - mean) / np.sqrt(variance)
    return mean, variance, (deviations**3).mean(), (deviations**4).mean()


def check(state: State, seen: Sequence[Seen], rounding: float = 0.0, every_nth: int = 1) -> None:
    """That the state says of each component what all of its activations say, moments to 1e-4.

    rounding: of the activations, in shares of a component's largest; counts are then exact but for
    values that close to an edge, the order of the top but for maxima that close to each other.
    """
    tolerance = 1e-4
    keep, group = state.keep, state.group
    by_index = {each.index: each for each in seen}
    every = np.concatenate([each.activations for each in seen])
    assert state.count == len(every)
    assert list(state["sequences"]) == sorted(by_index)
    assert list(state["lengths"]) == [len(by_index[index].ids) for index in sorted(by_index)]
    found = reading.statistics(state)
    np.testing.assert_allclose(state["smallest"], every.min(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state["largest"], every.max(0), rtol=1e-4, atol=1e-5)
    for component in range(0, state.components, every_nth):
        values = every[:, component].astype(np.float64)
        expected = moments(values)
        size = max(float(np.abs(values).max()), 1e-30)
        given = [
            getattr(found, name)[component] for name in ("mean", "variance", "skewness", "kurtosis")
        ]
        margin = rounding * size
        active = round(float(found.fraction_active[component]) * state.count)
        assert (values > margin).sum() <= active
        assert active <= (values > -margin).sum()
        scales: Sequence[Any] = (max(size, 1e-30), max(size**2, 1e-38), 1.0, 1.0)
        for one, other, scale in zip(given, expected, scales, strict=True):
            if np.isnan(other):
                assert np.isnan(one)
            else:
                assert abs(one - other) <= tolerance * max(abs(other), scale), (component, given)
        for name, of in (
            ("histogram", values),
            ("maxima", np.array([each.activations[:, component].max() for each in seen])),
        ):
            check_counts(state[name][component], of, rounding * size)
        for name, wanted in (
            ("top", top_kept(seen, keep, component)),
            ("random", random_kept(seen, keep, group, component)),
            ("strata", strata_kept(seen, keep, group, component)),
        ):
            examples = list(reading._examples(state, name, component))
            kept = [each.sequence for each in examples]
            if name == "top" and rounding and kept != wanted:
                # The same tokens at the beginning of several sequences are as large in all of them.
                assert len(set(kept)) == len(wanted)
                ours, theirs = (
                    np.array([by_index[index].activations[:, component].max() for index in each])
                    for each in (kept, wanted)
                )
                np.testing.assert_allclose(ours, theirs, rtol=0, atol=margin)
            else:
                assert kept == wanted, (component, name)
            for each in examples:
                row = by_index[each.sequence].activations[:, component]
                np.testing.assert_allclose(each.activations, row, rtol=1e-5, atol=1e-5 * size)
