"""Resolution: interventions checked against the model and prompt before anything runs.

Refuses what matches nothing, what does not fit its target, two value-setting operations that reach
the same scalar, and masks that leave a row nothing to attend to.
"""

from collections import defaultdict
from collections.abc import Sequence

from torch import Tensor

from services.common.addresses import Address, Shape
from services.common.errors import InvalidArgument, inside
from services.inference.engine.interventions import (
    NAMES,
    Add,
    Edit,
    Intervention,
    ProjectOut,
    SetTo,
)
from services.inference.engine.targets import (
    Widths,
    check_operation,
    is_scalar,
    pair_example,
    target_of,
)


def resolve(
    interventions: Sequence[Intervention], shape: Shape, widths: Widths, tokens: int
) -> tuple[Edit, ...]:
    """Checks and expands. Refusals carry fields such as `[i].target`."""
    edits: list[Edit] = []
    taken: dict[tuple[object, ...], int] = {}
    masked: dict[Address, dict[int, int]] = defaultdict(dict)
    for number, intervention in enumerate(interventions):
        with inside(f"[{number}]"):
            edit = _edit(intervention, shape, widths, tokens)
            if edit.sets_value:
                _claim(edit, number, taken)
            if edit.masks:
                _mask(edit.target, number, masked)
            edits.append(edit)
    return tuple(edits)


def check_target(target: Address, shape: Shape, tokens: int) -> None:
    """Raises InvalidArgument or Unimplemented unless the address can be edited."""
    shape.check(target, tokens)
    target_of(target)


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


def _mask(target: Address, number: int, masked: dict[Address, dict[int, int]]) -> None:
    """Enters a masked pair under its row; raises if nothing would be left to attend to."""
    query, key = target.position, target.key
    assert query is not None
    assert key is not None
    row = masked[target.component.at(query)]
    if key in row:
        raise InvalidArgument(
            f"{target} is already masked by interventions[{row[key]}]; keep one of the two",
            field="target",
        )
    row[key] = number
    if len(row) == query + 1:
        raise InvalidArgument(
            f"{target} is the last pair that is visible in row {target.component.at(query)}: with "
            "it masked the row has nothing to attend to; zero the row to remove its output",
            field="target",
        )


def _edit(intervention: Intervention, shape: Shape, widths: Widths, tokens: int) -> Edit:
    target, operation = intervention.target, intervention.operation
    with inside("target"):
        check_target(target, shape, tokens)
    check_operation(target, NAMES[type(operation)])
    match operation:
        case SetTo(value):
            _check_width("set", value, target, widths)
        case Add(value, relative):
            _check_width("add", value, target, widths)
            if relative and is_scalar(target):
                raise InvalidArgument(f"{target} has no length to be relative to", field="add")
        case ProjectOut(direction):
            _check_width("project_out", direction, target, widths)
    return Edit(target, _positions(intervention, tokens), operation)


def _check_width(name: str, value: float | Tensor, target: Address, widths: Widths) -> None:
    """Raises InvalidArgument unless a number meets a scalar, a vector a target of its width."""
    if isinstance(value, float):
        if not is_scalar(target):
            raise InvalidArgument(
                f"{target}: its value is a vector of width {widths.of(target)}, so it takes no "
                "single number; zero or scale it, or give a vector"
                + (f", or name one pair{pair_example(target)}" if pair_example(target) else ""),
                field=f"{name}.value",
            )
        return
    field = "set.vector" if name == "set" else f"{name}.direction"
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
