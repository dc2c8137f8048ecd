"""Taps: the hooks on a model's modules, which show the running pass every site and edit it there.

They are registered once per model and do nothing until a pass is current. Families lay their blocks
out in different ways; what a pass sees is the same in all: [B, T, w] per site, writes behind
a post-norm, and norms with their scale held in the rows that ask for it.
"""

from functools import partial

import torch
from torch import Tensor

from services.common.addresses import Kind
from services.inference.engine import attention, norms, resuming
from services.inference.engine.architecture import Architecture, bias_of
from services.inference.engine.cancellation import CancelToken
from services.inference.engine.captured import ExpertsWrite, Pass
from services.inference.engine.dictionaries.sites import Point, Site


class _LayerTap:
    """Reports one layer's attention to the current pass."""

    def __init__(self, taps: "Taps", layer: int) -> None:
        self._taps = taps
        self._layer = layer

    def inputs(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        current = self._taps.current
        if current is None:
            return query, key, value
        return current.edit_attention_inputs(self._layer, query, key, value)

    def mask(self, mask: Tensor) -> Tensor:
        current = self._taps.current
        return mask if current is None else current.edit_attention_mask(self._layer, mask)

    def outputs(
        self, value: Tensor, output: Tensor, probabilities: Tensor, unmasked: Tensor | None
    ) -> Tensor:
        current = self._taps.current
        if current is None:
            return output
        return current.edit_attention_outputs(self._layer, value, output, probabilities, unmasked)


class Taps:
    """The hooks of one model; `current` is the pass that runs now."""

    def __init__(self, architecture: Architecture) -> None:
        self._architecture = architecture
        self.current: Pass | None = None
        resuming.install(architecture, lambda: self.current)
        self._attention = [_LayerTap(self, index) for index in range(len(architecture.layers))]
        for index, layer in enumerate(architecture.layers):
            attention.tap(layer.attention, self._attention[index])
            layer.block.register_forward_pre_hook(partial(self._enter_block, index))
            layer.attention.register_forward_pre_hook(self._enter_attention, with_kwargs=True)
            layer.mlp_norm.module.register_forward_pre_hook(self._enter_mlp_norm)
            # Before the hooks below on the same module: they see the norm with its scale held.
            for place, norm in layer.norms(index):
                norm.module.register_forward_hook(partial(self._leave_norm, place, norm))
            layer.attn_norm.module.register_forward_hook(partial(self._capture, "attn_in"))
            for projection in layer.attn_projections:
                if (bias := bias_of(projection)) is not None:
                    hook = partial(self._capture_biased, index, bias)
                    projection.register_forward_hook(hook)
            layer.mlp_norm.module.register_forward_hook(partial(self._capture, "mlp_in"))
            layer.mlp_norm.module.register_forward_hook(partial(self._leave_mlp_norm, index))
            if layer.mlp_gate is None or layer.mlp_down is None:
                layer.mlp.register_forward_pre_hook(partial(self._enter_experts, index))
            else:
                layer.mlp_gate.register_forward_hook(partial(self._capture_branch, "gates", index))
                layer.mlp_down.register_forward_pre_hook(partial(self._enter_mlp_down, index))
            if layer.mlp_up is not None:
                layer.mlp_up.register_forward_hook(partial(self._capture_branch, "ups", index))
            attn, mlp = layer.attn_post_norm, layer.mlp_post_norm
            layer.attention.register_forward_hook(partial(self._before_attn_post_norm, index))
            layer.mlp.register_forward_hook(partial(self._before_mlp_post_norm, index))
            (attn.module if attn else layer.attention).register_forward_hook(
                partial(self._leave_attention, index)
            )
            (mlp.module if mlp else layer.mlp).register_forward_hook(
                partial(self._leave_mlp, index)
            )
        final_norm = architecture.final_norm
        final_norm.module.register_forward_pre_hook(self._enter_final_norm)
        final_norm.module.register_forward_hook(partial(self._leave_norm, norms.FINAL, final_norm))
        final_norm.module.register_forward_hook(self._leave_final_norm)

    def _enter_block(
        self, layer: int, module: torch.nn.Module, args: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...] | None:
        current = self.current
        if current is None or current.skips(layer):
            return None
        current.cancel.check()
        if layer == 0:
            current.embed_before = args[0].detach()
            start = current.embed_before
            if current.sites.wants(Site(Point.RESID_PRE, 0)):
                start = start.clone().requires_grad_(current.gradients)
                start = current.at_site(Point.RESID_PRE, 0, start)
            edited = current.edit_residual(Kind.EMBED, None, start)
            # An edit may have a graph of its own, which must not be cut.
            current.embed = (
                edited
                if edited.requires_grad
                else edited.detach().requires_grad_(current.gradients)
            )
            read = current.embed
        else:
            after = current.at_site(Point.RESID_POST, layer - 1, self._after_block(args[0]))
            read = current.edit_residual(Kind.RESID_POST, layer - 1, after)
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

    def _enter_mlp_norm(
        self, module: torch.nn.Module, args: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...] | None:
        current = self.current
        if current is None:
            return None
        edited = current.edited_middle
        middle = self._per_token(args[0]) if edited is None else edited
        current.middles.append(middle)
        return None if middle is args[0] else (middle.view_as(args[0]), *args[1:])

    def _after_block(self, output: Tensor) -> Tensor:
        """[B, T, d]: the stream after a block, without the rounding of an edited middle."""
        current = self.current
        if current is None or current.edited_middle is None:
            return output
        middle, write = current.edited_middle, current.last_write
        current.edited_middle = None
        return middle + write

    def _capture(
        self, name: str, module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor
    ) -> Tensor | None:
        """Enters an output in the list of that name of a pass with gradients."""
        if self.current is None or not self.current.gradients:
            return None
        values = self._per_token(output)
        getattr(self.current, name).append(values)
        # What is captured must lie on the way to the logits, or gradients would pass it by.
        return None if values is output else values.view_as(output)

    def _capture_branch(
        self,
        name: str,
        layer: int,
        module: torch.nn.Module,
        args: tuple[Tensor, ...],
        output: Tensor,
    ) -> Tensor | None:
        """Enters pre-activations of neurons in the dictionary of that name."""
        if self.current is None or not self.current.branches:
            return None
        values = self._per_token(output)
        getattr(self.current, name)[layer] = values
        return None if values is output else values.view_as(output)

    def _capture_biased(
        self, layer: int, bias: Tensor, module: torch.nn.Module, args: object, output: Tensor
    ) -> None:
        if self.current is not None and self.current.gradients:
            self.current.biased.setdefault(layer, []).append((bias, output))

    def _per_token(self, x: Tensor) -> Tensor:
        """[B, T, w] of what some families flatten to [B * T, w] for the MLP."""
        assert self.current is not None
        return x.view(len(self.current.rows), -1, x.shape[-1]) if x.dim() == 2 else x

    def _before_attn_post_norm(
        self,
        layer: int,
        module: torch.nn.Module,
        args: object,
        output: tuple[Tensor, ...],
    ) -> tuple[Tensor, ...] | None:
        current = self.current
        if current is None:
            return None
        if current.gradients:
            current.projected[Kind.ATTN, layer] = output[0]
        write = current.at_site(Point.ATTN_OUT, layer, output[0], before_post_norm=True)
        return (write, *output[1:])

    def _before_mlp_post_norm(
        self, layer: int, module: torch.nn.Module, args: object, output: Tensor
    ) -> Tensor | None:
        current = self.current
        if current is None:
            return None
        write = self._per_token(output)
        if current.gradients:
            current.projected[Kind.MLP, layer] = write
        write = current.at_site(Point.MLP_OUT, layer, write, before_post_norm=True)
        return write.view_as(output)

    def _edit_bias(self, kind: Kind, layer: int, write: Tensor, scale: Tensor | None) -> Tensor:
        """A sublayer's write [B, T, d] after edits of its bias; scale: of its post-norm."""
        current = self.current
        if current is None or not current.edits_at(kind, layer):
            return write
        bias = self._architecture.layers[layer].bias_write(kind, scale)
        assert bias is not None  # or the edit would have been refused
        return current.edit_bias(kind, layer, write, bias)

    def _leave_attention(
        self,
        layer: int,
        module: torch.nn.Module,
        args: tuple[Tensor, ...],
        output: tuple[Tensor, ...] | Tensor,
    ) -> tuple[Tensor, ...] | Tensor | None:
        """Of the attention module, or of the norm behind it."""
        current = self.current
        if current is None:
            return None
        write = output if isinstance(output, Tensor) else output[0]
        post_norm = self._architecture.layers[layer].attn_post_norm
        scale = _scale(post_norm, args)
        current.attn_scale.append(scale)
        write = self._edit_bias(Kind.BIAS_ATTN, layer, write, scale)
        write = current.at_site(Point.ATTN_OUT, layer, write)
        write = current.edit_residual(Kind.ATTN, layer, write)
        if current.gradients:
            current.attn_write.append(write)
        is_read = current.sites.wants(Site(Point.RESID_MID, layer))
        if is_read or current.edits_at(Kind.RESID_MID, layer):
            # The block adds this to its input itself: hand it what makes the sum the edited one.
            # That difference rounds, so what reads the sum gets the edited stream itself.
            middle = current.block_inputs[layer] + write
            middle = current.at_site(Point.RESID_MID, layer, middle)
            current.edited_middle = current.edit_residual(Kind.RESID_MID, layer, middle)
            write = current.edited_middle - current.block_inputs[layer]
        return write if isinstance(output, Tensor) else (write, *output[1:])

    def _leave_mlp_norm(
        self, layer: int, module: torch.nn.Module, args: object, output: Tensor
    ) -> None:
        if self.current is not None:
            read = self._per_token(output)
            self.current.keep("mlp_in", layer, read)
            self.current.at_site(Point.MLP_IN, layer, read)

    def _leave_mlp(
        self, layer: int, module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor
    ) -> Tensor | None:
        """Of the MLP, or of the norm behind it."""
        current = self.current
        if current is None:
            return None
        weights = self._architecture.layers[layer]
        scale = _scale(weights.mlp_post_norm, args)
        current.mlp_scale.append(scale)
        before = self._edit_bias(Kind.BIAS_MLP, layer, self._per_token(output), scale)
        write = current.at_site(Point.MLP_OUT, layer, before)
        write = current.edit_residual(Kind.MLP, layer, write)
        if weights.experts:
            current.experts[layer] = ExpertsWrite(before.detach(), write)
        current.last_write = write
        if current.gradients:
            current.mlp_write.append(write)
        return write.view_as(output)

    def _enter_experts(self, layer: int, module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        current = self.current
        if current is None:
            return
        none = self._per_token(args[0])[..., :0]
        current.edit_neurons(layer, none)

    def _enter_mlp_down(
        self, layer: int, module: torch.nn.Module, args: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...] | None:
        if self.current is None:
            return None
        neurons = self.current.edit_neurons(layer, self._per_token(args[0]))
        neurons = self.current.at_site(Point.MLP_ACT, layer, neurons)
        self.current.keep("mlp_act", layer, neurons)
        return (neurons.view_as(args[0]), *args[1:])

    def _leave_norm(
        self,
        place: norms.NormPlace,
        norm: norms.Norm,
        module: torch.nn.Module,
        args: tuple[Tensor, ...],
        output: Tensor,
    ) -> Tensor | None:
        current = self.current
        if current is None or not current.gradients:
            return None
        frozen = tuple(row.freezes(place) for row in current.rows)
        if any(frozen):
            x, output = self._per_token(args[0]), self._per_token(output)
            output = norms.hold_scale(norm, x, output, frozen).view_as(args[0])
        if place[0] in ("q", "k"):
            current.qk_normed[place] = output
        return output

    def _enter_final_norm(
        self, module: torch.nn.Module, args: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...] | None:
        current = self.current
        if current is None:
            return None
        last = len(self._architecture.layers) - 1
        after = current.at_site(Point.RESID_POST, last, self._after_block(args[0]))
        current.final_input = current.edit_residual(Kind.RESID_POST, last, after)
        return (current.final_input, *args[1:])

    def _leave_final_norm(
        self, module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor
    ) -> None:
        if self.current is not None:
            self.current.final_output = output


def _scale(post_norm: norms.Norm | None, args: tuple[Tensor, ...]) -> Tensor | None:
    """[B, T, 1]: scale of a post-norm called with [B, T, d], in its data type and detached."""
    return None if post_norm is None else post_norm.scale(args[0].detach()).to(args[0].dtype)


def _check_cancel(cancel: CancelToken, gradient: Tensor) -> None:
    cancel.check()
