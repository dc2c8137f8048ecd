"""The node table: one forward, one backward, every column of every node (SEMANTICS 4 and 5).

`explain` runs prompts as rows of one padded batch and asks autograd once for the
gradients of all activations at once. What comes back is one `Explanation` per run, which knows all
its nodes and its remainder rows; `tables.build` lists the top k of them.
"""

import math
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto

import torch
from torch import Tensor

from services.common.addresses import Address, Kind
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
from services.inference.engine.decomposition import Standing, View, decompose, dot
from services.inference.engine.direct_path import DirectPath, direct_path, head_path, through
from services.inference.engine.forward import Hooks
from services.inference.engine.interventions import Edit, Receipt
from services.inference.engine.objectives import Constant, EditedVectors, Objective
from services.inference.engine.run_view import RunView, before_post_norm


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
class Outcome:
    """What is left of an explanation once its table is made: no tensors."""

    value: float
    """J."""
    remainder: dict[str, float]
    views: tuple[View, ...]
    notices: tuple[str, ...]
    receipts: tuple[Receipt, ...]


@dataclass(frozen=True)
class Explanation:
    """One run's objective, nodes and remainder."""

    value: float
    """J."""
    groups: tuple[NodeGroup, ...]
    """In address order: embeddings, heads by layer, neurons by layer."""
    remainder: dict[str, float]
    """Direct effect of each bias, of what dictionaries leave, of the objective's constants and of
    the rest."""
    views: tuple[View, ...]
    logits: Tensor
    """[V] at the objective's position."""
    notices: tuple[str, ...]
    """Sentences about J that its reader must see."""
    captured: Pass
    row: int
    """Which row of the captured batch this run is."""

    @property
    def receipts(self) -> tuple[Receipt, ...]:
        return self.captured.receipts(self.row)

    @property
    def outcome(self) -> Outcome:
        return Outcome(self.value, self.remainder, self.views, self.notices, self.receipts)


@dataclass(frozen=True)
class StageTimes:
    """Milliseconds."""

    forward: float
    backward: float

    def __add__(self, other: "StageTimes") -> "StageTimes":
        return StageTimes(self.forward + other.forward, self.backward + other.backward)


def explain(
    hooks: Hooks,
    architecture: Architecture,
    runs: Sequence[ExplainedRun],
    norm_modes: Sequence[NormMode],
    cancel: CancelToken,
    dictionaries: Sequence[str] = (),
) -> tuple[tuple[Explanation, ...], StageTimes]:
    """Forward and backward of all runs in one batch, each in its own norm mode.

    `dictionaries` names those whose latents stand in the tables.

    Raises FailedPrecondition (reason NON_FINITE), Cancelled, DeadlineExceeded.
    """
    rows = [
        replace(row_of(architecture, run, mode), logits_at=run.objective.logit_positions)
        for run, mode in zip(runs, norm_modes, strict=True)
    ]
    read = (*dictionaries, *(each for run in runs for each in run.objective.dictionaries))
    current = hooks.run(rows, (), gradients=True, cancel=cancel, dictionaries=read)
    standing = Standing([current.sites.found[name].bound for name in dictionaries])
    views = [RunView(architecture, current, row) for row in range(len(runs))]
    started = time.perf_counter()
    objectives = [run.objective.hold(view) for run, view in zip(runs, views, strict=True)]
    values = [each.value(view) for each, view in zip(objectives, views, strict=True)]
    readings = [
        _Reading.of(view, objective) for view, objective in zip(views, objectives, strict=True)
    ]
    gradients = _Gradients.take(current, torch.stack(values).sum(), readings, standing)
    backward = (time.perf_counter() - started) * 1e3
    explanations = tuple(
        _explanation(view, gradients, reading, standing, float(value.detach()))
        for view, reading, value in zip(views, readings, values, strict=True)
    )
    return explanations, StageTimes(current.forward_ms, backward)


def held(hooks: Hooks, run: ExplainedRun, norm_mode: NormMode, cancel: CancelToken) -> Objective:
    """The run's objective with what it holds constant taken from a pass of it, which is over."""
    objective = run.objective
    if not objective.holds:
        return objective
    current = hooks.run(
        [row_of(hooks.architecture, run, norm_mode)],
        objective.logit_positions,
        gradients=True,
        cancel=cancel,
        dictionaries=objective.dictionaries,
    )
    return objective.hold(RunView(hooks.architecture, current, 0))


