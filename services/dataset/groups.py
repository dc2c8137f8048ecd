"""Groups: the components of one kind at one place, `neuron.3`, `head.0` or `latent.D`.

A dataset's order is that of its groups (neurons by layer, heads by layer, dictionaries by id) and
within a group that of the component's index, so every component has one place in it.
"""

from dataclasses import dataclass

from services.common import addresses
from services.common.addresses import Address, Kind
from services.common.errors import InvalidArgument

_ORDER = {Kind.NEURON: 0, Kind.HEAD: 1, Kind.LATENT: 2}


@dataclass(frozen=True)
class Group:
    kind: Kind
    layer: int = -1
    """-1 for latents, whose dictionary says where they are."""
    dictionary: str = ""

    @property
    def order(self) -> tuple[int, int, str]:
        return _ORDER[self.kind], self.layer, self.dictionary

    def component(self, index: int) -> str:
        """The address of a component of this group."""
        return f"{self}.{index}"

    def __str__(self) -> str:
        return f"{self.kind.value}.{self.dictionary or self.layer}"


def of(address: Address) -> Group:
    """The group of a neuron, head or latent."""
    layer = -1 if address.layer is None else address.layer
    return Group(address.kind, layer, address.dictionary)


def parse_component(text: str) -> tuple[Group, int]:
    """A component's group and index. Raises InvalidArgument for anything that has no record."""
    address = addresses.parse(text)
    if address.is_node:
        raise InvalidArgument(
            f"{text}: records are kept for components, not for nodes; write {address.component}"
        )
    if address.kind not in _ORDER or address.index is None:
        raise InvalidArgument(
            f"{text}: records are kept for neurons, heads and latents, for example neuron.3.17, "
            "head.2.3 or latent.D.5"
        )
    return of(address), address.index


def parse(text: str) -> Group:
    """A group. Raises InvalidArgument."""
    try:
        group, _ = parse_component(f"{text}.0")
    except InvalidArgument:
        raise InvalidArgument(
            f"{text!r} is not a group of components; write one like neuron.3, head.2 or latent.D"
        ) from None
    return group
