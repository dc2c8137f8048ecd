"""Baselines: x0 of all nodes of a run, which their effects are measured from.

x0 is 0, or comes from other runs: the mean over reference prompts position by position, or the
values of one run at the aligned tokens. Of single targets that is what MEAN and PATCH set; here it
is read for whole sublayers at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from services.common.addresses import Kind
from services.inference.engine import memory
from services.inference.engine.cancellation import CancelToken
from services.inference.engine.captured import Pass, Row
from services.inference.engine.forward import Hooks
from services.inference.engine.interventions import Edit, Mean, Patch
from services.inference.engine.sublayers import Sublayer, sublayers

TOKENS_PER_BATCH = 1024
"""Rows times tokens of a batch of reference runs."""


@dataclass(frozen=True)
class Reference:
    """Runs whose mean is x0, each with its edits, and which of their tokens stands for which.

    `aligned` has the position in the reference runs of every position of the run that is measured.
    """

    runs: tuple[tuple[tuple[int, ...], tuple[Edit, ...]], ...]
    aligned: tuple[int, ...]


@dataclass(frozen=True)
class Baseline:
    """What effects are measured from where that is not 0."""

    operation: Mean | Patch
    """What puts a single target at x0."""
    reference: Reference | None
    """The same for all nodes at once; None where some of them have no x0."""


def starts(
    hooks: Hooks, reference: Reference, cancel: CancelToken, dictionaries: Sequence[str] = ()
) -> dict[Sublayer, Tensor]:
    """x0 of all nodes, shaped like x: [T, d], [H, T, T], [T, F], and [T, N] of dictionaries.

    A pair whose counterpart is masked there has 0, its probability.
    """
    found: dict[Sublayer, Tensor] = {}
    for batch in _batches(reference, hooks, dictionaries):
        rows = [Row(token_ids, edits) for token_ids, edits in batch]
        current = hooks.run(rows, [0], gradients=False, cancel=cancel, dictionaries=dictionaries)
        for row, (token_ids, _) in enumerate(batch):
            latents = (Sublayer(Kind.LATENT, None, name) for name in dictionaries)
            for sublayer in (*sublayers(current), *latents):
                values = _values(sublayer, current, row, len(token_ids))
                aligned = _aligned(sublayer, values, reference.aligned) / len(reference.runs)
                found[sublayer] = found[sublayer] + aligned if sublayer in found else aligned
    return found


def _values(sublayer: Sublayer, current: Pass, row: int, tokens: int) -> Tensor:
    if not sublayer.dictionary:
        return sublayer.values(current, row, tokens)
    site = current.sites.found[sublayer.dictionary]
    return site.values(row, site.clean(row, tokens))


def _batches(
    reference: Reference, hooks: Hooks, dictionaries: Sequence[str]
) -> list[Sequence[tuple[tuple[int, ...], tuple[Edit, ...]]]]:
    """Few enough together that they are no more than the pass with gradients that went before."""
    longest = max(len(token_ids) for token_ids, _ in reference.runs)
    edits = max((edits for _, edits in reference.runs), key=len)
    row = memory.passed(hooks.room.sizes, hooks.batch(1, longest, edits, dictionaries))
    size = hooks.room.rows(max(1, TOKENS_PER_BATCH // longest), 2 * row)
    runs = reference.runs
    return [runs[first : first + size] for first in range(0, len(runs), size)]


def _aligned(sublayer: Sublayer, values: Tensor, aligned: Sequence[int]) -> Tensor:
    at = torch.tensor(aligned, device=values.device)
    if sublayer.kind is Kind.HEAD:
        return values[:, at][:, :, at]
    return values[at]
