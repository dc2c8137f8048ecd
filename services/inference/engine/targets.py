"""Targets: what each address's value is, and which operations fit it (the table of SEMANTICS 7).

Everything that depends on what a target is comes from `target_of`: whether its value is one number
or a vector, how wide the vector is, and what can be done to it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

from services.common.addresses import Address, Kind
from services.common.errors import InvalidArgument


class Value(Enum):
    """What a target's value is."""

    NUMBER = auto()
    HEAD_VECTOR = auto()
    RESIDUAL_VECTOR = auto()


@dataclass(frozen=True)
class Target:
    """What one kind of target is: in words, as a value, and the names of what fits it."""

    name: str
    value: Value
    operations: tuple[str, ...]


_ANY = ("zero", "set", "scale", "add", "mean", "patch")
_VECTOR = (*_ANY, "project_out")


def _head(name: str) -> Target:
    return Target(name, Value.HEAD_VECTOR, _VECTOR)


def _residual(name: str) -> Target:
    return Target(name, Value.RESIDUAL_VECTOR, _VECTOR)


def _write(name: str) -> Target:
    return Target(name, Value.RESIDUAL_VECTOR, ("zero", "scale"))


_PAIR = Target("a pair's attention probability", Value.NUMBER, (*_ANY, "mask"))
_TARGETS = {
    Kind.NEURON: Target("a neuron's activation", Value.NUMBER, _ANY),
    Kind.HEAD: _head("a head's output"),
    Kind.QUERY: _head("a head's query"),
    Kind.KEY: _head("a head's key"),
    Kind.VALUE: _head("a head's value vector"),
    Kind.EMBED: _residual("the embedding"),
    Kind.ATTN: _residual("the attention's write"),
    Kind.MLP: _residual("the MLP's write"),
    Kind.RESID_MID: _residual("the residual stream"),
    Kind.RESID_POST: _residual("the residual stream"),
    Kind.LATENT: Target("a latent's activation", Value.NUMBER, _ANY),
    Kind.BIAS_ATTN: _write("the attention's output bias"),
    Kind.BIAS_MLP: _write("the MLP's output bias"),
    Kind.BIAS: _write("a dictionary's bias"),
    Kind.SKIP: _write("a dictionary's skip"),
    Kind.ERROR: _write("a dictionary's error"),
}


def target_of(address: Address) -> Target:
    """The table's entry. Raises InvalidArgument for what cannot be edited."""
    if address.key is not None:
        return _PAIR
    target = _TARGETS.get(address.kind)
    if target is None:
        raise InvalidArgument(f"{address} cannot be edited")
    return target


def is_scalar(address: Address) -> bool:
    """Whether the target's value is one number rather than a vector."""
    return target_of(address).value is Value.NUMBER


def check_operation(address: Address, operation: str) -> None:
    """Raises InvalidArgument unless the operation of that name fits the target."""
    target = target_of(address)
    if operation in target.operations:
        return
    hint = ""
    if operation == "mask":
        hint = f"; mask fits a pair{pair_example(address)}"
    elif operation == "project_out":
        hint = "; project_out fits vectors, such as a head's output or the residual stream"
    raise InvalidArgument(
        f"{address} is {target.name}, which {operation} does not fit; what fits: "
        f"{_listed(target.operations)}{hint}",
        field=operation,
    )


def pair_example(address: Address) -> str:
    """`, for example head.1.0~3-0` where a pair of the head might be meant."""
    if address.kind is not Kind.HEAD:
        return ""
    position = address.position or 0
    return f", for example {address.component}~{position}-{position}"


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


@dataclass(frozen=True)
class Widths:
    """Widths of vector targets: the residual stream and a head."""

    residual: int
    head: int

    def of(self, target: Address) -> int:
        return self.head if target_of(target).value is Value.HEAD_VECTOR else self.residual
