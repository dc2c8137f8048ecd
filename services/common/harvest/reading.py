"""What a state says of its components: statistics, histograms, examples, intervals, tokens."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from services.common.harvest import bins, keys
from services.common.harvest.state import State

Numbers = NDArray[np.float64]

_RESOLUTION = 1e-6
"""Standard deviations below this share of the largest value are float32's rounding: such values
are constant, and have no skewness."""


@dataclass(frozen=True)
class Statistics:
    """Moments of all components, each [N]; NaN where a component's values do not vary."""

    mean: Numbers
    variance: Numbers
    skewness: Numbers
    kurtosis: Numbers
    fraction_active: Numbers
    smallest: NDArray[np.float32]
    largest: NDArray[np.float32]


def statistics(state: State) -> Statistics:
    """Population moments over all values; skewness and kurtosis standardised (normal: 0 and 3)."""
    variance = state["m2"] / state.count
    size = np.maximum(np.abs(state["smallest"]), np.abs(state["largest"])).astype(np.float64)
    varies = variance > (_RESOLUTION * size) ** 2
    deviation = np.sqrt(np.where(varies, variance, np.nan))
    return Statistics(
        mean=state["mean"],
        variance=np.where(varies, variance, 0.0),
        skewness=state["m3"] / state.count / deviation**3,
        kurtosis=state["m4"] / state.count / deviation**4,
        fraction_active=state["histogram"][:, bins.FIRST_POSITIVE :].sum(1) / state.count,
        smallest=state["smallest"],
        largest=state["largest"],
    )


def histogram(state: State, component: int) -> tuple[Numbers, NDArray[np.int64]]:
    """Edges [n + 1] and counts [n] of a component's values, cut to where there are any.

    The first and the last edge are the smallest and the largest value where those lie in a bin
    without an end.
    """
    counts = state["histogram"][component]
    used = np.nonzero(counts)[0]
    first, last = int(used[0]), int(used[-1]) + 1
    edges = bins.EDGES[first : last + 1].copy()
    if not np.isfinite(edges[0]):
        edges[0] = state["smallest"][component]
    if not np.isfinite(edges[-1]):
        edges[-1] = state["largest"][component]
    if edges[0] >= edges[1]:  # all of the bin's values are at its edge
        edges[0] = np.nextafter(edges[1], -np.inf)
    if edges[-1] <= edges[-2]:
        edges[-1] = np.nextafter(edges[-2], np.inf)
    return edges, counts[first:last]


@dataclass(frozen=True)
class Example:
    """A sequence that is kept for a component."""

    sequence: int
    tokens: int
    activations: NDArray[np.float32]
    """[tokens], of a head [pairs]."""


def top(state: State, component: int) -> list[Example]:
    """By largest activation, descending; equal ones by index."""
    return list(_examples(state, "top", component))


def random(state: State, component: int) -> list[Example]:
    """Drawn uniformly, in the order in which they were drawn."""
    return list(_examples(state, "random", component))


@dataclass(frozen=True)
class Interval:
    """Sequences whose largest activation lies in [lower, upper)."""

    lower: float
    upper: float
    fraction: float
    """Share of all values in the interval."""
    sequences: int
    """How many there are."""
    examples: tuple[Example, ...]
    """Drawn uniformly from them, in the order in which they were drawn."""


def intervals(state: State, component: int, count: int) -> list[Interval]:
    """Up to `count` intervals by quantile of the positive sequence maxima, the strongest first.

    Boundaries are edges of `bins`: the quantile i / count is the first edge below which at least
    that share of the positive maxima lie. Quantiles that fall in one bin make one interval. Where
    an interval reaches below the highest `keep.strata` bins that have any, its examples come from
    the part above.
    """
    maxima = state["maxima"][component]
    positive = maxima[bins.FIRST_POSITIVE :]
    total = int(positive.sum())
    if not total:
        return []
    below = np.concatenate(([0], np.cumsum(positive)))
    wanted = [int(np.searchsorted(below, total * i / count)) for i in range(1, count + 1)]
    used = np.nonzero(positive)[0]
    cuts = sorted({int(used[0]), *wanted})
    kept = list(_examples(state, "strata", component))
    kept_keys = state["strata_keys"][component]
    kept_keys = kept_keys[kept_keys != keys.EMPTY]
    where = keys.strata(kept_keys) - bins.FIRST_POSITIVE
    drawn = kept_keys & (2**keys.STRATUM_SHIFT - 1)
    values = state["histogram"][component][bins.FIRST_POSITIVE :]
    largest = float(state["largest"][component])
    found = []
    for low, high in pairwise(cuts):
        inside = np.nonzero((where >= low) & (where < high))[0]
        inside = inside[np.argsort(drawn[inside])][: state.keep.per_stratum]
        found.append(
            Interval(
                lower=float(bins.EDGES[bins.FIRST_POSITIVE + low]),
                upper=min(float(bins.EDGES[bins.FIRST_POSITIVE + high]), largest)
                if high == cuts[-1]
                else float(bins.EDGES[bins.FIRST_POSITIVE + high]),
                fraction=float(values[low:high].sum()) / state.count,
                sequences=int(positive[low:high].sum()),
                examples=tuple(kept[place] for place in inside),
            )
        )
    return found[::-1]


@dataclass(frozen=True)
class TokenSum:
    """A component's activations at all places of one token."""

    token: int
    count: int
    total: float

    @property
    def mean(self) -> float:
        return self.total / self.count


def tokens(state: State, component: int, *, keys_of_pairs: bool = False) -> list[TokenSum]:
    """The tokens whose activations were summed and that occurred, by total, descending."""
    prefix = "key_token" if keys_of_pairs else "token"
    counts, sums = state[f"{prefix}_counts"], state[f"{prefix}_sums"][component]
    found = [
        TokenSum(int(token), int(count), float(total))
        for token, count, total in zip(state["tokens"], counts, sums, strict=True)
        if count
    ]
    return sorted(found, key=lambda each: (-each.total, each.token))


def pairs(tokens: int, window: int | None) -> int:
    """How many visible pairs a sequence has."""
    if window is None or window >= tokens:
        return tokens * (tokens + 1) // 2
    return window * (window + 1) // 2 + (tokens - window) * window


def _examples(state: State, kept: str, component: int) -> Iterator[Example]:
    rows = state[f"{kept}_activations"][component]
    for sequence, row in zip(keys.sequences(state[f"{kept}_keys"][component]), rows, strict=True):
        if sequence < 0:
            continue
        place = int(np.searchsorted(state["sequences"], sequence))
        length = int(state["lengths"][place])
        used = pairs(length, state.window) if state.is_of_heads else length
        yield Example(int(sequence), length, row[:used])
