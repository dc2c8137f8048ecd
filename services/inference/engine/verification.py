"""Exact effects by real ablation: J(run) - J(run with the node at its baseline).

Every node is one forward pass with one edit more than the run's own; all norms are live and the
run's interventions stay. Passes are rows of batches. `begin` runs the model once as it is;
`Verification.chunk` measures some nodes, so that a caller can let others in between two chunks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from services.common.addresses import Address
from services.common.errors import FailedPrecondition
from services.inference.engine.attribution import ExplainedRun
from services.inference.engine.cancellation import CancelToken
from services.inference.engine.captured import Pass, Row
from services.inference.engine.forward import Hooks
from services.inference.engine.interventions import Edit, Receipt

TOKENS_PER_CHUNK = 512


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
class Verification:
    """One run and the nodes to verify in it, in chunks."""

    value: float
    """J of the run."""
    receipts: tuple[Receipt, ...]
    chunks: tuple[tuple[Ablation, ...], ...]
    _hooks: Hooks
    _run: ExplainedRun

    def chunk(self, number: int, cancel: CancelToken) -> list[Verified]:
        """Measures one chunk.

        Raises FailedPrecondition (NON_FINITE), Cancelled, DeadlineExceeded.
        """
        ablations = self.chunks[number]
        run = self._run
        rows = [Row(run.token_ids, (*run.edits, each.edit)) for each in ablations]
        current = self._hooks.run(rows, [run.objective.position], gradients=False, cancel=cancel)
        found = []
        for row, ablation in enumerate(ablations):
            value = float(_objective(run, current, row))
            if not math.isfinite(value):
                raise FailedPrecondition(
                    f"the objective is not finite once {ablation.node} is at its baseline",
                    reason="NON_FINITE",
                )
            found.append(Verified(ablation.node, self.value - value, value))
        return found


def begin(
    hooks: Hooks, run: ExplainedRun, ablations: Sequence[Ablation], cancel: CancelToken
) -> Verification:
    """Runs the model as it is.

    Raises FailedPrecondition (NON_FINITE), Cancelled, DeadlineExceeded.
    """
    current = hooks.run(
        [Row(run.token_ids, run.edits)], [run.objective.position], gradients=False, cancel=cancel
    )
    value = float(_objective(run, current, 0))
    if not math.isfinite(value):
        raise FailedPrecondition("the objective is not finite", reason="NON_FINITE")
    size = max(1, TOKENS_PER_CHUNK // len(run.token_ids))
    chunks = tuple(
        tuple(ablations[start : start + size]) for start in range(0, len(ablations), size)
    )
    return Verification(value, current.receipts(0), chunks, hooks, run)


def _objective(run: ExplainedRun, current: Pass, row: int) -> Tensor:
    return run.objective.value(current.logits[row, 0])