def row_of(architecture: Architecture, run: ExplainedRun, norm_mode: NormMode) -> Row:
    """The run as a row of a batch, the norms held constant that its objective looks through."""
    everything = norm_mode is NormMode.ALL_NORMS_FROZEN
    reading = run.objective.reading_norms(architecture)
    return Row(
        token_ids=run.token_ids,
        edits=run.edits,
        final_norm_frozen=everything,
        block_norms_frozen=everything,
        frozen_norms=frozenset() if norm_mode is NormMode.LIVE else reading,
    )


@dataclass(frozen=True)
class _Reading:
    """What one run's objective reads: the tensors between x_ref and J."""

    objective: Objective
    point: Address
    reference: Tensor
    """[B, T, d]"""
    constants: tuple[Constant, ...]
    edited: tuple[EditedVectors, ...]

    @classmethod
    def of(cls, view: RunView, objective: Objective) -> "_Reading":
        return cls(
            objective,
            objective.point(view.architecture),
            objective.reference(view),
            objective.constants(view),
            objective.edited(view),
        )

    @property
    def tensors(self) -> list[Tensor]:
        constants = [each.at for each in self.constants]
        return [self.reference, *constants, *(each.at for each in self.edited)]


class _Gradients:
    """G of what a pass captured. Rows of the batch do not mix: J is summed over them."""

    def __init__(self, found: dict[int, Tensor]) -> None:
        self._found = found

    @classmethod
    def take(
        cls,
        current: Pass,
        objective: Tensor,
        readings: Sequence["_Reading"],
        standing: Standing,
    ) -> "_Gradients":
        wanted = [current.embed]
        for layer, (site, neurons) in enumerate(
            zip(current.attention, current.neurons, strict=True)
        ):
            if not standing.of(Kind.MLP, layer):
                wanted.append(neurons)
            if not standing.of(Kind.ATTN, layer):
                wanted += [site.probabilities, *([] if site.edited is None else [site.edited])]
        wanted += [write.after for write in current.experts.values()]
        wanted += [current.sites.found[bound.id].after for bound in standing.dictionaries]
        for reading in readings:
            wanted += reading.tensors
        distinct = {id(tensor): tensor for tensor in wanted}
        if not objective.requires_grad:  # J depends on nothing, as where no path leads to it
            taken = tuple(torch.zeros_like(tensor) for tensor in distinct.values())
        else:
            # Where edits cut every path (all heads of a layer zeroed, say) the gradient is zero.
            taken = torch.autograd.grad(objective, list(distinct.values()), materialize_grads=True)
        return cls(dict(zip(distinct, taken, strict=True)))

    def of(self, tensor: Tensor) -> Tensor:
        """The gradient at one of the tensors that were asked for."""
        return self._found[id(tensor)]

    def of_used_probabilities(self, site: AttentionSite, row: int) -> Tensor:
        """[H, T, T]: G of the probabilities that the row's values were summed with."""
        if row in site.edited_rows and site.edited is not None:
            return self.of(site.edited)[site.edited_rows.index(row)]
        return self.of(site.probabilities)[row]


