"""The sequences kept for every component, with their activations, by key (`harvest.keys`).

    Top       the largest maxima
    Drawn     uniformly
    Strata    uniformly in each of the highest bins of maxima

Activations lie in slots that stay where they are: only those of sequences that come in are written.
"""

from abc import ABC, abstractmethod
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from services.common.harvest import keys
from services.inference.engine.harvesting.counts import binned

_STEP, _MIX1, _MIX2 = (multiplier - 2**64 for multiplier in keys.MULTIPLIERS)
"""As signed numbers, which is what torch multiplies."""


class Offered:
    """The activations of a batch, [B, P, n], taken out by sequence and component."""

    def __init__(self, values: Tensor) -> None:
        self._values = values

    def rows(self, sequences: Tensor, components: Tensor) -> Tensor:
        """[M], [M] -> [M, P]"""
        batch, _, count = self._values.shape
        if len(sequences) * 3 < batch * count:
            return self._values[sequences, :, components]
        return self._turned.index_select(0, sequences * count + components)

    @cached_property
    def _turned(self) -> Tensor:
        """[B n, P]: worth its time where many rows are taken out, which lie scattered otherwise."""
        return self._values.transpose(1, 2).contiguous().flatten(0, 1)


class Kept(ABC):
    """The `capacity` sequences with the smallest keys, of each of N components."""

    def __init__(self, components: int, capacity: int, places: int, device: torch.device) -> None:
        self.capacity = capacity
        self.keys = torch.full((components, capacity), keys.EMPTY, device=device)
        self._slots = torch.arange(capacity, device=device).repeat(components, 1)
        self._rows = torch.zeros(components, capacity, places, device=device)

    def offer(self, offered: Offered, largest: Tensor, sequences: Tensor, part: slice) -> None:
        """Activations of the components `part`, their maxima [B, n], the sequences [B]."""
        if not self.capacity:
            return
        candidates = self._keys_of(largest, sequences, part).T
        components = self._may_enter(candidates, self.keys[part]).nonzero()[:, 0]
        if components.numel():
            self._enter(offered, candidates[components], components, part.start)

    def finish(self) -> tuple[Tensor, Tensor]:
        """Keys [N, K] and activations [N, K, P], on the CPU; K is what is kept at most."""
        empty = self.keys == keys.EMPTY
        most = int((~empty).sum(1).amax()) if self.capacity else 0
        rows = torch.arange(len(self.keys), device=self.keys.device)[:, None]
        found = self._rows[rows, self._slots[:, :most]]
        found[empty[:, :most]] = 0
        return self.keys[:, :most].contiguous().cpu(), found.cpu()

    @abstractmethod
    def _keys_of(self, largest: Tensor, sequences: Tensor, part: slice) -> Tensor:
        """[B, n], [B] -> [B, n]"""

    def _may_enter(self, candidates: Tensor, present: Tensor) -> Tensor:
        """[n, B], [n, K] -> [n]: components for which a candidate may be kept."""
        return candidates.amin(1) < present[:, -1]

    def _choose(self, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """[n, K + B] -> the keys that stay, [n, K] ascending, and where they are among them."""
        return torch.topk(candidates, self.capacity, dim=1, largest=False, sorted=True)

    def _enter(self, offered: Offered, candidates: Tensor, components: Tensor, first: int) -> None:
        rows = components + first
        staying, places = self._choose(torch.cat((self.keys[rows], candidates), 1))
        new = (places >= self.capacity) & (staying != keys.EMPTY)
        changed = new.any(1).nonzero()[:, 0]
        if len(changed) < len(rows):
            rows, components = rows[changed], components[changed]
            staying, places, new = staying[changed], places[changed], new[changed]
        old = places < self.capacity
        slots = self._slots[rows]
        # The j-th newcomer takes the j-th slot whose sequence left.
        width = self.capacity + candidates.shape[1]
        taken = torch.zeros(len(rows), width, dtype=torch.int8, device=slots.device)
        taken = taken.scatter_(1, places, 1)[:, : self.capacity]
        free = slots.gather(1, torch.argsort(taken, dim=1, stable=True))
        nth = ((~old).cumsum(1) - 1).clamp_min(0)
        present = slots.gather(1, places.clamp_max(self.capacity - 1))
        chosen = torch.where(old, present, free.gather(1, nth))
        self.keys[rows] = staying
        self._slots[rows] = chosen
        row, place = new.nonzero(as_tuple=True)
        activations = offered.rows(places[row, place] - self.capacity, components[row])
        longest = self._rows.shape[2]
        activations = F.pad(activations, (0, longest - activations.shape[1]))
        where = rows[row] * self.capacity + chosen[row, place]
        self._rows.view(-1, longest).index_copy_(0, where, activations)


class Top(Kept):
    def _keys_of(self, largest: Tensor, sequences: Tensor, part: slice) -> Tensor:
        bits = (largest + 0.0).view(torch.int32)  # -0.0 is 0.0
        ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
        return (~ordered).long() << keys.INDEX_BITS | sequences[:, None]


class Drawn(Kept):
    def __init__(
        self, components: int, capacity: int, places: int, device: torch.device, salt: int
    ) -> None:
        super().__init__(components, capacity, places, device)
        self._salt = salt

    def _keys_of(self, largest: Tensor, sequences: Tensor, part: slice) -> Tensor:
        hashes = hashed(self._salt, sequences, part)
        return hashes >> (63 - 31) << keys.INDEX_BITS | sequences[:, None]


class Strata(Kept):
    """Of the `count` highest bins of positive maxima, `each` sequences with the smallest hashes."""

    def __init__(
        self,
        components: int,
        count: int,
        each: int,
        places: int,
        device: torch.device,
        salt: int,
    ) -> None:
        super().__init__(components, count * each, places, device)
        self._count, self._each, self._salt = count, each, salt

    def _keys_of(self, largest: Tensor, sequences: Tensor, part: slice) -> Tensor:
        hashes = hashed(self._salt, sequences, part) >> (63 - keys.STRATUM_HASH_BITS)
        stratum = keys.HIGHEST_STRATUM - binned(largest.contiguous()).long()
        found = stratum << keys.STRATUM_SHIFT | hashes << keys.INDEX_BITS | sequences[:, None]
        return torch.where(largest > 0, found, keys.EMPTY)

    def _may_enter(self, candidates: Tensor, present: Tensor) -> Tensor:
        return candidates.amin(1) != keys.EMPTY

    def _choose(self, candidates: Tensor) -> tuple[Tensor, Tensor]:
        ordered, places = torch.sort(candidates, dim=1)
        bins_of = ordered >> keys.STRATUM_SHIFT
        begins = torch.ones_like(bins_of)
        begins[:, 1:] = bins_of[:, 1:] != bins_of[:, :-1]
        kept = (begins.cumsum(1) <= self._count) & (ordered != keys.EMPTY)
        if bins_of.shape[1] > self._each:
            kept[:, self._each :] &= bins_of[:, self._each :] != bins_of[:, : -self._each]
        ordered, again = torch.where(kept, ordered, keys.EMPTY).sort(dim=1, stable=True)
        return ordered[:, : self.capacity], places.gather(1, again[:, : self.capacity])


def hashed(salt: int, sequences: Tensor, part: slice) -> Tensor:
    """[B, n], in 0..2^63: a hash of each sequence and component, whatever else is there."""
    components = torch.arange(part.start, part.stop, device=sequences.device)
    mixed = (components[None] << keys.INDEX_BITS | sequences[:, None]) * _STEP + salt
    mixed = (mixed ^ _shifted(mixed, 30)) * _MIX1
    mixed = (mixed ^ _shifted(mixed, 27)) * _MIX2
    return _shifted(mixed ^ _shifted(mixed, 31), 1)


def _shifted(x: Tensor, by: int) -> Tensor:
    """Shifted right as unsigned numbers are."""
    return x >> by & (1 << 64 - by) - 1
