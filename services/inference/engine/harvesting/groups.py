"""Groups of components that are harvested together: `neuron.L`, `head.L`, `latent.D`."""

from collections.abc import Sequence
from dataclasses import dataclass

from services.common.addresses import Kind, Shape
from services.common.errors import InvalidArgument
from services.common.harvest import bins, reading
from services.common.harvest.state import Keep

KINDS = {"neuron": Kind.NEURON, "head": Kind.HEAD, "latent": Kind.LATENT}


@dataclass(frozen=True)
class Group:
    """All components of one kind in one layer or dictionary."""

    kind: Kind
    layer: int | None
    dictionary: str
    components: int
    window: int | None = None
    """Of heads: how many keys a query has at most."""

    def __str__(self) -> str:
        place = self.dictionary if self.kind is Kind.LATENT else self.layer
        return f"{self.kind.value}.{place}"

    def places(self, tokens: int) -> int:
        """How many activations a component has on a sequence."""
        return reading.pairs(tokens, self.window) if self.kind is Kind.HEAD else tokens

    def bytes(self, keep: Keep, sequences: int, longest: int, tokens: int) -> int:
        """Bytes of the running state: `tokens` are those whose activations are summed."""
        numbers = 0
        for kept in ("top", "random", "strata"):
            capacity = keep.capacity(kept)
            if kept != "strata":
                capacity = min(capacity, sequences)
            numbers += capacity * (4 * self.places(longest) + 8)
            if kept == "random":
                numbers += capacity * 12
        tables = tokens * 8 * (1 + (self.kind is Kind.HEAD))
        limits = 4 * (bins.BINS - bins.FIRST_POSITIVE) + 4
        own = numbers + limits + 2 * (8 * bins.BINS + 4) + 6 * 8 + tables
        return self.components * own + 3 * 8 * tokens


def parse(text: str, shape: Shape) -> Group:
    """The group of that name. Raises InvalidArgument where the model has none."""
    word, _, place = text.partition(".")
    kind = KINDS.get(word)
    if kind is None:
        raise InvalidArgument(
            f"{text[:60]!r} names no group of components; write neuron.L, head.L or latent.D"
        )
    if kind is Kind.LATENT:
        dictionary = shape.dictionaries.get(place)
        if dictionary is None:
            loaded = ", ".join(sorted(shape.dictionaries)) or "none"
            raise InvalidArgument(f"no dictionary {place[:60]!r} is loaded; loaded: {loaded}")
        return Group(kind, None, place, dictionary.latents)
    numbers = {str(layer): layer for layer in range(shape.layers)}
    if place not in numbers:
        raise InvalidArgument(
            f"{text[:60]!r}: layer {place[:40]!r} does not exist; valid is 0..{shape.layers - 1}"
        )
    layer = numbers[place]
    if kind is Kind.HEAD:
        window = shape.windows[layer] if shape.windows else None
        return Group(kind, layer, "", shape.heads, window)
    if layer in shape.experts:
        raise InvalidArgument(
            f"{text}: the MLP of layer {layer} is a mixture of experts, which has no neurons"
        )
    return Group(kind, layer, "", shape.neurons)


def all_of(texts: Sequence[str], shape: Shape) -> tuple[Group, ...]:
    """The groups of these names. Raises InvalidArgument with fields such as `[0]`."""
    found: dict[Group, int] = {}
    for number, text in enumerate(texts):
        try:
            group = parse(text, shape)
        except InvalidArgument as refused:
            raise InvalidArgument(refused.message, field=f"[{number}]") from None
        if group in found:
            raise InvalidArgument(f"{group} is named twice; name it once", field=f"[{number}]")
        found[group] = number
    return tuple(found)