def _explanation(
    view: RunView, gradients: _Gradients, reading: _Reading, standing: Standing, value: float
) -> Explanation:
    architecture, current, row, length = view.architecture, view.captured, view.row, view.tokens
    reads, applied, itself = reading.objective.reads, view.edits, reading.objective.itself
    reference = reading.reference[row, :length].detach()
    gradient = gradients.of(reading.reference)[row, :length]
    path = direct_path(
        gradient,
        reading.point,
        applied,
        len(architecture.layers),
        before_edits=reading.objective.before_edits,
    )
    embed_gradient = gradients.of(current.embed)[row, :length]
    groups: list[NodeGroup] = [
        EmbedNodes(
            current.embed[row, :length].detach(),
            embed_gradient,
            written=current.embed_before[row, :length],
            read=path.embed,
        )
    ]
    for index, (layer, site) in enumerate(zip(architecture.layers, current.attention, strict=True)):
        if standing.of(Kind.ATTN, index):
            continue
        probabilities = site.used(row)[:, :length, :length]
        values = site.values_per_head(row)[:, :length]
        edits = [edit for edit in applied if edit.target.layer == index]
        met = before_post_norm(view, path, Kind.ATTN, index)
        heads = head_path(met, reads, layer.w_o, values, probabilities, edits, path.edits)
        grads = gradients.of_used_probabilities(site, row)[:, :length, :length]
        if itself is not None and itself.layer == index:
            grads = grads.clone()
            grads[itself.index, itself.position, itself.key] += 1
        scale = view.post_norm_scale(Kind.ATTN, index)
        groups.append(HeadNodes(index, layer, probabilities, grads, values, scale, heads, reads))
    latents = decompose(
        view,
        standing,
        path,
        {
            bound.id: gradients.of(current.sites.found[bound.id].after)
            for bound in standing.dictionaries
        },
        reads,
    )
    groups += latents.groups
    for nodes in latents.groups:
        if itself is not None and nodes.dictionary == itself.dictionary:
            nodes.is_itself_the_objective(itself)
    for index, layer in enumerate(architecture.layers):
        if standing.of(Kind.MLP, index):
            continue
        if layer.experts:
            write = current.experts[index]
            groups.append(
                ExpertsNodes(
                    index,
                    write.after[row, :length].detach(),
                    gradients.of(write.after)[row, :length],
                    written=write.before[row, :length],
                    read=path.mlp[index],
                )
            )
            continue
        neurons = current.neurons[index]
        groups.append(
            NeuronNodes(
                index,
                layer,
                neurons[row, :length].detach(),
                gradients.of(neurons)[row, :length],
                view.post_norm_scale(Kind.MLP, index),
                before_post_norm(view, path, Kind.MLP, index),
                reads,
            )
        )
    constants: float = sum(
        dot(each.vector, gradients.of(each.at)[row].reshape(-1, len(each.vector)).sum(0))
        for each in reading.constants
    )
    between = _edits_between(reading, gradients, row, length)
    remainder = _bias_rows(view, path, standing) | latents.remainder
    for node, effect in (*path.edits.items(), *between.items()):
        remainder[f"edit.{node}"] = remainder.get(f"edit.{node}", 0.0) + effect
    remainder["bias.read"] = constants
    remainder["rest"] = value - dot(reference, gradient) - constants - sum(between.values())
    _require_finite(value, remainder, embed_gradient)
    return Explanation(
        value,
        tuple(groups),
        remainder,
        tuple(latents.views),
        view.logits(reading.objective.position).detach(),
        reading.objective.notices,
        current,
        row,
    )


def _edits_between(
    reading: _Reading, gradients: _Gradients, row: int, length: int
) -> dict[Address, float]:
    """Direct effects of what edits add between x_ref and J, by the edited node."""
    rows: dict[Address, float] = defaultdict(float)
    for each in reading.edited:
        gradient = gradients.of(each.at)[row, each.head, :length]
        for edit in reversed(each.edits):
            gradient = through(edit, edit.target, gradient, rows)
    return rows


def _bias_rows(view: RunView, path: DirectPath, standing: Standing) -> dict[str, float]:
    """Direct effect of the output biases and of the post-norms', summed over tokens, where no
    dictionary's own bias row holds them."""
    rows: dict[str, float] = {}
    for index, layer in enumerate(view.architecture.layers):
        for bias, sublayer, met in (
            (Kind.BIAS_ATTN, Kind.ATTN, path.attention[index]),
            (Kind.BIAS_MLP, Kind.MLP, path.mlp[index]),
        ):
            scale = view.post_norm_scale(sublayer, index)
            write = layer.bias_write(bias, scale)
            bound = standing.of(sublayer, index)
            held = bound is not None and bound.site.contains_bias
            behind = held and bound is not None and not bound.passes_post_norm
            if write is None or behind:
                continue
            edited = view.captured.edited_biases.get((bias, index))
            if edited is not None:
                write = edited[view.row, : view.tokens].detach()
            own = layer.output_bias(bias)
            if held and own is not None and scale is not None:
                write = write - own / scale  # which the dictionary's bias row has
            rows[f"{bias.value}.{index}"] = dot(write.expand_as(met), met)
    return rows


def _require_finite(value: float, remainder: dict[str, float], embed_gradient: Tensor) -> None:
    if not all(map(math.isfinite, (value, *remainder.values()))):
        raise FailedPrecondition("the objective is not finite", reason="NON_FINITE")
    if not torch.isfinite(embed_gradient).all():
        raise FailedPrecondition(
            "the gradient of the objective at the embeddings is not finite", reason="NON_FINITE"
        )
