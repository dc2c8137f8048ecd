"""Exact effects by real ablation: J(run) - J(run with the node at its baseline).

Every node is one forward pass with one edit more than the run's own; all norms are live and the
run's interventions stay. `begin` runs the model once as it is. The other passes are rows of batches
that go on from that one where the first of their nodes changes something; `Verification.chunk` runs
one batch, so that a caller can let others in between two of them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

from services.common.addresses import Address
from services.common.errors import FailedPrecondition
from services.inference.engine import memory
from services.inference.engine.attribution import ExplainedRun
from services.inference.engine.cancellation import CancelToken
from services.inference.engine.captured import Row
from services.inference.engine.forward import Hooks
from services.inference.engine.interventions import Edit, Receipt
from services.inference.engine.objectives import OfLogits
from services.inference.engine.out_of_memory import in_halves
from services.inference.engine.resuming import Recording, Resumed, Stage, Start, start_of

TOKENS_PER_CHUNK = {"cpu": 256, "cuda": 8192}
"""Rows times tokens of a batch: few enough that others do not wait long."""
ROWS_PER_CHUNK = 512
"""Each has logits of the whole vocabulary."""
FULL_ENOUGH = 0.4
"""Share of that from which a batch no longer takes in nodes that start in a later layer."""


@dataclass(frozen=True)
class Ablation:
    """A node or component and the edit that puts it at its baseline."""

    node: Address
    edit: Edit


@dataclass(frozen=True)
class Verified:
    """What ablating one node really did."""

    node: Address
    effect: float
    """J of the run less J with the node at its baseline."""
    value: float
    """J with the node at its baseline."""


@dataclass(frozen=True)
class Chunk:
    """Ablations run as one batch, from the first layer, stage and token that any of them changes.

    Without a start, none of them can reach J.
    """

    start: Start | None
    first: int
    ablations: tuple[Ablation, ...]


@dataclass(frozen=True)
class Verification:
    """One run and the nodes to verify in it, in chunks."""

    value: float
    """J of the run."""
    receipts: tuple[Receipt, ...]
    chunks: tuple[Chunk, ...]
    _hooks: Hooks
    _run: ExplainedRun
    _objective: OfLogits
    _recording: Recording

    def rows(self, number: int) -> int:
        """Rows of a chunk's batch."""
        return len(self.chunks[number].ablations)

    def chunk(self, number: int, cancel: CancelToken) -> list[Verified]:
        """Measures one chunk; in halves where it runs out of memory.

        Raises FailedPrecondition (NON_FINITE), Cancelled, DeadlineExceeded, ResourceExhausted.
        """
        chunk = self.chunks[number]
        start, first = chunk.start, chunk.first
        if start is None:
            return [Verified(each.node, 0.0, self.value) for each in chunk.ablations]
        return in_halves(lambda some: self._measure(some, start, first, cancel), chunk.ablations)

    def _measure(
        self, ablations: Sequence[Ablation], start: Start, first: int, cancel: CancelToken
    ) -> list[Verified]:
        current = Resumed(
            self._recording,
            start,
            (first, self._objective.position),
            [(*self._run.edits, each.edit) for each in ablations],
            cancel,
        )
        found = []
        for ablation, logits in zip(ablations, self._hooks.resume(current), strict=True):
            value = float(self._objective.of_logits(logits))
            if not math.isfinite(value):
                raise FailedPrecondition(
                    f"the objective is not finite once {ablation.node} is at its baseline",
                    reason="NON_FINITE",
                )
            found.append(Verified(ablation.node, self.value - value, value))
        return found


def begin(
    hooks: Hooks,
    run: ExplainedRun,
    ablations: Sequence[Ablation],
    cancel: CancelToken,
    tokens_per_chunk: int | None = None,
) -> Verification:
    """Runs the model as it is, and plans the rest. The objective is one of the logits.

    Raises FailedPrecondition (NON_FINITE), Cancelled, DeadlineExceeded.
    """
    own = len(run.edits)
    filled = hooks.fill([*run.edits, *(each.edit for each in ablations)], cancel)
    run = replace(run, edits=filled[:own])
    ablations = [
        replace(each, edit=edit) for each, edit in zip(ablations, filled[own:], strict=True)
    ]
    objective = run.objective
    assert isinstance(objective, OfLogits)
    position = objective.position
    recording = hooks.record(Row(run.token_ids, run.edits), [position], cancel=cancel)
    value = float(objective.of_logits(recording.logits[0, 0]))
    if not math.isfinite(value):
        raise FailedPrecondition("the objective is not finite", reason="NON_FINITE")
    budget = tokens_per_chunk or TOKENS_PER_CHUNK.get(recording.logits.device.type, 256)
    starts = [start_of(each.edit.target, hooks.shelf.site_of) for each in ablations]
    rows = _rows_at_once(hooks, run, ablations)
    chunks = _chunks(ablations, starts, position, len(recording.neurons), budget, rows)
    return Verification(value, recording.receipts(0), chunks, hooks, run, objective, recording)


def _rows_at_once(
    hooks: Hooks, run: ExplainedRun, ablations: Sequence[Ablation]
) -> Callable[[int], int]:
    """How many rows fit into memory, by the first token that is run."""
    sizes, tokens = hooks.room.sizes, run.objective.position + 1
    each = [
        hooks.batch(1, tokens, (*run.edits, edit))
        for edit in memory.unlike(ablation.edit for ablation in ablations)
    ]
    held = memory.recorded(sizes, len(run.token_ids))

    @cache
    def rows(first: int) -> int:
        row = max(memory.resumed(sizes, batch, first) for batch in each)
        return hooks.room.rows(ROWS_PER_CHUNK, row, held)

    return rows


def _chunks(
    ablations: Sequence[Ablation],
    starts: Sequence[Start],
    position: int,
    layers: int,
    budget: int,
    rows_at_once: Callable[[int], int],
) -> tuple[Chunk, ...]:
    """Batches of nodes that start close to each other, earlier layers first.

    J is read at `position`; whatever changes only later tokens, or only others after the last
    attention, does not reach it.
    """
    placed: list[tuple[Start, int, Ablation]] = []
    unreached: list[Ablation] = []
    for ablation, start in zip(ablations, starts, strict=True):
        positions = ablation.edit.positions
        if start >= Start(layers - 1, Stage.HEADS):
            positions = tuple(each for each in positions if each == position)
        first = min(positions, default=position + 1)
        if first > position:
            unreached.append(ablation)
        else:
            placed.append((start, first, ablation))
    placed.sort(key=lambda each: each[:2])
    chunks = [Chunk(None, position, tuple(unreached))] if unreached else []
    batch: list[tuple[Start, int, Ablation]] = []
    for each in placed:
        if batch and _is_full([*batch, each], position, budget, rows_at_once):
            chunks.append(_chunk(batch))
            batch = []
        batch.append(each)
    return (*chunks, *([_chunk(batch)] if batch else []))


def _is_full(
    batch: Sequence[tuple[Start, int, Ablation]],
    position: int,
    budget: int,
    rows_at_once: Callable[[int], int],
) -> bool:
    """Whether the last of the batch would better begin another."""
    *others, (start, _, _) = batch
    first = min(first for _, first, _ in batch)
    width = position + 1 - first
    if len(batch) > rows_at_once(first) or len(batch) * width > budget:
        return True
    return others[-1][0].layer != start.layer and len(others) * width >= FULL_ENOUGH * budget


def _chunk(batch: Sequence[tuple[Start, int, Ablation]]) -> Chunk:
    return Chunk(batch[0][0], min(first for _, first, _ in batch), tuple(each[2] for each in batch))
