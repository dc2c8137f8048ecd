"""The node table: one forward, one backward, every column of every node (SEMANTICS 4 and 5).

`explain` runs one or two prompts as rows of one padded batch and asks autograd once for the
gradients of all activations at once. What comes back is one `Explanation` per run, which knows all
its nodes and its remainder rows; `tables.build` lists the top k of them.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

import torch
from torch import Tensor

from services.common.errors import FailedPrecondition
from services.inference.engine.architecture import Architecture
from services.inference.engine.cancellation import CancelToken
from services.inference.engine.captured import AttentionSite, Pass, Row
from services.inference.engine.columns import (
    EmbedNodes,
    ExpertsNodes,
    HeadNodes,
    NeuronNodes,
    NodeGroup,
)
from services.inference.engine.direct_path import DirectPath, direct_path, head_path
from services.inference.engine.forward import Hooks
from services.inference.engine.interventions import Edit, Receipt
from services.inference.engine.objectives import Objective


class NormMode(Enum):
    FINAL_NORM_FROZEN = auto()
    ALL_NORMS_FROZEN = auto()
    LIVE = auto()


@dataclass(frozen=True)
class ExplainedRun:
    """A prompt, its edits and what is explained about it."""

    token_ids: tuple[int, ...]
    edits: tuple[Edit, ...]
    objective: Objective


@dataclass(frozen=True)
class Explanation:
    """One run's objective, nodes and remainder."""

    value: float
    """J."""
    groups: tuple[NodeGroup, ...]
    """In address order: embeddings, heads by layer, neurons by layer."""
    remainder: dict[str, float]
    """Direct effect of each bias, of the objective's constants and of the rest."""
    logits: Tensor
    """[V] at the objective's position."""
    captured: Pass
    row: int
    """Which row of the captured batch this run is."""

    @property
    def receipts(self) -> tuple[Receipt, ...]:
        return self.captured.receipts(self.row)


@dataclass(frozen=True)
class StageTimes:
    """Milliseconds."""

    forward: float
    backward: float


def explain(
    hooks: Hooks,
    architecture: Architecture,
    runs: Sequence[ExplainedRun],
    norm_mode: NormMode,
    cancel: CancelToken,
) -> tuple[tuple[Explanation, ...], StageTimes]:
    """Forward and backward of all runs in one batch.

    Raises FailedPrecondition (reason NON_FINITE), Cancelled, DeadlineExceeded.
    """
    rows = [
        Row(
            token_ids=run.token_ids,
            edits=run.edits,
            final_norm_frozen=norm_mode is not NormMode.LIVE,
            block_norms_frozen=norm_mode is NormMode.ALL_NORMS_FROZEN,
        )
        for run in runs
    ]
    positions = sorted({run.objective.position for run in runs})
    current = hooks.run(rows, positions, gradients=True, cancel=cancel)
    logits = [
        current.logits[row, positions.index(run.objective.position)] for row, run in enumerate(runs)
    ]
    objectives = [run.objective.value(row) for run, row in zip(runs, logits, strict=True)]
    started = time.perf_counter()
    gradients = _Gradients.take(current, torch.stack(objectives).sum())
    backward = (time.perf_counter() - started) * 1e3
    explanations = tuple(
        _explanation(architecture, current, gradients, row, run, objectives[row], logits[row])
        for row, run in enumerate(runs)
    )
    return explanations, StageTimes(current.forward_ms, backward)


@dataclass(frozen=True)
class _Gradients:
    """G of everything a pass captured. Rows of the batch do not mix: J is summed over them."""

    embed: Tensor
    final_input: Tensor
    final_output: Tensor
    logits: Tensor
    probabilities: tuple[Tensor, ...]
    edited: tuple[Tensor | None, ...]
    experts: dict[int, Tensor]
    neurons: tuple[Tensor, ...]

    @classmethod
    def take(cls, current: Pass, objective: Tensor) -> "_Gradients":
        single = (current.embed, current.final_input, current.final_output, current.logits)
        probabilities = [site.probabilities for site in current.attention]
        edited = [site.edited for site in current.attention if site.edited is not None]
        experts = [write.after for write in current.experts.values()]
        wanted = [*single, *probabilities, *edited, *experts, *current.neurons]
        # Where edits cut every path (all heads of a layer zeroed, say) the gradient is zero.
        taken = iter(torch.autograd.grad(objective, wanted, materialize_grads=True))
        embed, final_input, final_output, logits = (next(taken) for _ in single)
        of_probabilities = tuple(next(taken) for _ in probabilities)
        of_edited = tuple(
            None if site.edited is None else next(taken) for site in current.attention
        )
        of_experts = {layer: next(taken) for layer in current.experts}
        return cls(
            embed,
            final_input,
            final_output,
            logits,
            of_probabilities,
            of_edited,
            of_experts,
            tuple(taken),
        )

    def of_used_probabilities(self, layer: int, site: AttentionSite, row: int) -> Tensor:
        """[H, T, T]: G of the probabilities that the row's values were summed with."""
        edited = self.edited[layer]
        if row in site.edited_rows and edited is not None:
            return edited[site.edited_rows.index(row)]
        return self.probabilities[layer][row]


