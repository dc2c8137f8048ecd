"""The forward pass: rows of a right-padded batch, each with its own edits, captured at every site.

Hooks are registered once per model and do nothing until a `Pass` is current. A pass holds what it
captured as tensors of one autograd graph whose only leaf is the embedding output: parameters never
require gradients. Right padding needs no mask: causality keeps pads out of every real token.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from services.common.addresses import Kind
from services.common.errors import FailedPrecondition
from services.inference.engine import attention, norms, references, resuming
from services.inference.engine.architecture import Architecture, bias_of
from services.inference.engine.cancellation import CancelToken
from services.inference.engine.captured import ExpertsWrite, Pass, Row
from services.inference.engine.dictionaries.sites import Point as SitePoint
from services.inference.engine.dictionaries.sites import Site
from services.inference.engine.interventions import Edit
from services.inference.engine.points import Point
from services.inference.engine.resuming import Recording, Resumed
from services.inference.engine.shelf import Shelf
from services.inference.engine.splice import Probe, Sites

_ALWAYS = (
    "block_inputs",
    "rotations",
    "attention",
    "attn_scale",
    "middles",
    "neurons",
    "mlp_scale",
)
_WITH_GRADIENTS = ("attn_in", "attn_write", "mlp_in", "mlp_write")
"""What a pass must hold once per layer."""


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

    def mask(self, mask: Tensor) -> Tensor:
        current = self._hooks.current
        return mask if current is None else current.edit_attention_mask(self._layer, mask)

    def outputs(
        self, value: Tensor, output: Tensor, probabilities: Tensor, unmasked: Tensor | None
    ) -> Tensor:
        current = self._hooks.current
        if current is None:
            return output
        return current.edit_attention_outputs(self._layer, value, output, probabilities, unmasked)


class Hooks:
    """The hooks of one model. Used by one thread; `current` is the pass that runs now."""

    def __init__(self, model: PreTrainedModel, architecture: Architecture) -> None:
        self._model = model
        self.architecture = architecture
        self.current: Pass | None = None
        resuming.install(architecture, lambda: self.current)
        self.shelf = Shelf(of=architecture)
        """The dictionaries that passes may read and edit."""
        self._taps = [_LayerTap(self, index) for index in range(len(architecture.layers))]
        for index, layer in enumerate(architecture.layers):
            attention.tap(layer.attention, self._taps[index])
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

    def run(
        self,
        rows: Sequence[Row],
        positions: Sequence[int],
        *,
        gradients: bool,
        branches: bool = False,
        cancel: CancelToken | None = None,
        keep: frozenset[Point] = frozenset(),
        dictionaries: Sequence[str] = (),
        cache: DynamicCache | None = None,
    ) -> Pass:
        """Runs the model over the rows; logits at `positions` (of every row).

        `branches` keeps pre-activations of neurons without gradients too, `keep` names points to
        keep beyond what every pass captures, `dictionaries` the ids of those to be read; the ones
        that edits name are read besides. With a `cache` the rows go on from the tokens in it, which
        it then holds too; positions count from the rows' first.

        Raises FailedPrecondition (reason NON_FINITE) where a value is not finite, Cancelled and
        DeadlineExceeded from the token.
        """
        cancel = cancel or CancelToken()
        rows = [replace(row, edits=self.fill(row.edits, cancel)) for row in rows]
        current = Pass(
            rows,
            tuple(positions),
            gradients,
            cancel,
            wanted=keep,
            branches=branches or gradients,
        )
        self._run(current, dictionaries, cache)
        return current

    def look(self, rows: Sequence[Row], probe: Probe, cancel: CancelToken) -> None:
        """Runs the model over rows without edits, showing `probe` the sites it wants."""
        self._run(Pass(rows, (0,), False, cancel, sites=probe))

    def record(
        self,
        row: Row,
        positions: Sequence[int],
        *,
        cancel: CancelToken,
        gradients: bool = False,
        dictionaries: Sequence[str] = (),
    ) -> Recording:
        """Like `run` of one row, remembering what `resume` starts from."""
        row = replace(row, edits=self.fill(row.edits, cancel))
        current = Recording([row], tuple(positions), gradients, cancel)
        self._run(current, dictionaries)
        return current

    def fill(self, edits: Sequence[Edit], cancel: CancelToken) -> tuple[Edit, ...]:
        """The edits with what MEAN and PATCH take from other runs, which are run here.

        `run` and `record` do so by themselves; done beforehand, several passes share it.
        """
        return references.fill(
            edits, lambda rows: self.run(rows, [0], gradients=False, cancel=cancel)
        )

    def resume(self, current: Resumed, dictionaries: Sequence[str] = ()) -> Tensor:
        """Runs what is left of a resumed pass; its logits [B, V] at its last token.

        `dictionaries` are read besides those that edits name.

        Raises Cancelled and DeadlineExceeded from its token.
        """
        self._attach(current, dictionaries)
        device = self.architecture.final_norm.gain.device
        ids = torch.tensor(current.token_ids, device=device).expand(len(current.rows), -1)
        last = torch.tensor([len(current.token_ids) - 1], device=device)
        with self._running(current), torch.set_grad_enabled(current.gradients):
            output = self._model(input_ids=ids, logits_to_keep=last, use_cache=False)
        current.logits = output.logits
        return current.logits[:, 0]

    def _attach(self, current: Pass, dictionaries: Sequence[str] = ()) -> None:
        """Puts the dictionaries named, and those that edits name, in a pass."""
        if isinstance(current.sites, Probe):
            return
        edited = [edit.target.dictionary for row in current.rows for edit in row.edits]
        named = dict.fromkeys(name for name in (*dictionaries, *edited) if name)
        current.sites = Sites(self.shelf.bind(list(named)))

    def _run(
        self,
        current: Pass,
        dictionaries: Sequence[str] = (),
        cache: DynamicCache | None = None,
    ) -> None:
        started = time.perf_counter()
        rows, gradients = current.rows, current.gradients
        self._attach(current, dictionaries)
        device = self.architecture.final_norm.gain.device
        longest = max(len(row.token_ids) for row in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        for index, row in enumerate(rows):
            ids[index, : len(row.token_ids)] = torch.tensor(row.token_ids)
        with self._running(current), torch.set_grad_enabled(gradients):
            output = self._model(
                input_ids=ids.to(device),
                logits_to_keep=torch.tensor(current.positions, device=device),
                use_cache=cache is not None,
                cache=cache,
            )
        current.logits = output.logits
        self._check_captured(current)
        current.forward_ms = (time.perf_counter() - started) * 1e3

    @contextmanager
    def _running(self, current: Pass) -> Iterator[None]:
        self.current = current
        try:
            yield
        finally:
            self.current = None

    def _check_captured(self, current: Pass) -> None:
        layers = len(self.architecture.layers)
        names = (*_ALWAYS, *_WITH_GRADIENTS) if current.gradients else _ALWAYS
        counts = {name: len(getattr(current, name)) for name in names}
        if any(count != layers for count in counts.values()):
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
        if current is None or current.skips(layer):
            return None
        current.cancel.check()
        if layer == 0:
            current.embed_before = args[0].detach()
            start = current.embed_before
            if current.sites.wants(Site(SitePoint.RESID_PRE, 0)):
                start = start.clone().requires_grad_(current.gradients)
                start = current.at_site(SitePoint.RESID_PRE, 0, start)
            edited = current.edit_residual(Kind.EMBED, None, start)
            # An edit may have a graph of its own, which must not be cut.
            current.embed = (
                edited
                if edited.requires_grad
                else edited.detach().requires_grad_(current.gradients)
            )
            read = current.embed
        else:
            after = current.at_site(SitePoint.RESID_POST, layer - 1, self._after_block(args[0]))
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
        write = current.at_site(SitePoint.ATTN_OUT, layer, output[0], before_post_norm=True)
        return (write, *output[1:])

    def _before_mlp_post_norm(
        self, layer: int, module: torch.nn.Module, args: object, output: Tensor
    ) -> Tensor | None:
        current = self.current
        if current is None:
            return None
        write = self._per_token(output)
        write = current.at_site(SitePoint.MLP_OUT, layer, write, before_post_norm=True)
        return write.view_as(output)

    def _edit_bias(self, kind: Kind, layer: int, write: Tensor, scale: Tensor | None) -> Tensor:
        """A sublayer's write [B, T, d] after edits of its bias; scale: of its post-norm."""
        current = self.current
        if current is None or not current.edits_at(kind, layer):
            return write
        bias = self.architecture.layers[layer].bias_write(kind, scale)
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
        post_norm = self.architecture.layers[layer].attn_post_norm
        scale = _scale(post_norm, args)
        current.attn_scale.append(scale)
        write = self._edit_bias(Kind.BIAS_ATTN, layer, write, scale)
        write = current.at_site(SitePoint.ATTN_OUT, layer, write)
        write = current.edit_residual(Kind.ATTN, layer, write)
        if current.gradients:
            current.attn_write.append(write)
        is_read = current.sites.wants(Site(SitePoint.RESID_MID, layer))
        if is_read or current.edits_at(Kind.RESID_MID, layer):
            # The block adds this to its input itself: hand it what makes the sum the edited one.
            # That difference rounds, so what reads the sum gets the edited stream itself.
            middle = current.block_inputs[layer] + write
            middle = current.at_site(SitePoint.RESID_MID, layer, middle)
            current.edited_middle = current.edit_residual(Kind.RESID_MID, layer, middle)
            write = current.edited_middle - current.block_inputs[layer]
        return write if isinstance(output, Tensor) else (write, *output[1:])

    def _leave_mlp_norm(
        self, layer: int, module: torch.nn.Module, args: object, output: Tensor
    ) -> None:
        if self.current is not None:
            read = self._per_token(output)
            self.current.keep("mlp_in", layer, read)
            self.current.at_site(SitePoint.MLP_IN, layer, read)

    def _leave_mlp(
        self, layer: int, module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor
    ) -> Tensor | None:
        """Of the MLP, or of the norm behind it."""
        current = self.current
        if current is None:
            return None
        weights = self.architecture.layers[layer]
        scale = _scale(weights.mlp_post_norm, args)
        current.mlp_scale.append(scale)
        before = self._edit_bias(Kind.BIAS_MLP, layer, self._per_token(output), scale)
        write = current.at_site(SitePoint.MLP_OUT, layer, before)
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
        neurons = self.current.at_site(SitePoint.MLP_ACT, layer, neurons)
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
        last = len(self.architecture.layers) - 1
        after = current.at_site(SitePoint.RESID_POST, last, self._after_block(args[0]))
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
