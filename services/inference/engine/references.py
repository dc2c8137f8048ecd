"""References: what MEAN and PATCH take from other runs, read before the run that takes it.

A value is read by an edit that changes nothing, appended to the other run's own: it stands at the
very place where an edit of the same target would, after everything that was done there. All values
wanted of one run are read in one pass, several runs share a batch, and no gradient is kept.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor

from services.inference.engine.captured import Pass, Row
from services.inference.engine.interventions import Borrow, Edit, Read, Reading, SetTo, SourceRun

TOKENS_PER_BATCH = 1024
"""Rows times tokens of a batch of reference runs."""


def fill(
    edits: Sequence[Sequence[Edit]],
    run: Callable[[Sequence[Row]], Pass],
    fits: Callable[[Sequence[SourceRun]], bool],
) -> list[tuple[Edit, ...]]:
    """The edits of each of several runs with every borrowed value in its place. `run` runs rows
    of a batch; `fits` says of some of them whether memory is enough."""
    wanted: dict[SourceRun, dict[Reading, None]] = {}
    for edit in chain.from_iterable(edits):
        if isinstance(edit.operation, Borrow):
            for reading in edit.operation.readings:
                wanted.setdefault(reading.run, {})[reading] = None
    values: dict[Reading, Tensor] = {}
    for batch in _batches(list(wanted), fits):
        rows = [
            Row(
                source.token_ids,
                (
                    *source.edits,
                    *(Edit(each.target, each.positions, Read()) for each in wanted[source]),
                ),
            )
            for source in batch
        ]
        current = run(rows)
        for row, source in enumerate(batch):
            for number, reading in enumerate(wanted[source], len(source.edits)):
                values[reading] = current.read(row, number)
    return [tuple(_filled(edit, values) for edit in of_run) for of_run in edits]


def _batches(
    sources: list[SourceRun], fits: Callable[[Sequence[SourceRun]], bool]
) -> Iterator[list[SourceRun]]:
    """Runs of similar length together."""
    batch: list[SourceRun] = []
    for source in sorted(sources, key=lambda each: len(each.token_ids)):
        tokens = (len(batch) + 1) * len(source.token_ids)
        if batch and (tokens > TOKENS_PER_BATCH or not fits([*batch, source])):
            yield batch
            batch = []
        batch.append(source)
    if batch:
        yield batch


def _filled(edit: Edit, values: dict[Reading, Tensor]) -> Edit:
    borrow = edit.operation
    if not isinstance(borrow, Borrow):
        return edit
    found = [values[each] for each in borrow.readings]
    if not borrow.pooled:
        return replace(edit, operation=SetTo(torch.stack(found).mean(0)))
    mean = torch.cat(found).mean(0)
    return replace(edit, operation=SetTo(float(mean) if edit.is_scalar else mean))
