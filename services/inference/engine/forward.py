"""The forward pass: rows of a right-padded batch, each with its own edits, captured at every site.

Hooks are registered once per model and do nothing until a `Pass` is current. A pass holds what it
captured as tensors of one autograd graph whose only leaf is the embedding output: parameters never
require gradients. Right padding needs no mask: causality keeps pads out of every real token.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from services.common.addresses import Kind
from services.common.errors import FailedPrecondition
from services.inference.engine import attention, norms
from services.inference.engine.architecture import Architecture
from services.inference.engine.cancellation import CancelToken
from services.inference.engine.interventions import Edit, Receipt


@dataclass(frozen=True)
class Row:
    """One prompt of a batch.

    `final_norm_frozen` and `block_norms_frozen` say whose scale is constant in the backward pass.
    """

    token_ids: tuple[int, ...]
    edits: tuple[Edit, ...] = ()
    final_norm_frozen: bool = False
    block_norms_frozen: bool = False


@dataclass
class AttentionSite:
    """One layer's attention in one pass. Rows with edits have probabilities of their own."""

    probabilities: Tensor
    """[B, H, T, T] as query, key: post-softmax, before edits."""
    values: Tensor
    """[B, Hk, T, dh], bias included."""
    edited_rows: tuple[int, ...] = ()
    edited: Tensor | None = None
    """[edited rows, H, T, T]: the probabilities that the values were summed with."""

    def used(self, row: int) -> Tensor:
        """[H, T, T]: the probabilities the row's values were summed with."""
        if row in self.edited_rows:
            assert self.edited is not None
            return self.edited[self.edited_rows.index(row)]
        return self.probabilities[row]


@dataclass
class Pass:
    """One forward pass and what it captured."""

    rows: Sequence[Row]
    gradients: bool
    cancel: CancelToken
    embed: Tensor = field(init=False)
    """[B, T, d]: input of the first block; the leaf of the graph."""
    attention: list[AttentionSite] = field(default_factory=list)
    neurons: list[Tensor] = field(default_factory=list)
    """Per layer [B, T, F], after edits."""
    final_input: Tensor = field(init=False)
    """[B, T, d]: the residual stream after the last block."""
    final_output: Tensor = field(init=False)
    """[B, T, d]: output of the final norm."""
    logits: Tensor = field(init=False)
    """[B, P, V] at the positions asked for."""
    forward_ms: float = 0.0
    _receipts: dict[tuple[int, int], Receipt] = field(default_factory=dict)

    def receipts(self, row: int) -> tuple[Receipt, ...]:
        """What each of the row's edits did, in order. Raises KeyError if one was never applied."""
        return tuple(self._receipts[row, number] for number in range(len(self.rows[row].edits)))

    def edits_at(self, layer: int, kind: Kind) -> Iterator[tuple[int, int, Edit]]:
        """(row, number within the row, edit) of every edit of this kind in the layer."""
        for row, spec in enumerate(self.rows):
            for number, edit in enumerate(spec.edits):
                if edit.layer == layer and edit.target.kind is kind:
                    yield row, number, edit

    def edit_neurons(self, layer: int, activations: Tensor) -> Tensor:
        """Applies the layer's neuron edits to [B, T, F] and captures the result."""
        edits = list(self.edits_at(layer, Kind.NEURON))
        if edits:
            activations = activations.clone()
        for row, number, edit in edits:
            positions = list(edit.positions)
            before = activations[row, positions, edit.index].detach().clone()
            activations[row, positions, edit.index] = edit.value
            after = activations[row, positions, edit.index].detach()
            self._record(row, number, edit, before, after)
        self.neurons.append(activations)
        return activations

    def edit_attention(
        self, layer: int, values: Tensor, output: Tensor, probabilities: Tensor
    ) -> Tensor:
        """Applies the layer's pair and row edits and captures the attention.

        values [B, Hk, T, dh], output [B, T, H, dh], probabilities [B, H, T, T] -> output.
        """
        site = AttentionSite(probabilities, values)
        self.attention.append(site)
        edits = list(self.edits_at(layer, Kind.HEAD))
        if not edits:
            return output
        site.edited_rows = tuple(sorted({row for row, _, _ in edits}))
        rows = list(site.edited_rows)
        edited = probabilities[rows]
        for row, _, edit in edits:
            keys = slice(None) if edit.key is None else edit.key
            edited[rows.index(row), edit.index, list(edit.positions), keys] = edit.value
        site.edited = edited
        groups = probabilities.shape[1] // values.shape[1]
        summed = edited @ values[rows].repeat_interleave(groups, dim=1)
        summed = summed.transpose(1, 2).to(output.dtype)
        for row, number, edit in edits:
            positions = list(edit.positions)
            if edit.key is None:
                before = output[row, positions, edit.index].detach()
                after = summed[rows.index(row), positions, edit.index].detach()
            else:
                before = probabilities[row, edit.index, positions, edit.key].detach()
                after = edited[rows.index(row), edit.index, positions, edit.key].detach()
            self._record(row, number, edit, before, after)
        return output.index_copy(0, torch.tensor(rows, device=output.device), summed)

    def _record(self, row: int, number: int, edit: Edit, before: Tensor, after: Tensor) -> None:
        single = edit.is_scalar and len(edit.positions) == 1
        self._receipts[row, number] = Receipt(
            target=edit.target,
            sites=len(edit.positions),
            positions=edit.positions,
            applied=len(edit.positions),
            delta_norm=float(torch.linalg.vector_norm((after - before).double())),
            before=float(before.item()) if single else None,
            after=float(after.item()) if single else None,
        )


