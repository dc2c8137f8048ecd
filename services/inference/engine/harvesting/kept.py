"""The sequences kept for every component, with their activations, by key (`harvest.keys`).

    Top       the largest maxima
    Drawn     uniformly: who, is known before anything is read
    Strata    uniformly in each of the highest bins of maxima

Activations lie in slots that stay where they are: only those of sequences that come in are written.
Most batches bring little that enters, so what cannot is sorted out first, by one number a component
or bin.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from services.common.harvest import bins, keys
from services.inference.engine.harvesting.scratch import Scratch

_STEP, _MIX1, _MIX2 = (multiplier - 2**64 for multiplier in keys.MULTIPLIERS)
"""As signed numbers, which is what torch multiplies."""
_AT_ONCE = 2**17
"""Keys that are compared at a time."""
_STRATA = bins.BINS - bins.FIRST_POSITIVE
_ANY_HASH = 2**keys.STRATUM_HASH_BITS


class Offered:
    """The activations of a batch, [B, P, N], taken out by sequence and component."""

    def __init__(self, batch: int, places: int, components: int, scratch: Scratch) -> None:
        self._batch = batch
        self._turned = scratch.take("turned", torch.Size((components, batch * places)))

    def put(self, values: Tensor, part: slice) -> None:
        """Those of the components `part`, [B, P, n], one behind the other in memory."""
        # As a matrix, which is turned five times as fast as three dimensions are.
        self._turned[part].copy_(values.flatten(0, 1).t())

    def rows(self, sequences: Tensor, components: Tensor) -> Tensor:
        """[M], [M] -> [M, P]"""
        turned = self._turned.view(len(self._turned) * self._batch, -1)
        return turned.index_select(0, components * self._batch + sequences)


class Kept:
    """The `capacity` sequences with the smallest keys, of each of N components."""

    def __init__(self, components: int, capacity: int, places: int, device: torch.device) -> None:
        self.capacity = capacity
        self.keys = torch.full((components, capacity), keys.EMPTY, device=device)
        """In the order of slots."""
        self._activations = torch.zeros(components * capacity, places, device=device)

    def finish(self) -> tuple[Tensor, Tensor]:
        """Keys [N, K], ascending, and activations [N, K, P], on the CPU; K is what is kept at
        most."""
        ordered, slots = self.keys.sort(dim=1)
        empty = ordered == keys.EMPTY
        most = int((~empty).sum(1).amax())
        slots += torch.arange(len(slots), device=slots.device)[:, None] * self.capacity
        found = self._activations[slots[:, :most]]
        found[empty[:, :most]] = 0
        return ordered[:, :most].contiguous().cpu(), found.cpu()

    def _write(self, slots: Tensor, activations: Tensor) -> None:
        """Slots of all components, [M]; [M, P]"""
        behind = self._activations.shape[1] - activations.shape[1]
        if behind:
            activations = F.pad(activations, (0, behind))
        self._activations.index_copy_(0, slots, activations)

    def _settle(
        self, components: Tensor, candidates: Tensor, stay: Tensor, offered: Offered
    ) -> None:
        """Keeps what is marked of what was kept and the candidates.

        components [m], candidates [m, B], stay [m, K + B]: K at most in a row.
        """
        entering, leaving = stay[:, self.capacity :], ~stay[:, : self.capacity]
        present = self.keys[components].masked_fill_(leaving, keys.EMPTY)
        free = leaving & (leaving.cumsum(1) <= entering.sum(1, keepdim=True))
        # As many free slots as newcomers in every row, so the two lists run alongside.
        row, slot = free.nonzero(as_tuple=True)
        newcomer = entering.nonzero()[:, 1]
        present[row, slot] = candidates[row, newcomer]
        self.keys[components] = present
        where = components[row]
        self._write(where * self.capacity + slot, offered.rows(newcomer, where))


class Top(Kept):
    def __init__(self, components: int, capacity: int, places: int, device: torch.device) -> None:
        super().__init__(components, capacity, places, device)
        self._least = torch.full((components,), -torch.inf, device=device)
        """[N]: maxima below it do not enter."""

    def offer(self, offered: Offered, largest: Tensor, sequences: Tensor) -> None:
        """Activations, their maxima [B, N], the sequences [B]."""
        promising = (largest.amax(0) >= self._least).nonzero()[:, 0]
        for components in _parts(promising, self.capacity + len(sequences)):
            candidates = _top_keys(largest[:, components], sequences).T
            # Equal maxima are decided by the sequences' indices.
            last = self.keys[components].amax(1)
            enter = (candidates.amin(1) < last).nonzero()[:, 0]
            if len(enter):
                self._enter(offered, components[enter], candidates[enter])

    def _enter(self, offered: Offered, components: Tensor, candidates: Tensor) -> None:
        every = torch.cat((self.keys[components], candidates), 1)
        smallest = torch.topk(every, self.capacity, dim=1, largest=False, sorted=False).values
        last = smallest.amax(1)
        stay = (every <= last[:, None]) & (every != keys.EMPTY)
        self._settle(components, candidates, stay, offered)
        self._least[components] = torch.where(last == keys.EMPTY, -torch.inf, _top_values(last))


class Drawn(Kept):
    def __init__(
        self, components: int, capacity: int, places: int, sequences: Tensor, salt: int
    ) -> None:
        """sequences: all that will come, [S]."""
        super().__init__(components, capacity, places, sequences.device)
        every = torch.arange(components, device=sequences.device)
        for part in _parts(every, len(sequences)) if capacity else ():
            found = hashed(salt, part[:, None], sequences) >> (63 - 31) << keys.INDEX_BITS
            found |= sequences
            drawn = torch.topk(found, capacity, dim=1, largest=False, sorted=False)
            self.keys[part] = drawn.values
        drawn_sequences = (self.keys & keys.INDEX_MASK).flatten().int()
        self._sequences, self._slots = drawn_sequences.sort(stable=True)
        """Of all slots, by sequence."""

    def offer(self, offered: Offered, sequences: Tensor) -> None:
        """Activations and the sequences [B]."""
        ends = (
            torch.searchsorted(self._sequences, sequences.int(), right=right)
            for right in (False, True)
        )
        first, last = (end.tolist() for end in ends)
        slots = [self._slots[start:stop] for start, stop in zip(first, last, strict=True)]
        of = [torch.full_like(each, number) for number, each in enumerate(slots)]
        where = torch.cat(slots)
        if len(where):
            self._write(where, offered.rows(torch.cat(of), where // self.capacity))


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
        shape = components, _STRATA if count else 0
        self._most = torch.full(shape, _ANY_HASH, dtype=torch.int32, device=device)
        """[N, strata from the lowest]: hashes above it do not enter."""

    def offer(self, offered: Offered, binned: Tensor, sequences: Tensor) -> None:
        """Activations, the bins of their maxima [B, N], the sequences [B]."""
        if not self.capacity:
            return
        every = torch.arange(len(self.keys), device=self.keys.device)
        for part in _parts(every, self.capacity + len(sequences)):
            found = binned[:, part].T.long()
            hashes = hashed(self._salt, part[:, None], sequences) >> 63 - keys.STRATUM_HASH_BITS
            strata = found - bins.FIRST_POSITIVE
            may = hashes <= self._most[part].gather(1, strata.clamp_min(0))
            may &= strata >= 0
            enter = may.any(1).nonzero()[:, 0]
            if not len(enter):
                continue
            candidates = keys.HIGHEST_STRATUM - found[enter] << keys.STRATUM_SHIFT
            candidates |= hashes[enter] << keys.INDEX_BITS | sequences
            self._enter(offered, part[enter], candidates.masked_fill_(~may[enter], keys.EMPTY))

    def _enter(self, offered: Offered, components: Tensor, candidates: Tensor) -> None:
        each = self._each
        every = torch.cat((self.keys[components], candidates), 1)
        ordered, places = torch.sort(every, dim=1)
        strata = ordered >> keys.STRATUM_SHIFT
        begins = torch.ones_like(strata, dtype=torch.bool)
        begins[:, 1:] = strata[:, 1:] != strata[:, :-1]
        number = begins.cumsum(1)
        kept = (number <= self._count) & (ordered != keys.EMPTY)
        kept[:, each:] &= strata[:, each:] != strata[:, :-each]
        self._settle(
            components, candidates, torch.empty_like(kept).scatter_(1, places, kept), offered
        )
        self._most[components] = self._limits(ordered, kept, number)

    def _limits(self, ordered: Tensor, kept: Tensor, number: Tensor) -> Tensor:
        """[m, strata from the lowest]: the largest hash that may enter; -1: none.

        Of keys in order [m, K + B], which are kept, and the number of each one's stratum from 1.
        """
        each = self._each
        strata = keys.HIGHEST_STRATUM - bins.FIRST_POSITIVE - (ordered >> keys.STRATUM_SHIFT)
        full = kept & (number == self._count)
        lowest = torch.where(full, strata, 0).amax(1, keepdim=True)
        below = torch.arange(_STRATA, device=ordered.device) < lowest
        limits = torch.where(below, -1, _ANY_HASH)
        last = kept.clone()
        last[:, : each - 1] = False
        last[:, each - 1 :] &= strata[:, each - 1 :] == strata[:, : strata.shape[1] - each + 1]
        row, place = last.nonzero(as_tuple=True)
        hashes = ordered[row, place] >> keys.INDEX_BITS & _ANY_HASH - 1
        limits[row, strata[row, place]] = hashes
        return limits.int()


def _parts(components: Tensor, keys_of_each: int) -> tuple[Tensor, ...]:
    """[n] in parts that have not too many keys."""
    return torch.split(components, max(1, _AT_ONCE // keys_of_each))


def hashed(salt: int, components: Tensor, sequences: Tensor) -> Tensor:
    """In 0..2^63: a hash of each sequence and component, whatever else is there; broadcast."""
    mixed = (components << keys.INDEX_BITS | sequences).mul_(_STEP).add_(salt)
    mixed.bitwise_xor_(_shifted(mixed, 30)).mul_(_MIX1)
    mixed.bitwise_xor_(_shifted(mixed, 27)).mul_(_MIX2)
    return _shifted(mixed.bitwise_xor_(_shifted(mixed, 31)), 1)


def _shifted(x: Tensor, by: int) -> Tensor:
    """Shifted right as unsigned numbers are."""
    return (x >> by).bitwise_and_((1 << 64 - by) - 1)


def _top_keys(largest: Tensor, sequences: Tensor) -> Tensor:
    """[B, n], [B] -> [B, n]"""
    bits = (largest + 0.0).view(torch.int32)  # -0.0 is 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (~ordered).long() << keys.INDEX_BITS | sequences[:, None]


def _top_values(top: Tensor) -> Tensor:
    """The maxima that keys were made of."""
    ordered = (~(top >> keys.INDEX_BITS)).int()
    return torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).view(torch.float32)
