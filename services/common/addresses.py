"""Addresses: the one text form of every component and node (SEMANTICS section 2).

An address is a selector. A part that is not understood, or that names nothing, is an error, never
dropped: dropping it would give a real number of the right shape for the wrong thing.

    neuron.3.17         a component            neuron.3.17~5      the node at token 5
    head.2.3            an attention head      head.2.3~13        its row at query token 13
                                               head.2.3~13-1      the pair query 13, key 1

`parse` reads text into an `Address`; `str(address)` is its one canonical spelling; `Shape.check`
says whether an address names something in a given model and prompt.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from services.common.errors import InvalidArgument


class Kind(StrEnum):
    """What an address names; the value is its first word(s)."""

    EMBED = "embed"
    HEAD = "head"
    QUERY = "head.q"
    KEY = "head.k"
    VALUE = "head.v"
    NEURON = "neuron"
    LATENT = "latent"
    ATTN = "attn"
    MLP = "mlp"
    RESID_PRE = "resid_pre"
    RESID_MID = "resid_mid"
    RESID_POST = "resid_post"
    BIAS_ATTN = "bias.attn"
    BIAS_MLP = "bias.mlp"
    BIAS = "bias"
    SKIP = "skip"
    ERROR = "error"


_VECTORS = {"q": Kind.QUERY, "k": Kind.KEY, "v": Kind.VALUE}
_LAYERED = {
    "attn": Kind.ATTN,
    "mlp": Kind.MLP,
    "resid_pre": Kind.RESID_PRE,
    "resid_mid": Kind.RESID_MID,
    "resid_post": Kind.RESID_POST,
}
_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")
_DICTIONARY = re.compile(r"[A-Za-z0-9_-]+")
_EXAMPLES = "for example neuron.3.17~5, head.2.3~13-1 (query 13 reads key 1) or embed~4"


@dataclass(frozen=True)
class Address:
    """A component, or with `position` (and `key` for a head's pair) a node.

    `index` is the head, neuron or latent.
    """

    kind: Kind
    layer: int | None = None
    index: int | None = None
    dictionary: str = ""
    position: int | None = None
    key: int | None = None

    @property
    def is_node(self) -> bool:
        return self.position is not None

    @property
    def component(self) -> "Address":
        return replace(self, position=None, key=None)

    def at(self, position: int, key: int | None = None) -> "Address":
        return replace(self, position=position, key=key)

    def __str__(self) -> str:
        match self.kind:
            case Kind.QUERY | Kind.KEY | Kind.VALUE:
                name = f"head.{self.layer}.{self.index}.{self.kind.value[-1]}"
            case Kind.LATENT:
                name = f"latent.{self.dictionary}.{self.index}"
            case Kind.BIAS | Kind.SKIP | Kind.ERROR:
                name = f"{self.kind.value}.{self.dictionary}"
            case _:
                parts = (self.kind.value, self.layer, self.index)
                name = ".".join(str(part) for part in parts if part is not None)
        if self.position is None:
            return name
        pair = "" if self.key is None else f"-{self.key}"
        return f"{name}~{self.position}{pair}"


def parse(text: str) -> Address:
    """Reads an address. Raises InvalidArgument that names the part that is wrong.

    `resid_pre.L` comes back as its canonical `resid_post.(L-1)`, `resid_pre.0` as `embed`.
    """
    if not text:
        raise InvalidArgument(f"an address is required, {_EXAMPLES}")
    if len(text) > 200:
        raise InvalidArgument(f"an address has at most 200 characters, this has {len(text)}")
    component, tilde, place = text.partition("~")
    address = _canonical(_component(component, text))
    if not tilde:
        return address
    return _node(address, place, text)


def _component(component: str, text: str) -> Address:
    match component.split("."):
        case ["embed"]:
            return Address(Kind.EMBED)
        case ["head", layer, head]:
            return Address(Kind.HEAD, _number(layer, "layer", text), _number(head, "head", text))
        case ["head", layer, head, vector] if vector in _VECTORS:
            kind = _VECTORS[vector]
            return Address(kind, _number(layer, "layer", text), _number(head, "head", text))
        case ["neuron", layer, neuron]:
            index = _number(neuron, "neuron", text)
            return Address(Kind.NEURON, _number(layer, "layer", text), index)
        case ["latent", dictionary, latent] if _DICTIONARY.fullmatch(dictionary):
            return Address(
                Kind.LATENT, index=_number(latent, "latent", text), dictionary=dictionary
            )
        case [word, layer] if word in _LAYERED:
            return Address(_LAYERED[word], _number(layer, "layer", text))
        case ["bias", ("attn" | "mlp") as sublayer, layer]:
            return Address(Kind(f"bias.{sublayer}"), _number(layer, "layer", text))
        case [("bias" | "skip" | "error") as word, dictionary] if _DICTIONARY.fullmatch(dictionary):
            return Address(Kind(word), dictionary=dictionary)
    raise InvalidArgument(f"{_quote(text)} is not an address; write one like {_EXAMPLES}")


def _canonical(address: Address) -> Address:
    if address.kind is not Kind.RESID_PRE or address.layer is None:
        return address
    if address.layer == 0:
        return Address(Kind.EMBED)
    return Address(Kind.RESID_POST, address.layer - 1)


def _node(address: Address, place: str, text: str) -> Address:
    position, dash, key = place.partition("-")
    if not position:
        raise InvalidArgument(
            f"{_quote(text)}: token positions count from 0 and are never negative or empty"
        )
    if dash and address.kind is not Kind.HEAD:
        raise InvalidArgument(
            f"{_quote(text)}: only a head has query-key pairs; write {address.component}~{position}"
        )
    if not dash:
        return address.at(_number(position, "token position", text))
    query_position = _number(position, "query position", text)
    key_position = _number(key, "key position", text)
    if key_position > query_position:
        raise InvalidArgument(
            f"{_quote(text)}: key {key_position} lies after query {query_position}, so the pair is "
            f"masked; the key must be in 0..{query_position}"
        )
    return address.at(query_position, key_position)


def _number(digits: str, part: str, text: str) -> int:
    if _NUMBER.fullmatch(digits):
        return int(digits)
    raise InvalidArgument(
        f"{_quote(text)}: the {part} {_quote(digits)} is not a number; it counts from 0, without "
        "sign or leading zeros"
    )


def _quote(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


@dataclass(frozen=True)
class DictionaryShape:
    """What exists in a dictionary."""

    latents: int
    has_skip: bool


@dataclass(frozen=True)
class Shape:
    """What exists in a model: the ranges that addresses are checked against."""

    layers: int
    heads: int
    neurons: int
    windows: tuple[int | None, ...] = ()
    """Per layer: how many tokens a query reads at most, itself included; None or no entry: all."""
    experts: frozenset[int] = frozenset()
    """Layers whose MLP is a mixture of experts and has no neurons."""
    parallel: bool = False
    """Attention and MLP of a layer read the same residual stream: no `resid_mid` exists."""
    without_bias: frozenset[tuple[Kind, int]] = frozenset()
    """Biases (`Kind.BIAS_ATTN` or `Kind.BIAS_MLP`, layer) that do not exist."""

    dictionaries: Mapping[str, "DictionaryShape"] = field(default_factory=dict)
    """What exists in each dictionary, by id."""

    def first_visible(self, layer: int, query: int) -> int:
        """The first key that a query token of the layer reads."""
        window = self.windows[layer] if self.windows else None
        return 0 if window is None else max(0, query - window + 1)

    def check(self, address: Address, tokens: int | None = None) -> None:
        """Raises InvalidArgument with the valid range unless `address` names something here.

        With `tokens`, positions are checked against a prompt of that many tokens.
        """
        if address.dictionary:
            self._check_dictionary(address)
        self._in_range(address, "layer", address.layer, self.layers)
        if address.kind is Kind.NEURON:
            if address.layer in self.experts:
                raise InvalidArgument(
                    f"{address}: the MLP of layer {address.layer} is a mixture of experts, which "
                    f"has no neurons; its finest node is mlp.{address.layer}"
                )
            self._in_range(address, "neuron", address.index, self.neurons)
        elif address.index is not None and address.kind is not Kind.LATENT:
            self._in_range(address, "head", address.index, self.heads)
        if address.layer is not None and (address.kind, address.layer) in self.without_bias:
            raise InvalidArgument(f"{address}: this sublayer of the model adds no bias")
        if address.kind is Kind.RESID_MID and self.parallel:
            raise InvalidArgument(
                f"{address}: attention and MLP of this model's layers read the same residual "
                f"stream, so there is no resid_mid; resid_post.0..{self.layers - 1} exist"
            )
        if tokens is not None:
            self._in_range(address, "token position", address.position, tokens)
        self._check_visible(address)

    def _check_visible(self, address: Address) -> None:
        layer, query, key = address.layer, address.position, address.key
        if layer is None or query is None or key is None:
            return
        first = self.first_visible(layer, query)
        if key < first:
            raise InvalidArgument(
                f"{address}: key {key} lies outside layer {layer}'s sliding window of "
                f"{self.windows[layer]} tokens, so the pair is masked; the key must be in "
                f"{first}..{query}"
            )

    def _check_dictionary(self, address: Address) -> None:
        dictionary = self.dictionaries.get(address.dictionary)
        if dictionary is None:
            loaded = ", ".join(sorted(self.dictionaries)) or "none"
            raise InvalidArgument(
                f"{address}: no dictionary {address.dictionary!r} is loaded; loaded: {loaded}"
            )
        self._in_range(address, "latent", address.index, dictionary.latents)
        if address.kind is Kind.SKIP and not dictionary.has_skip:
            raise InvalidArgument(
                f"{address}: dictionary {address.dictionary!r} has no skip connection"
            )

    @staticmethod
    def _in_range(address: Address, part: str, value: int | None, count: int) -> None:
        if value is not None and value >= count:
            raise InvalidArgument(
                f"{address}: {part} {value} does not exist; valid is 0..{count - 1}"
            )
