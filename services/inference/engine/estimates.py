"""Estimated total effects (x - x0) . G(x) of any nodes and components, in one forward and backward.

Each value x becomes x0 + w (x - x0) with a weight w = 1 of its own, which changes nothing; the
derivative of J by w is the estimate, summed over the positions of a component. So it needs no
formula per kind of target: whatever can be edited can be estimated.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from services.inference.engine import memory
from services.inference.engine.attribution import ExplainedRun, NormMode, held, row_of
from services.inference.engine.cancellation import CancelToken
from services.inference.engine.forward import Hooks
from services.inference.engine.interventions import Edit
from services.inference.engine.numerics import precise
from services.inference.engine.out_of_memory import in_halves
from services.inference.engine.run_view import RunView

AT_ONCE = 512
"""Nodes estimated in one pass, so that others do not wait long."""


@dataclass(frozen=True)
class _Weighted(Edit):
    """Moves a value along the line from its baseline, which `baseline` sets, to itself."""

    weight: Tensor = field(kw_only=True)
    baseline: Edit = field(kw_only=True)

    @property
    def zeroes(self) -> bool:
        return False

    def only(self, positions: Sequence[int]) -> Edit:
        return replace(self, positions=tuple(positions), baseline=self.baseline.only(positions))

    def apply(self, value: Tensor) -> Tensor:
        start = self.baseline.apply(value)
        return start + self.weight.to(value) * (value - start)


def estimate(
    hooks: Hooks,
    run: ExplainedRun,
    baselines: Sequence[Edit],
    norm_mode: NormMode,
    cancel: CancelToken,
) -> list[float]:
    """The estimate of each target, where `baselines` has the edits that put them at x0; in halves
    where they run out of memory together.

    Raises FailedPrecondition (NON_FINITE), Cancelled, DeadlineExceeded, ResourceExhausted.
    """
    if not baselines:
        return []
    return in_halves(lambda some: _estimate(hooks, run, some, norm_mode, cancel), baselines)


def parts(hooks: Hooks, run: ExplainedRun, baselines: Sequence[Edit]) -> Iterator[slice]:
    """Which targets are estimated together: as many as fit into memory."""
    costly = sorted(baselines, key=lambda edit: -len(edit.positions))[:AT_ONCE]
    names = run.objective.dictionaries

    def needed(targets: int) -> int:
        edits = (*run.edits, *costly[:targets])
        batch = replace(
            hooks.batch(1, len(run.token_ids), edits, names),
            gradients=True,
            logits=len(run.objective.logit_positions),
        )
        return memory.passed(hooks.room.sizes, batch)

    size = max(1, hooks.room.most(needed, AT_ONCE, hooks.room.of_chunk))
    for first in range(0, len(baselines), size):
        yield slice(first, first + size)


def _estimate(
    hooks: Hooks,
    run: ExplainedRun,
    baselines: Sequence[Edit],
    norm_mode: NormMode,
    cancel: CancelToken,
) -> list[float]:
    baselines = hooks.fill(baselines, cancel)
    weights = torch.ones(len(baselines), requires_grad=True)
    moved = [
        _Weighted(edit.target, edit.positions, edit.operation, weight=weight, baseline=edit)
        for edit, weight in zip(baselines, weights.unbind(), strict=True)
    ]
    objective = held(hooks, run, norm_mode, cancel)
    row = row_of(hooks.architecture, run, norm_mode)
    current = hooks.run(
        [replace(row, edits=(*run.edits, *moved))],
        objective.logit_positions,
        gradients=True,
        cancel=cancel,
        dictionaries=objective.dictionaries,
    )
    value = objective.value(RunView(hooks.architecture, current, 0))
    (gradient,) = torch.autograd.grad(value, weights, materialize_grads=True)
    found: list[float] = precise(gradient).tolist()
    return found
