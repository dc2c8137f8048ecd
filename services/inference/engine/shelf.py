"""The dictionaries served with a model: tested when it loads, on the device when they are used."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from services.common.addresses import DictionaryShape
from services.common.errors import InvalidArgument
from services.inference.engine.architecture import Architecture
from services.inference.engine.bound import BoundDictionary, Place, canonical
from services.inference.engine.dictionaries.self_test import Measured
from services.inference.engine.dictionaries.sites import Header, Site
from services.inference.engine.dictionaries.store import Store
from services.inference.engine.memory import Latents


@dataclass(frozen=True)
class Served:
    """A dictionary, what it was measured to do, and what results with it must say."""

    header: Header
    set_name: str
    measured: Measured | None
    warning: str = ""


class Shelf:
    """Finds dictionaries by id or set, and puts them on the device. For one model and thread."""

    def __init__(
        self, served: Iterable[Served] = (), store: Store | None = None, *, of: Architecture
    ) -> None:
        self.served = {each.header.id: each for each in served}
        self._store = store
        self._architecture = of
        self._norms: dict[str, Tensor] = {}

    @property
    def shapes(self) -> Mapping[str, DictionaryShape]:
        """What addresses may name."""
        return {
            name: DictionaryShape(each.header.latents, each.header.has_skip)
            for name, each in self.served.items()
        }

    @property
    def awaited(self) -> int:
        """Bytes of the device that dictionaries may still take."""
        return self._store.awaited if self._store else 0

    def site_of(self, name: str) -> Site:
        """Where a dictionary writes."""
        return canonical(self.served[name].header.site_out)

    def latents(self, names: Iterable[str]) -> tuple[Latents, ...]:
        """Dictionaries as the memory of a pass depends on them."""
        served = (self.served[name] for name in dict.fromkeys(names))
        return tuple(
            Latents.of(each.header, each.measured.l0 if each.measured else None) for each in served
        )

    def bind(self, names: Sequence[str]) -> list[BoundDictionary]:
        """The dictionaries of these ids on the device.

        Raises FailedPrecondition where they do not fit its budget together.
        """
        if not names:
            return []
        assert self._store is not None
        with self._store.using(names) as found:
            return [BoundDictionary(each, self._architecture, self._norms) for each in found]

    def named(self, names: Sequence[str]) -> tuple[str, ...]:
        """Ids that ids and set names stand for, in order of id.

        Raises InvalidArgument, with fields such as `[0]`, for a name that is not served and for two
        dictionaries that would stand for the same nodes.
        """
        found: dict[str, int] = {}
        for number, name in enumerate(names):
            members = [
                each.header.id
                for each in self.served.values()
                if name in (each.header.id, each.set_name)
            ]
            if not members:
                sets = sorted({each.set_name for each in self.served.values()})
                known = ", ".join(sets) or "none"
                raise InvalidArgument(
                    f"no dictionary or set {name!r} is served with this model; served: {known}",
                    field=f"[{number}]",
                )
            for member in members:
                if member in found:
                    raise InvalidArgument(f"{member!r} is named twice", field=f"[{number}]")
                found[member] = number
        self._check_places(found)
        return tuple(sorted(found))

    def _check_places(self, names: Mapping[str, int]) -> None:
        """Latents of one dictionary at most may stand for the nodes of a sublayer."""
        taken: dict[tuple[object, int], str] = {}
        for name, number in names.items():
            at = Place(self.served[name].header, self._architecture)
            if at.is_view:
                continue
            place = (at.sublayer, at.layer)
            if place in taken:
                raise InvalidArgument(
                    f"{taken[place]!r} and {name!r} both read {at.sublayer}.{at.layer}, "
                    "whose nodes only one of them can stand for; name one",
                    field=f"[{number}]",
                )
            taken[place] = name
