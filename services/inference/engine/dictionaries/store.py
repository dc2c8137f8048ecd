"""Weights where they are used: read when first needed, kept on the device under a budget.

The least recently used leave the device first: from a GPU to the host, as far as its budget goes,
and from there, or from a CPU, back to their files. Only the torch thread calls it.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch

from services.common.errors import FailedPrecondition, NotFound
from services.inference.engine.dictionaries.dictionary import Dictionary
from services.inference.engine.dictionaries.sources import Registered

_HOST = torch.device("cpu")


class Store:
    """The dictionaries of one model."""

    def __init__(
        self,
        registered: Iterable[Registered],
        device: torch.device,
        budget: int,
        host_budget: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`budget` and `host_budget` are bytes of weights; a CPU has no use for the second."""
        self.registered = {each.id: each for each in registered}
        self._device = device
        self._dtype = dtype
        self._budget = budget
        self._host_budget = host_budget if device.type != "cpu" else 0
        self._resident: OrderedDict[str, Dictionary] = OrderedDict()
        self._host: OrderedDict[str, Dictionary] = OrderedDict()
        self._uses: Counter[str] = Counter()

    @contextmanager
    def using(self, ids: Sequence[str]) -> Iterator[list[Dictionary]]:
        """The dictionaries on the device together, for as long as the block runs.

        Raises NotFound for an id that is not registered, and FailedPrecondition with needed and
        available bytes if they do not fit the budget together.
        """
        unknown = [each for each in ids if each not in self.registered]
        if unknown:
            known = ", ".join(self.registered) or "none"
            raise NotFound(f"no dictionary {unknown[0]!r} is loaded; there are: {known}")
        wanted = list(dict.fromkeys(ids))
        held = set(self._uses) | set(wanted)
        needed = sum(self._size(each) for each in held)
        if needed > self._budget:
            raise FailedPrecondition(
                f"{', '.join(sorted(held))} need {needed:,} bytes together, but {self._budget:,} "
                "are available for dictionaries: use fewer at once",
                reason="DICTIONARY_BUDGET",
                metadata={"needed_bytes": str(needed), "available_bytes": str(self._budget)},
            )
        self._uses.update(wanted)
        try:
            for each in wanted:
                if each not in self._resident:
                    self._make_room(self._size(each))
                    self._resident[each] = self._load(each)
                self._resident.move_to_end(each)
            yield [self._resident[each] for each in ids]
        finally:
            self._uses.subtract(wanted)
            self._uses += Counter()

    @property
    def awaited(self) -> int:
        """Bytes of the device that dictionaries may still take: all that are served, up to the
        budget."""
        wanted = min(self._budget, sum(map(self._size, self.registered)))
        return max(0, wanted - sum(self.resident().values()))

    def get(self, id: str) -> Dictionary:
        """One dictionary on the device. The next call may take it off again."""
        with self.using([id]) as (dictionary,):
            return dictionary

    def resident(self) -> dict[str, int]:
        """Bytes on the device by id, the least recently used first."""
        return {id: each.nbytes for id, each in self._resident.items()}

    def _size(self, id: str) -> int:
        return self.registered[id].header.nbytes // 4 * self._dtype.itemsize

    def _load(self, id: str) -> Dictionary:
        dictionary = self._host.pop(id, None) or self.registered[id].load()
        return dictionary.to(self._device, self._dtype).laid_out()

    def _make_room(self, needed: int) -> None:
        for id in [each for each in self._resident if each not in self._uses]:
            if sum(self.resident().values()) + needed <= self._budget:
                return
            self._retire(id, self._resident.pop(id))

    def _retire(self, id: str, dictionary: Dictionary) -> None:
        if dictionary.nbytes > self._host_budget:
            return
        while sum(each.nbytes for each in self._host.values()) + dictionary.nbytes > (
            self._host_budget
        ):
            self._host.popitem(last=False)
        self._host[id] = dictionary.to(_HOST)