class _LayerTap:
    """Reports one layer's attention to the current pass."""

    def __init__(self, hooks: "Hooks", layer: int) -> None:
        self._hooks = hooks
        self._layer = layer

    def attention(self, value: Tensor, output: Tensor, probabilities: Tensor) -> Tensor:
        current = self._hooks.current
        if current is None:
            return output
        return current.edit_attention(self._layer, value, output, probabilities)


class Hooks:
    """The hooks of one model. Used by one thread; `current` is the pass that runs now."""

    def __init__(self, model: PreTrainedModel, architecture: Architecture) -> None:
        self._model = model
        self._architecture = architecture
        self.current: Pass | None = None
        self._taps = [_LayerTap(self, index) for index in range(len(architecture.layers))]
        for index, layer in enumerate(architecture.layers):
            attention.tap(layer.attention, self._taps[index])
            layer.block.register_forward_pre_hook(partial(self._enter_block, index))
            layer.mlp_down.register_forward_pre_hook(partial(self._enter_mlp_down, index))
            for norm in layer.norms:
                norm.module.register_forward_hook(partial(self._leave_block_norm, norm))
        architecture.final_norm.module.register_forward_hook(self._leave_final_norm)

    def run(
        self,
        rows: Sequence[Row],
        positions: Sequence[int],
        *,
        gradients: bool,
        cancel: CancelToken | None = None,
    ) -> Pass:
        """Runs the model over the rows; logits at `positions` (of every row).

        Raises FailedPrecondition (reason NON_FINITE) where a value is not finite, Cancelled and
        DeadlineExceeded from the token.
        """
        started = time.perf_counter()
        current = Pass(rows, gradients, cancel or CancelToken())
        device = self._architecture.final_norm.gain.device
        longest = max(len(row.token_ids) for row in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        for index, row in enumerate(rows):
            ids[index, : len(row.token_ids)] = torch.tensor(row.token_ids)
        with self._running(current), torch.set_grad_enabled(gradients):
            output = self._model(
                input_ids=ids.to(device),
                logits_to_keep=torch.tensor(list(positions), device=device),
                use_cache=False,
            )
        current.logits = output.logits
        self._check_captured(current)
        current.forward_ms = (time.perf_counter() - started) * 1e3
        return current

    @contextmanager
    def _running(self, current: Pass) -> Iterator[None]:
        self.current = current
        try:
            yield
        finally:
            self.current = None

    def _check_captured(self, current: Pass) -> None:
        layers = len(self._architecture.layers)
        if (len(current.attention), len(current.neurons)) != (layers, layers):
            raise RuntimeError(
                f"captured attention in {len(current.attention)} and neurons in "
                f"{len(current.neurons)} of {layers} layers: a hook was bypassed"
            )
        for index, row in enumerate(current.rows):
            current.receipts(index)
            length = len(row.token_ids)
            if torch.isfinite(current.final_input[index, :length]).all():
                continue
            where = self._first_non_finite(current, index, length)
            raise FailedPrecondition(
                f"the model's numbers overflow: {where} is not finite; look for an intervention "
                "that sets a very large value",
                reason="NON_FINITE",
            )
        if not torch.isfinite(current.logits).all():
            raise FailedPrecondition(
                "the model's numbers overflow: the logits are not finite", reason="NON_FINITE"
            )

    @staticmethod
    def _first_non_finite(current: Pass, row: int, length: int) -> str:
        for layer, (site, neurons) in enumerate(
            zip(current.attention, current.neurons, strict=True)
        ):
            if not torch.isfinite(site.used(row)[:, :length, :length]).all():
                return f"attn.{layer}"
            if not torch.isfinite(neurons[row, :length]).all():
                return f"mlp.{layer}"
        return f"resid_post.{len(current.neurons) - 1}"

    def _enter_block(
        self, layer: int, module: torch.nn.Module, args: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...] | None:
        current = self.current
        if current is None:
            return None
        current.cancel.check()
        hidden = args[0]
        if layer > 0:
            if hidden.requires_grad:
                hidden.register_hook(  # type: ignore[no-untyped-call]
                    partial(_check_cancel, current.cancel)
                )
            return None
        current.embed = hidden.detach().requires_grad_(current.gradients)
        return (current.embed, *args[1:])

    def _enter_mlp_down(
        self, layer: int, module: torch.nn.Module, args: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...] | None:
        if self.current is None:
            return None
        return (self.current.edit_neurons(layer, args[0]), *args[1:])

    def _leave_block_norm(
        self, norm: norms.Norm, module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor
    ) -> Tensor | None:
        current = self.current
        if current is None or not current.gradients:
            return None
        frozen = tuple(row.block_norms_frozen for row in current.rows)
        return norms.hold_scale(norm, args[0], output, frozen)

    def _leave_final_norm(
        self, module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor
    ) -> Tensor | None:
        current = self.current
        if current is None:
            return None
        current.final_input = args[0]
        if current.gradients:
            frozen = tuple(row.final_norm_frozen for row in current.rows)
            output = norms.hold_scale(self._architecture.final_norm, args[0], output, frozen)
        current.final_output = output
        return output


def _check_cancel(cancel: CancelToken, gradient: Tensor) -> None:
    cancel.check()