def _explanation(
    architecture: Architecture,
    current: Pass,
    gradients: _Gradients,
    row: int,
    run: ExplainedRun,
    objective: Tensor,
    logits: Tensor,
) -> Explanation:
    length = len(run.token_ids)
    reads = (run.objective.position,)
    reference = current.final_input[row, :length].detach()
    gradient = gradients.final_input[row, :length]
    applied = current.applied(row)
    path = direct_path(gradient, applied, len(architecture.layers))
    groups: list[NodeGroup] = [
        EmbedNodes(
            current.embed[row, :length].detach(),
            gradients.embed[row, :length],
            written=current.embed_before[row, :length],
            read=path.embed,
        )
    ]
    for index, (layer, site) in enumerate(zip(architecture.layers, current.attention, strict=True)):
        probabilities = site.used(row)[:, :length, :length]
        values = site.values_per_head(row)[:, :length]
        edits = [edit for edit in applied if edit.target.layer == index]
        scale = _scale_of(current.attn_scale[index], row, length)
        met = path.attention[index] if scale is None else path.attention[index] / scale
        heads = head_path(met, reads, layer.w_o, values, probabilities, edits, path.edits)
        grads = gradients.of_used_probabilities(index, site, row)[:, :length, :length]
        groups.append(HeadNodes(index, layer, probabilities, grads, values, scale, heads, reads))
    for index, layer in enumerate(architecture.layers):
        if layer.experts:
            write = current.experts[index]
            groups.append(
                ExpertsNodes(
                    index,
                    write.after[row, :length].detach(),
                    gradients.experts[index][row, :length],
                    written=write.before[row, :length],
                    read=path.mlp[index],
                )
            )
            continue
        scale = _scale_of(current.mlp_scale[index], row, length)
        groups.append(
            NeuronNodes(
                index,
                layer,
                current.neurons[index][row, :length].detach(),
                gradients.neurons[index][row, :length],
                scale,
                path.mlp[index] if scale is None else path.mlp[index] / scale,
                reads,
            )
        )
    value = float(objective.detach())
    constants = _dot(architecture.final_norm.bias, gradients.final_output[row].sum(0))
    if architecture.unembed_bias is not None:
        constants += _dot(architecture.unembed_bias, gradients.logits[row].sum(0))
    explained = _dot(reference, gradient)
    remainder = _bias_rows(architecture, current, row, path)
    remainder.update({f"edit.{node}": effect for node, effect in path.edits.items()})
    remainder["bias.read"] = constants
    remainder["rest"] = value - explained - constants
    _require_finite(value, remainder, gradients.embed[row, :length])
    return Explanation(value, tuple(groups), remainder, logits.detach(), current, row)


def _scale_of(scales: Tensor | None, row: int, length: int) -> Tensor | None:
    """[T, 1]: scale of a post-norm in one row, None where there is no post-norm."""
    return None if scales is None else scales[row, :length]


def _bias_rows(
    architecture: Architecture, current: Pass, row: int, path: DirectPath
) -> dict[str, float]:
    """Direct effect of the output biases and of the post-norms', summed over tokens."""
    rows: dict[str, float] = {}
    for index, layer in enumerate(architecture.layers):
        for name, met, scales, bias, post_norm in (
            (
                f"bias.attn.{index}",
                path.attention[index],
                current.attn_scale[index],
                layer.b_o,
                layer.attn_post_norm,
            ),
            (
                f"bias.mlp.{index}",
                path.mlp[index],
                current.mlp_scale[index],
                layer.b_out,
                None if layer.experts else layer.mlp_post_norm,  # there the whole write is a node
            ),
        ):
            scale = _scale_of(scales, row, len(met))
            if bias is not None:
                before = met if scale is None else met / scale
                rows[name] = _dot(bias, before.sum(0))
            if post_norm is not None and post_norm.bias.any():
                rows[name] = rows.get(name, 0.0) + _dot(post_norm.bias, met.sum(0))
    return rows


def _dot(left: Tensor, right: Tensor) -> float:
    return float((left.double() * right.double()).sum())


def _require_finite(value: float, remainder: dict[str, float], embed_gradient: Tensor) -> None:
    if not all(map(math.isfinite, (value, *remainder.values()))):
        raise FailedPrecondition("the objective is not finite", reason="NON_FINITE")
    if not torch.isfinite(embed_gradient).all():
        raise FailedPrecondition(
            "the gradient of the objective at the embeddings is not finite", reason="NON_FINITE"
        )
