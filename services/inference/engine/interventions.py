"""Interventions: what is edited, checked against the model and prompt before anything runs.

Every operation built so far is affine: value -> factor * value + constant. `resolve` turns what a
user asked for into `Edit`s on concrete sites, and refuses what matches nothing, what does not fit
its target, and two value-setting operations that reach the same scalar. The forward pass then only
writes numbers into places that are known to exist.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from services.common.addresses import Address, Kind, Shape
from services.common.errors import InvalidArgument, Unimplemented, inside


@dataclass(frozen=True)
class Zero:
    """Value becomes 0."""


@dataclass(frozen=True)
class SetTo:
    """A scalar becomes a number, a vector becomes a vector [w]."""

    value: float | Tensor


@dataclass(frozen=True)
class Scale:
    """Value is multiplied."""

    factor: float


@dataclass(frozen=True)
class Add:
    """A number is added to a scalar, a vector [w] to a vector."""

    value: float | Tensor


Operation = Zero | SetTo | Scale | Add

RESIDUAL_KINDS = (Kind.EMBED, Kind.ATTN, Kind.MLP, Kind.RESID_MID, Kind.RESID_POST)
DICTIONARY_KINDS = (Kind.LATENT, Kind.ERROR, Kind.SKIP, Kind.BIAS)
HEAD_KINDS = (Kind.HEAD, Kind.QUERY, Kind.KEY, Kind.VALUE)


def is_scalar(target: Address) -> bool:
    """Whether the target's value is one number rather than a vector."""
    return target.kind in (Kind.NEURON, Kind.LATENT) or target.key is not None


@dataclass(frozen=True)
class Intervention:
    """A target, an operation and, for a component, where it applies (None: at every position)."""

    target: Address
    operation: Operation
    positions: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Edit:
    """An intervention on concrete sites of one prompt: value -> factor * value + constant.

    `constant` is a number for scalar targets and for 0, else a vector of the target's width.
    """

    target: Address
    positions: tuple[int, ...]
    factor: float
    constant: float | Tensor
    sets_value: bool
    """Whether the value before does not matter (ZERO and SET; not SCALE by 0)."""

    @property
    def is_scalar(self) -> bool:
        return is_scalar(self.target)

    @property
    def zeroes(self) -> bool:
        return self.sets_value and isinstance(self.constant, float) and self.constant == 0.0

    def apply(self, value: Tensor) -> Tensor:
        """Scalars [...] or vectors [..., w] -> the same, edited."""
        constant = self.constant
        if isinstance(constant, Tensor):
            constant = constant.to(value)
        if self.sets_value:
            return torch.zeros_like(value) + constant
        return self.factor * value + constant


@dataclass(frozen=True)
class Receipt:
    """What an edit really did: sites matched, norm of the change, value before and after."""

    target: Address
    sites: int
    positions: tuple[int, ...]
    applied: int
    delta_norm: float
    before: float | None = None
    after: float | None = None


@dataclass(frozen=True)
class Widths:
    """Widths of vector targets: the residual stream and a head."""

    residual: int
    head: int

    def of(self, target: Address) -> int:
        return self.head if target.kind in HEAD_KINDS else self.residual


def resolve(
    interventions: Sequence[Intervention], shape: Shape, widths: Widths, tokens: int
) -> tuple[Edit, ...]:
    """Checks and expands. Refusals carry fields such as `[i].target`."""
    edits: list[Edit] = []
    taken: dict[tuple[object, ...], int] = {}
    for number, intervention in enumerate(interventions):
        with inside(f"[{number}]"):
            edit = _edit(intervention, shape, widths, tokens)
            if edit.sets_value:
                _claim(edit, number, taken)
            edits.append(edit)
    return tuple(edits)


def check_target(target: Address, shape: Shape, tokens: int) -> None:
    """Raises InvalidArgument or Unimplemented unless the address can be edited."""
    shape.check(target, tokens)
    if target.kind in (Kind.BIAS_ATTN, Kind.BIAS_MLP):
        raise Unimplemented(f"{target}: biases cannot be edited in this version")
    if target.kind not in (Kind.NEURON, *DICTIONARY_KINDS, *HEAD_KINDS, *RESIDUAL_KINDS):
        raise InvalidArgument(f"{target} cannot be edited")


def _claim(edit: Edit, number: int, taken: dict[tuple[object, ...], int]) -> None:
    """Enters the edit's sites into `taken`; raises if another edit sets one of them already.

    A head's row covers all its pairs, so a pair is entered under its row too.
    """
    target = edit.target
    for position in edit.positions:
        site = (target.component, position)
        row_edited, pair_edited = (*site, "row"), (*site, "some pair")
        edited = row_edited if target.key is None else (*site, str(target.key))
        conflicts = [edited, pair_edited if target.key is None else row_edited]
        claims = [edited] if target.key is None else [edited, pair_edited]
        for conflict in conflicts:
            if conflict in taken:
                raise InvalidArgument(
                    f"{target} at position {position} is already set by "
                    f"interventions[{taken[conflict]}]; keep one of the two",
                    field="target",
                )
        for claim in claims:
            taken.setdefault(claim, number)


def _edit(intervention: Intervention, shape: Shape, widths: Widths, tokens: int) -> Edit:
    target = intervention.target
    with inside("target"):
        check_target(target, shape, tokens)
    positions = _positions(intervention, tokens)
    match intervention.operation:
        case Zero():
            return Edit(target, positions, 0.0, 0.0, True)
        case SetTo(value):
            _check_width("set", value, target, widths)
            return Edit(target, positions, 0.0, value, True)
        case Scale(factor):
            return Edit(target, positions, factor, 0.0, False)
        case Add(value):
            _check_width("add", value, target, widths)
            return Edit(target, positions, 1.0, value, False)


def _check_width(name: str, value: float | Tensor, target: Address, widths: Widths) -> None:
    """Raises InvalidArgument unless a number meets a scalar, a vector a target of its width."""
    if isinstance(value, float):
        if not is_scalar(target):
            raise InvalidArgument(
                f"{target}: its value is a vector of width {widths.of(target)}, so it takes no "
                f"single number; zero or scale it, or give a vector{_pair_hint(target)}",
                field=f"{name}.value",
            )
        return
    field = "set.vector" if name == "set" else "add.direction"
    if is_scalar(target):
        raise InvalidArgument(
            f"{target}: its value is one number, so it takes no vector; give value", field=field
        )
    if value.shape != (widths.of(target),):
        raise InvalidArgument(
            f"{target}: its value has width {widths.of(target)}, the vector has shape "
            f"{list(value.shape)}",
            field=field,
        )


def _pair_hint(target: Address) -> str:
    if target.kind is not Kind.HEAD:
        return ""
    position = target.position or 0
    return f", or name one pair, for example {target.component}~{position}-{position}"


def _positions(intervention: Intervention, tokens: int) -> tuple[int, ...]:
    target, positions = intervention.target, intervention.positions
    if target.position is not None:
        if positions is not None:
            raise InvalidArgument(
                f"{target} names its own position; leave positions out, or target "
                f"{target.component}",
                field="positions",
            )
        return (target.position,)
    if positions is None:
        return tuple(range(tokens))
    return tuple(sorted(positions))
