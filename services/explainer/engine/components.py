"""What is known of one component: its examples, and what it promotes.

The classes have the names of the dataset service's records, so that a servicer only copies. Corpus
text comes from strangers: it is data here, and `prompts.py` is where it meets a model.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from services.common.addresses import Kind, parse
from services.common.errors import InvalidArgument, inside

ACTIVE_SHARE = 0.1
"""An example activates a component when its peak is above this share of the largest one known."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """A sequence of T tokens and a neuron's or latent's activation at each, in its own units."""

    token_texts: tuple[str, ...]
    activations: tuple[float, ...]
    document_id: str = ""
    document_offset: int | None = None
    token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check(self.token_texts, self.token_ids, self.activations, len(self.token_texts))

    @property
    def peak(self) -> float:
        return max(self.activations)

    @property
    def peak_position(self) -> int:
        return self.activations.index(self.peak)

    def cut(self, start: int, stop: int) -> "Example":
        """The tokens start..stop-1."""
        return replace(
            self,
            token_texts=self.token_texts[start:stop],
            token_ids=self.token_ids[start:stop],
            activations=self.activations[start:stop],
            document_offset=None if self.document_offset is None else self.document_offset + start,
        )


@dataclass(frozen=True)
class Pair:
    """How strongly an attention head moves something from token `key` to token `query`."""

    query: int
    key: int
    value: float


@dataclass(frozen=True, kw_only=True)
class HeadExample:
    """A sequence of T tokens and a head's activation at each pair of them.

    `pair_activations` is the lower triangle row by row: for query q, its keys
    max(0, q - pair_width + 1)..q; without `pair_width` all keys 0..q.
    """

    token_texts: tuple[str, ...]
    pair_activations: tuple[float, ...]
    pair_width: int | None = None
    document_id: str = ""
    document_offset: int | None = None
    token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        width = self.pair_width
        if width is not None and not 1 <= width <= len(self.token_texts):
            raise InvalidArgument(
                f"must be in 1..{len(self.token_texts)}, or absent", field="pair_width"
            )
        _check(self.token_texts, self.token_ids, self.pair_activations, len(self.places[0]))

    @property
    def places(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The query and the key of each pair, in the order of `pair_activations`."""
        query, key = np.tril_indices(len(self.token_texts))
        if self.pair_width is not None:
            visible = query - key < self.pair_width
            query, key = query[visible], key[visible]
        return query, key

    def pairs(self, places: Sequence[int]) -> tuple[Pair, ...]:
        """The pairs that stand at these places of `pair_activations`."""
        query, key = self.places
        return tuple(
            Pair(int(query[place]), int(key[place]), self.pair_activations[place])
            for place in places
        )

    @property
    def peak(self) -> float:
        return max(self.pair_activations)

    @property
    def strongest(self) -> Pair:
        """The first pair with the largest activation."""
        return self.pairs([self.pair_activations.index(self.peak)])[0]


@dataclass(frozen=True)
class TextScore:
    """Display text with a number: logits per unit of activation."""

    text: str
    score: float


@dataclass(frozen=True, kw_only=True)
class Component:
    """A neuron, latent or head with its examples, each once, in any order.

    `max_activation` is the largest over the corpus; absent, the largest of the examples counts.
    """

    address: str
    examples: tuple[Example, ...] | tuple[HeadExample, ...]
    promoted: tuple[TextScore, ...] = ()
    suppressed: tuple[TextScore, ...] = ()
    max_activation: float | None = None

    def __post_init__(self) -> None:
        with inside("address"):
            address = parse(self.address)
            kind = address.kind
            if kind not in (Kind.NEURON, Kind.LATENT, Kind.HEAD) or address.is_node:
                raise InvalidArgument("only neurons, latents and heads have explanations")
        wanted = HeadExample if kind is Kind.HEAD else Example
        for number, example in enumerate(self.examples):
            if not isinstance(example, wanted):
                raise InvalidArgument(
                    f"a {kind.value} has a {wanted.__name__}", field=f"examples[{number}]"
                )

    @property
    def kind(self) -> Kind:
        return parse(self.address).kind

    @property
    def is_head(self) -> bool:
        return self.kind is Kind.HEAD

    @property
    def scale(self) -> float:
        """What activations are divided by: the largest, or 0 where nothing is positive."""
        peaks = [example.peak for example in self.examples]
        if self.max_activation is not None:
            peaks.append(self.max_activation)
        return max([*peaks, 0.0])


def keyed(seed: int, *parts: str) -> int:
    """A number in 0..2^64-1 drawn by `seed` and `parts`: the same always, and for all orders."""
    hashed = hashlib.sha256(repr((seed, parts)).encode(errors="surrogatepass")).digest()
    return int.from_bytes(hashed[:8], "big")


def _check(
    texts: tuple[str, ...], ids: tuple[int, ...], values: tuple[float, ...], wanted: int
) -> None:
    if not texts:
        raise InvalidArgument("an example has at least one token", field="token_texts")
    if ids and len(ids) != len(texts):
        raise InvalidArgument(
            f"has {len(ids)} ids for {len(texts)} tokens: give all or none", field="token_ids"
        )
    if len(values) != wanted:
        raise InvalidArgument(
            f"has {len(values)} values where {wanted} belong", field="activations"
        )
    if not all(map(math.isfinite, values)):
        raise InvalidArgument("has values that are not finite", field="activations")
