"""Interventions: what is edited, checked against the model and prompt before anything runs.

`resolve` turns what a user asked for into `Edit`s on concrete sites, and refuses what matches
nothing, what does not fit its target, and two value-setting operations that reach the same scalar.
The forward pass then only writes numbers into places that are known to exist.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from services.common.addresses import Address, Kind, Shape
from services.common.errors import InvalidArgument, Unimplemented, inside


@dataclass(frozen=True)
class Zero:
    """Value becomes 0."""


@dataclass(frozen=True)
class SetValue:
    """A scalar becomes `value`."""

    value: float


Operation = Zero | SetValue


@dataclass(frozen=True)
class Intervention:
    """A target, an operation and, for a component, where it applies (None: at every position)."""

    target: Address
    operation: Operation
    positions: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Edit:
    """An intervention on concrete sites of one prompt: the value at `positions` becomes `value`.

    `target` is a neuron, a head's pair (`key` set) or a head's rows.
    """

    target: Address
    layer: int
    index: int
    positions: tuple[int, ...]
    key: int | None
    value: float

    @property
    def is_scalar(self) -> bool:
        """Whether the target's value is one number rather than a vector."""
        return self.target.kind is Kind.NEURON or self.key is not None


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


def resolve(interventions: Sequence[Intervention], shape: Shape, tokens: int) -> tuple[Edit, ...]:
    """Checks and expands. Refusals carry fields such as `[i].target`."""
    edits: list[Edit] = []
    taken: dict[tuple[object, ...], int] = {}
    for number, intervention in enumerate(interventions):
        with inside(f"[{number}]"):
            edit = _edit(intervention, shape, tokens)
            _claim(edit, number, taken)
            edits.append(edit)
    return tuple(edits)


def _claim(edit: Edit, number: int, taken: dict[tuple[object, ...], int]) -> None:
    """Enters the edit's scalars into `taken`; raises if another edit sets one of them already.

    A head's row covers all its pairs, so a pair is entered under its row too.
    """
    for position in edit.positions:
        site = (edit.target.kind, edit.layer, edit.index, position)
        row_edited, pair_edited = (*site, "row"), (*site, "some pair")
        edited = row_edited if edit.key is None else (*site, str(edit.key))
        conflicts = [edited, pair_edited if edit.key is None else row_edited]
        claims = [edited] if edit.key is None else [edited, pair_edited]
        for conflict in conflicts:
            if conflict in taken:
                raise InvalidArgument(
                    f"{edit.target} at position {position} is already set by "
                    f"interventions[{taken[conflict]}]; keep one of the two",
                    field="target",
                )
        for claim in claims:
            taken.setdefault(claim, number)


def _edit(intervention: Intervention, shape: Shape, tokens: int) -> Edit:
    target, operation = intervention.target, intervention.operation
    with inside("target"):
        shape.check(target, tokens)
        if target.kind not in (Kind.NEURON, Kind.HEAD):
            raise Unimplemented(
                f"{target}: only neurons and attention heads can be edited in this version"
            )
    assert target.layer is not None
    assert target.index is not None
    vector = target.kind is Kind.HEAD and target.key is None
    if vector and isinstance(operation, SetValue):
        row = target.position if target.is_node else 0
        raise InvalidArgument(
            f"{target}: a head's output is a vector, so it cannot be set to one number; zero it, "
            f"or set one pair, for example {target.component}~{row}-0",
            field="set.value",
        )
    return Edit(
        target=target,
        layer=target.layer,
        index=target.index,
        positions=_positions(intervention, tokens),
        key=target.key,
        value=operation.value if isinstance(operation, SetValue) else 0.0,
    )


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
    if not positions:
        raise InvalidArgument("at least one position is required", field="positions")
    if len(set(positions)) != len(positions):
        raise InvalidArgument("a position is listed twice", field="positions")
    for position in positions:
        if not 0 <= position < tokens:
            raise InvalidArgument(
                f"position {position} does not exist; valid is 0..{tokens - 1}", field="positions"
            )
    return tuple(sorted(positions))
