"""Keys: who is kept for a component, as one int64 per sequence, the smallest winning.

A key ends in the sequence's index, so no two are equal: what is kept depends neither on the order
in which sequences come nor on how they are split between calls.

    top       value, the largest first, then index
    random    31 bits of hash, then index
    strata    bin of the value (`bins`), the highest first, then 24 bits of hash, then index
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.int64]

EMPTY = 2**63 - 1
"""Where nothing is kept."""
INDEX_BITS = 31
INDEX_MASK = 2**INDEX_BITS - 1
STRATUM_HASH_BITS = 24
STRATUM_SHIFT = INDEX_BITS + STRATUM_HASH_BITS
HIGHEST_STRATUM = 255
MULTIPLIERS = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
"""Of SplitMix64: the step between components, and the two of its mix."""


def salt(seed: int, group: str, purpose: str) -> int:
    """What hashes of a group begin with, in 0..2^63: groups and purposes draw independently."""
    digest = hashlib.sha256(f"{seed}\0{group}\0{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def sequences(kept: Keys) -> NDArray[np.int32]:
    """The indices of the sequences that are kept; -1 where nothing is."""
    return np.where(kept == EMPTY, -1, kept & INDEX_MASK).astype(np.int32)


def values(top: Keys) -> NDArray[np.float32]:
    """The largest activation of each sequence of a `top`."""
    ordered = (~(top >> INDEX_BITS)).astype(np.int32)
    bits = np.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).astype(np.int32)
    return bits.view(np.float32)


def strata(kept: Keys) -> NDArray[np.int64]:
    """The bin of each key of `strata`; -1 where nothing is kept."""
    return np.where(kept == EMPTY, -1, HIGHEST_STRATUM - (kept >> STRATUM_SHIFT))


def smallest(candidates: Keys, capacity: int) -> NDArray[np.intp]:
    """[N, K] -> [N, min(K, capacity)]: places of the smallest keys of each row, ascending."""
    return np.argsort(candidates, axis=1)[:, :capacity]


def smallest_by_stratum(candidates: Keys, count: int, each: int) -> tuple[NDArray[np.intp], Keys]:
    """The same of strata: of the `count` highest bins of each row, `each` keys.

    The keys come with the places [N, count * each], EMPTY where fewer are kept.
    """
    order = np.argsort(candidates, axis=1)
    ordered = np.take_along_axis(candidates, order, 1)
    bins = ordered >> STRATUM_SHIFT
    begins = np.ones_like(bins, dtype=bool)
    begins[:, 1:] = bins[:, 1:] != bins[:, :-1]
    surplus = np.zeros_like(begins)
    if bins.shape[1] > each:
        surplus[:, each:] = bins[:, each:] == bins[:, :-each]
    kept = (np.cumsum(begins, axis=1) <= count) & ~surplus & (ordered != EMPTY)
    ordered = np.where(kept, ordered, EMPTY)
    again = np.argsort(ordered, axis=1, kind="stable")[:, : count * each]
    return np.take_along_axis(order, again, 1), np.take_along_axis(ordered, again, 1)
