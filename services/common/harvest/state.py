"""The state of one group of components after some sequences, and the merge of two.

    merge(state of a, state of b) == state of a and b        for any sequences a and b, none in both

Whom the keys name (`keys`), counts and extremes merge exactly. Moments and token sums are float64
and merge up to its rounding, moments by central sums, so that a mean far from 0 costs no digits.

A *place* is what has one activation: a token of a sequence, for a head a pair of tokens (the lower
triangle row by row, `max(0, q - w + 1)..q` under a sliding window of w). N components, S sequences,
P places of the longest.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.common.harvest import keys

Array = NDArray[Any]

KEPT = ("top", "random", "strata")
_AT_ONCE = 1024
"""Components whose kept activations are merged at a time."""


@dataclass(frozen=True)
class Keep:
    """What is kept of each component."""

    top: int = 20
    """Sequences with the largest maxima."""
    random: int = 10
    """Sequences drawn uniformly."""
    strata: int = 10
    """The highest bins of positive maxima in which sequences are drawn."""
    per_stratum: int = 2
    """Sequences drawn uniformly in each."""
    seed: int = 0

    def capacity(self, kept: str) -> int:
        return {
            "top": self.top,
            "random": self.random,
            "strata": self.strata * self.per_stratum,
        }[kept]


@dataclass(frozen=True, eq=False)
class State:
    """What was gathered of one group. Arrays, by name:

    sequences            int32   [S]        indices, ascending
    lengths              int32   [S]        their tokens
    mean, m2, m3, m4     float64 [N]        mean, and sums of powers 2..4 of what differs from it
    smallest, largest    float32 [N]
    histogram            int64   [N, BINS]  of all values (`bins`)
    maxima               int64   [N, BINS]  of the sequences' largest values
    top_keys             int64   [N, K]     ascending; K is what is kept of any component
    top_activations      float32 [N, K, P]  of the sequences of top_keys; 0 behind the shorter ones
    random_keys, random_activations, strata_keys, strata_activations    likewise
    tokens               int32   [V]        tokens whose activations are summed, ascending
    token_counts         int64   [V]        places of each: of a head those with that query
    token_sums           float64 [N, V]     activations there
    key_token_counts, key_token_sums        of heads: places with that key
    """

    group: str
    """`neuron.L`, `head.L` or `latent.D`."""
    keep: Keep
    count: int
    """Values of each component."""
    window: int | None
    """How many keys a query of the head has at most; None: all."""
    arrays: Mapping[str, Array]

    def __getitem__(self, name: str) -> Array:
        return self.arrays[name]

    @property
    def components(self) -> int:
        return len(self["mean"])

    @property
    def places(self) -> int:
        return int(self["top_activations"].shape[2])

    @property
    def is_of_heads(self) -> bool:
        return self.group.startswith("head.")


def merge(first: State, second: State) -> State:
    """The state of the sequences of both. Raises ValueError where the two do not go together."""
    _check(first, second)
    arrays: dict[str, Array] = {}
    both = np.concatenate((first["sequences"], second["sequences"]))
    order = np.argsort(both)
    arrays["sequences"] = both[order]
    arrays["lengths"] = np.concatenate((first["lengths"], second["lengths"]))[order]
    arrays |= merged_moments(
        [_moments(each) for each in (first, second)], [first.count, second.count]
    )
    arrays["smallest"] = np.minimum(first["smallest"], second["smallest"])
    arrays["largest"] = np.maximum(first["largest"], second["largest"])
    for name in _added(first):
        arrays[name] = first[name] + second[name]
    arrays["tokens"] = first["tokens"]
    for kept in KEPT:
        arrays |= _merged_kept(kept, first, second)
    return replace(first, count=first.count + second.count, arrays=arrays)


def merged_moments(parts: Sequence[Mapping[str, Array]], counts: Sequence[int]) -> dict[str, Array]:
    """Mean and central sums of several parts together, each with its count of values."""
    total = float(sum(counts))
    mean = sum((n / total) * part["mean"] for part, n in zip(parts, counts, strict=True))
    m2, m3, m4 = (np.zeros_like(parts[0]["mean"]) for _ in range(3))
    for part, n in zip(parts, counts, strict=True):
        off = part["mean"] - mean
        m4 += part["m4"] + 4 * off * part["m3"] + 6 * off**2 * part["m2"] + n * off**4
        m3 += part["m3"] + 3 * off * part["m2"] + n * off**3
        m2 += part["m2"] + n * off**2
    return {"mean": np.asarray(mean), "m2": m2, "m3": m3, "m4": m4}


def _moments(state: State) -> dict[str, Array]:
    return {name: state[name] for name in ("mean", "m2", "m3", "m4")}


def _added(state: State) -> Iterator[str]:
    yield from ("histogram", "maxima", "token_counts", "token_sums")
    if state.is_of_heads:
        yield from ("key_token_counts", "key_token_sums")


def _check(first: State, second: State) -> None:
    for name in ("group", "keep", "window", "components"):
        one, other = getattr(first, name), getattr(second, name)
        if one != other:
            raise ValueError(f"states of different {name} do not merge: {one} and {other}")
    if not np.array_equal(first["tokens"], second["tokens"]):
        raise ValueError("states that sum activations at different tokens do not merge")
    shared = np.intersect1d(first["sequences"], second["sequences"])
    if len(shared):
        raise ValueError(f"sequence {shared[0]} is in both states, so it would count twice")


def _merged_kept(kept: str, first: State, second: State) -> dict[str, Array]:
    names = f"{kept}_keys", f"{kept}_activations"
    candidates = np.concatenate((first[names[0]], second[names[0]]), axis=1)
    if kept == "strata":
        keep = first.keep
        places, merged = keys.smallest_by_stratum(candidates, keep.strata, keep.per_stratum)
        most = int((merged != keys.EMPTY).sum(1).max())
        places, merged = places[:, :most], merged[:, :most]
    else:
        places = keys.smallest(candidates, first.keep.capacity(kept))
        merged = np.take_along_axis(candidates, places, 1)
    width = max(first.places, second.places)
    activations = np.zeros((*merged.shape, width), np.float32)
    split = first[names[0]].shape[1]
    for start in range(0, len(merged), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        for state, mine in ((first, places[part] < split), (second, places[part] >= split)):
            component, place = np.nonzero(mine & (merged[part] != keys.EMPTY))
            source = places[part][component, place] - (0 if state is first else split)
            rows = state[names[1]][part][component, source]
            activations[part][component, place, : state.places] = rows
    return {names[0]: merged, names[1]: activations}
