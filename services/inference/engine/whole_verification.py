"""Exact effects on objectives that are no function of the logits: a whole pass for every node.

`verification` goes on from a recorded pass, which has the logits at its end and little else; what a
traced node or a direction reads lies anywhere.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from services.common.errors import FailedPrecondition
from services.inference.engine import memory
from services.inference.engine.attribution import ExplainedRun, NormMode, row_of
from services.inference.engine.cancellation import CancelToken
from services.inference.engine.captured import Row
from services.inference.engine.forward import Hooks
from services.inference.engine.interventions import Receipt
from services.inference.engine.objectives import Objective
from services.inference.engine.out_of_memory import in_halves
from services.inference.engine.run_view import RunView
from services.inference.engine.verification import TOKENS_PER_CHUNK, Ablation, Verified


@dataclass(frozen=True)
class WholeVerification:
    """One run and the nodes to verify in it, in chunks."""

    value: float
    """J of the run."""
    receipts: tuple[Receipt, ...]
    chunks: tuple[tuple[Ablation, ...], ...]
    _hooks: Hooks
    _run: ExplainedRun
    _objective: Objective
    """With what it holds constant taken from the run as it is."""

    def rows(self, number: int) -> int:
        """Rows of a chunk's batch."""
        return len(self.chunks[number])

    def chunk(self, number: int, cancel: CancelToken) -> list[Verified]:
        """Measures one chunk; in halves where it runs out of memory.

        Raises FailedPrecondition (NON_FINITE), Cancelled, DeadlineExceeded, ResourceExhausted.
        """
        return in_halves(lambda some: self._measure(some, cancel), self.chunks[number])

    def _measure(self, ablations: Sequence[Ablation], cancel: CancelToken) -> list[Verified]:
        run = self._run
        rows = [Row(run.token_ids, (*run.edits, each.edit)) for each in ablations]
        current = self._hooks.run(
            rows,
            self._objective.logit_positions,
            gradients=False,
            branches=True,
            cancel=cancel,
            dictionaries=self._objective.dictionaries,
        )
        found = []
        for row, ablation in enumerate(ablations):
            value = float(self._objective.value(RunView(self._hooks.architecture, current, row)))
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
    norm_mode: NormMode,
    cancel: CancelToken,
) -> WholeVerification:
    """Runs the model as it is.

    All norms are live in the passes; `norm_mode` says how a gradient that J holds constant is made.
    Raises FailedPrecondition (NON_FINITE), Cancelled, DeadlineExceeded.
    """
    current = hooks.run(
        [row_of(hooks.architecture, run, norm_mode)],
        run.objective.logit_positions,
        gradients=run.objective.holds,
        branches=True,
        cancel=cancel,
        dictionaries=run.objective.dictionaries,
    )
    view = RunView(hooks.architecture, current, 0)
    objective = run.objective.hold(view) if run.objective.holds else run.objective
    value = float(objective.value(view).detach())
    if not math.isfinite(value):
        raise FailedPrecondition("the objective is not finite", reason="NON_FINITE")
    budget = TOKENS_PER_CHUNK.get(current.logits.device.type, 256)
    size = _rows_at_once(hooks, run, ablations, max(1, budget // len(run.token_ids)))
    chunks = tuple(
        tuple(ablations[start : start + size]) for start in range(0, len(ablations), size)
    )
    return WholeVerification(value, current.receipts(0), chunks, hooks, run, objective)


def _rows_at_once(hooks: Hooks, run: ExplainedRun, ablations: Sequence[Ablation], most: int) -> int:
    """How many rows fit into memory."""
    objective, room = run.objective, hooks.room
    batches = [
        replace(
            hooks.batch(1, len(run.token_ids), (*run.edits, edit), objective.dictionaries),
            logits=len(objective.logit_positions),
            branches=True,
        )
        for edit in memory.unlike(each.edit for each in ablations)
    ]
    row = max((memory.passed(room.sizes, batch) for batch in batches), default=1)
    return room.rows(most, row)
