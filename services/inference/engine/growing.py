"""Edits of a sequence that grows: which apply to the tokens of one step, and what all steps did.

With a key/value cache a step runs the new tokens only. Edits of the residual stream, of neurons, of
head outputs and of queries then act on the new positions, counted from the step's first token; a
pair's key stays an absolute position, because the keys of all tokens are there. Edits of keys and
values act where attention reads them: the cache holds what the model computed, so that an edit of a
cached position is applied at every step anew, to one query head under grouped-query attention, and
gives the same vectors every time.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

from services.common.addresses import Kind
from services.inference.engine.cancellation import CancelToken
from services.inference.engine.forward import Hooks
from services.inference.engine.interventions import Edit, Receipt

_CACHED = (Kind.KEY, Kind.VALUE)


@dataclass(frozen=True)
class StepEdits:
    """The edits of one step, as a pass over the step's tokens takes them."""

    edits: tuple[Edit, ...]
    numbers: tuple[int | None, ...]
    """Of each edit its number among all; None where it repeats what an earlier step did."""


class GrowingEdits:
    """The edits of a whole sequence, step by step."""

    def __init__(self, edits: Sequence[Edit]) -> None:
        """Positions of `edits` are those of the longest sequence."""
        self._edits = tuple(edits)
        self._receipts = [
            Receipt(edit.target, sites=0, positions=(), applied=0, delta_norm=0.0) for edit in edits
        ]

    def fill(self, hooks: Hooks, cancel: CancelToken) -> None:
        """Reads what the edits take from other runs, where that was not done yet."""
        self._edits = hooks.fill(self._edits, cancel)

    def of_step(self, start: int, end: int) -> StepEdits:
        """What applies to a step that runs tokens `start` to `end` (exclusive)."""
        edits: list[Edit] = []
        numbers: list[int | None] = []
        for number, edit in enumerate(self._edits):
            cached = edit.target.kind in _CACHED
            if cached and (before := _between(edit, 0, start)) is not None:
                edits.append(before)
                numbers.append(None)
            if (new := _between(edit, start, end)) is not None:
                edits.append(new if cached else _shifted(new, start))
                numbers.append(number)
        return StepEdits(tuple(edits), tuple(numbers))

    def record(self, step: StepEdits, receipts: Sequence[Receipt], start: int) -> None:
        """Adds what a step's pass did; `start` is its first token."""
        for edit, number, receipt in zip(step.edits, step.numbers, receipts, strict=True):
            if number is None:
                continue
            offset = 0 if edit.target.kind in _CACHED else start
            so_far = self._receipts[number]
            first = so_far.applied == 0
            self._receipts[number] = Receipt(
                target=so_far.target,
                sites=so_far.sites + receipt.sites,
                positions=so_far.positions + tuple(each + offset for each in receipt.positions),
                applied=so_far.applied + receipt.applied,
                delta_norm=math.hypot(so_far.delta_norm, receipt.delta_norm),
                before=receipt.before if first else None,
                after=receipt.after if first else None,
            )

    @property
    def receipts(self) -> tuple[Receipt, ...]:
        """What each edit did so far; an edit whose positions were not reached has no sites."""
        return tuple(self._receipts)


def _between(edit: Edit, start: int, end: int) -> Edit | None:
    """The edit at its positions in [start, end), None where it has none there."""
    first, last = (bisect_left(edit.positions, each) for each in (start, end))
    return edit.only(edit.positions[first:last]) if first < last else None


def _shifted(edit: Edit, start: int) -> Edit:
    target = edit.target
    if target.position is not None:
        target = replace(target, position=target.position - start)
    return replace(
        edit, target=target, positions=tuple(position - start for position in edit.positions)
    )
