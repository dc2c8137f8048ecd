"""The forward pass: rows of a right-padded batch, each with its own edits, captured at every site.

Hooks are registered once per model and do nothing until a `Pass` is current. A pass holds what it
captured as tensors of one autograd graph whose only leaf is the embedding output: parameters never
require gradients. Right padding needs no mask: causality keeps pads out of every real token.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from services.common.addresses import Kind
from services.common.errors import FailedPrecondition
from services.inference.engine import attention, norms
from services.inference.engine.architecture import Architecture
from services.inference.engine.cancellation import CancelToken
from services.inference.engine.captured import Pass, Row
from services.inference.engine.points import Point


class _LayerTap:
    """Reports one layer's attention to the current pass."""

    def __init__(self, hooks: "Hooks", layer: int) -> None:
        self._hooks = hooks
        self._layer = layer

    def inputs(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        current = self._hooks.current
        if current is None:
            return query, key, value
        return current.edit_attention_inputs(self._layer, query, key, value)

    def outputs(self, value: Tensor, output: Tensor, probabilities: Tensor) -> Tensor:
        current = self._hooks.current
        if current is None:
            return output
        return current.edit_attention_outputs(self._layer, value, output, probabilities)


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
            layer.attention.register_forward_pre_hook(self._enter_attention, with_kwargs=True)
            layer.attention.register_forward_hook(partial(self._leave_attention, index))
            layer.mlp.register_forward_hook(partial(self._leave_mlp, index))
            layer.mlp_down.register_forward_pre_hook(partial(self._enter_mlp_down, index))
            layer.norms[1].module.register_forward_pre_hook(self._enter_mlp_norm)
            layer.norms[1].module.register_forward_hook(partial(self._leave_mlp_norm, index))
            for norm in layer.norms:
                norm.module.register_forward_hook(partial(self._leave_block_norm, norm))
        architecture.final_norm.module.register_forward_pre_hook(self._enter_final_norm)
        architecture.final_norm.module.register_forward_hook(self._leave_final_norm)

    def run(
        self,
        rows: Sequence[Row],
        positions: Sequence[int],
        *,
        gradients: bool,
        cancel: CancelToken | None = None,
        keep: frozenset[Point] = frozenset(),
    ) -> Pass:
        """Runs the model over the rows; logits at `positions` (of every row).

        `keep` names points to keep beyond what every pass captures.

        Raises FailedPrecondition (reason NON_FINITE) where a value is not finite, Cancelled and
        DeadlineExceeded from the token.
        """
        started = time.perf_counter()
        current = Pass(rows, gradients, cancel or CancelToken(), wanted=keep)
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
        captured = (current.attention, current.neurons, current.middles, current.rotations)
        counts = [len(each) for each in captured]
        if any(count != layers for count in counts):
            raise RuntimeError(f"captured {counts} sites of {layers} layers: a hook was bypassed")
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
        if layer == 0:
            current.embed_before = args[0].detach()
            edited = current.edit_residual(Kind.EMBED, None, current.embed_before)
            # An edit may have a graph of its own, which must not be cut.
            current.embed = (
                edited
                if edited.requires_grad
                else edited.detach().requires_grad_(current.gradients)
            )
            read = current.embed
        else:
            read = current.edit_residual(Kind.RESID_POST, layer - 1, args[0])
            if read.requires_grad:
                read.register_hook(  # type: ignore[no-untyped-call]
                    partial(_check_cancel, current.cancel)
                )
        current.block_inputs.append(read)
        return (read, *args[1:])

    def _enter_attention(
        self, module: torch.nn.Module, args: object, kwargs: dict[str, object]
    ) -> None:
        if self.current is not None:
            rotation = kwargs.get("position_embeddings")
            self.current.rotations.append(rotation if isinstance(rotation, tuple) else None)

    def _enter_mlp_norm(self, module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        if self.current is not None:
            self.current.middles.append(args[0])

    def _leave_attention(
        self, layer: int, module: torch.nn.Module, args: object, output: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...] | None:
        current = self.current
        if current is None:
            return None
        write = current.edit_residual(Kind.ATTN, layer, output[0])
        if next(current.edits_at(Kind.RESID_MID, layer), None):
            # The block adds this to its input itself: hand it what makes the sum the edited one.
            middle = current.edit_residual(
                Kind.RESID_MID, layer, current.block_inputs[layer] + write
            )
            write = middle - current.block_inputs[layer]
        return (write, *output[1:])

    def _leave_mlp_norm(
        self, layer: int, module: torch.nn.Module, args: object, output: Tensor
    ) -> None:
        if self.current is not None:
            self.current.keep(
                "mlp_in", layer, output.view(len(self.current.rows), -1, output.shape[-1])
            )

    def _leave_mlp(
        self, layer: int, module: torch.nn.Module, args: object, output: Tensor
    ) -> Tensor | None:
        if self.current is None:
            return None
        return self.current.edit_residual(Kind.MLP, layer, output)

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

    def _enter_final_norm(
        self, module: torch.nn.Module, args: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...] | None:
        current = self.current
        if current is None:
            return None
        last = len(self._architecture.layers) - 1
        current.final_input = current.edit_residual(Kind.RESID_POST, last, args[0])
        return (current.final_input, *args[1:])

    def _leave_final_norm(
        self, module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor
    ) -> Tensor | None:
        current = self.current
        if current is None:
            return None
        if current.gradients:
            frozen = tuple(row.final_norm_frozen for row in current.rows)
            output = norms.hold_scale(self._architecture.final_norm, args[0], output, frozen)
        current.final_output = output
        return output


def _check_cancel(cancel: CancelToken, gradient: Tensor) -> None:
    cancel.check()
