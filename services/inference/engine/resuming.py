"""Resuming a pass where it first changes: nothing before that layer, stage and token is run again.

A `Recording` is one run as it is. A `Resumed` pass starts from it, its rows differing from the run
by edits from some place on: the blocks before the first changed layer hand their input on, the
first one reads the recorded residual stream, and within it what lies before the first change
(attention's output, the neurons) is given, not computed. By causality nothing before the first
changed token changes, so queries start there and attend to the recorded keys and values of earlier
tokens; and nothing after the last token wanted matters. Edits apply on top of what was recorded
before edits, in their usual order.

All else is Hugging Face's own forward: blocks are called with the arguments they got in the
recording (masks, rotary embeddings), cut to the tokens that are run.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor, nn

from services.common.addresses import Address, Kind
from services.inference.engine.architecture import Architecture, Layer
from services.inference.engine.cancellation import CancelToken
from services.inference.engine.captured import Pass, Row
from services.inference.engine.dictionaries.sites import Point, Site
from services.inference.engine.interventions import Edit


class Stage(IntEnum):
    """Stages within a block, in order: a pass resumed at one is given everything before it."""

    BLOCK = 0
    HEADS = 1
    """Attention's sums are known, the heads' outputs may be edited."""
    ATTENTION = 2
    """The output of attention is known."""
    NEURONS = 3
    MLP = 4


@dataclass(frozen=True, order=True)
class Start:
    """The first place that an edit changes; layer L of L is the final norm."""

    layer: int
    stage: Stage


_STAGES = {
    Kind.QUERY: Stage.BLOCK,
    Kind.KEY: Stage.BLOCK,
    Kind.VALUE: Stage.BLOCK,
    Kind.HEAD: Stage.HEADS,
    Kind.ATTN: Stage.ATTENTION,
    Kind.RESID_MID: Stage.ATTENTION,
    Kind.NEURON: Stage.NEURONS,
    Kind.MLP: Stage.MLP,
}


_SITE_STAGES = {
    Point.Z: Stage.HEADS,
    Point.ATTN_OUT: Stage.ATTENTION,
    Point.RESID_MID: Stage.ATTENTION,
    Point.MLP_ACT: Stage.NEURONS,
    Point.MLP_OUT: Stage.MLP,
}


def start_of(target: Address, site_of: Callable[[str], Site]) -> Start:
    """Where an edit of the target first changes anything; the beginning where that is unknown.

    `site_of` gives the site that a dictionary writes at.
    """
    if target.dictionary:
        site = site_of(target.dictionary)
        if site.point is Point.RESID_POST:
            return Start(site.layer + 1, Stage.BLOCK)
        return Start(site.layer, _SITE_STAGES.get(site.point, Stage.BLOCK))
    if target.layer is None:
        return Start(0, Stage.BLOCK)
    if target.kind is Kind.RESID_POST:
        return Start(target.layer + 1, Stage.BLOCK)
    return Start(target.layer, _STAGES.get(target.kind, Stage.BLOCK))


@dataclass
class Recording(Pass):
    """A pass of one row that remembers what resumed passes start from, before edits."""

    calls: list[dict[str, Any]] = field(default_factory=list)
    """Per layer the block's arguments by name; the first is the residual stream."""
    residuals: list[Tensor] = field(default_factory=list)
    """[1, T, d] before each block and before the final norm."""
    keys: list[Tensor] = field(default_factory=list)
    """Per layer [1, Hk, T, dh]."""
    values: list[Tensor] = field(default_factory=list)
    """Per layer [1, Hk, T, dh]."""
    sums: list[Tensor] = field(default_factory=list)
    """Per layer [1, T, H, dh]: the heads' outputs."""
    attention_outputs: list[Tensor] = field(default_factory=list)
    """Per layer [1, T, d]: what the attention module returns, its own edits included."""
    activations: list[Tensor] = field(default_factory=list)
    """Per layer [1, T, F]: neurons."""
    mlp_outputs: list[Tensor] = field(default_factory=list)
    """Per layer [1, T, d]: what the MLP module returns, edits of neurons included."""

    def edit_attention_inputs(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        self.keys.append(key.detach())
        self.values.append(value.detach())
        return super().edit_attention_inputs(layer, query, key, value)

    def edit_attention_outputs(
        self,
        layer: int,
        values: Tensor,
        output: Tensor,
        probabilities: Tensor,
        unmasked: Tensor | None = None,
    ) -> Tensor:
        self.sums.append(output.detach())
        return super().edit_attention_outputs(layer, values, output, probabilities, unmasked)

    def edit_neurons(self, layer: int, activations: Tensor) -> Tensor:
        self.activations.append(activations.detach())
        return super().edit_neurons(layer, activations)


class Resumed(Pass):
    """A pass that goes on from a recording, over tokens [first, last] of its run."""

    def __init__(
        self,
        recording: Recording,
        start: Start,
        tokens: tuple[int, int],
        edits: Sequence[tuple[Edit, ...]],
        cancel: CancelToken,
        gradients: bool = False,
        keeps_layers: bool = False,
    ) -> None:
        """`edits` has those of each row, the run's own included, at positions of the run.

        Without `keeps_layers` what is captured per layer is kept for the running layer only.
        """
        self.recording = recording
        self.start = start
        self.first, self.last = tokens
        (run,) = recording.rows
        self.token_ids = run.token_ids[self.first : self.last + 1]
        super().__init__(
            [Row(self.token_ids, self._moved(each)) for each in edits],
            (self.last,),
            gradients,
            cancel,
            branches=keeps_layers,
        )
        if not keeps_layers:
            self.keep_running_layer_only(start.layer)

    def _moved(self, edits: Sequence[Edit]) -> tuple[Edit, ...]:
        """The edits that reach these tokens, with queries counted from the first of them."""
        moved = []
        for edit in edits:
            whole = edit.target.kind in (Kind.KEY, Kind.VALUE)
            start = 0 if whole else self.first
            positions = [each for each in edit.positions if start <= each <= self.last]
            if positions:
                moved.append(_at(edit, positions, start))
        return tuple(moved)

    def skips(self, layer: int) -> bool:
        return layer < self.start.layer

    def given(self, layer: int, stage: Stage) -> bool:
        """Whether what comes before this stage of this layer is given."""
        return layer == self.start.layer and self.start.stage >= stage

    def cut(self, recorded: Tensor, dim: int = 1) -> Tensor:
        """A recorded tensor [1, ...] at these tokens, which `dim` counts, for every row."""
        cut = recorded.narrow(dim, self.first, self.last + 1 - self.first)
        return cut.expand(len(self.rows), *cut.shape[1:])

    def upto(self, recorded: Tensor, dim: int) -> Tensor:
        """A recorded tensor [1, ...] from the first token of the run on, for every row."""
        cut = recorded.narrow(dim, 0, self.last + 1)
        return cut.expand(len(self.rows), *cut.shape[1:])

    def edit_attention_inputs(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self.first:
            recording = self.recording
            earlier = (recording.keys[layer], recording.values[layer])
            key, value = (
                torch.cat([each[:, :, : self.first].expand(len(self.rows), -1, -1, -1), new], 2)
                for each, new in zip(earlier, (key, value), strict=True)
            )
        return super().edit_attention_inputs(layer, query, key, value)

    def edited_sums(self, layer: int) -> Tensor:
        """[B, t, H, dh]: the heads' outputs after edits, from the recorded attention."""
        site = self.recording.attention[layer]
        self._inputs = self.cut(site.query, 2), self.upto(site.key, 2)
        return self.edit_attention_outputs(
            layer,
            self.upto(site.values, 2),
            self.cut(self.recording.sums[layer]),
            self.upto(self.cut(site.probabilities, 2)[:1], 3),
        )

    def block_arguments(self, layer: int, hidden: Tensor) -> dict[str, Any]:
        """The recorded call of a block for these tokens, reading `hidden`."""
        arguments = dict(self.recording.calls[layer])
        stream, *others = arguments
        for name in others:
            arguments[name] = self._cut_argument(name, arguments[name])
        arguments[stream] = hidden
        return arguments

    def _cut_argument(self, name: str, value: Any) -> Any:
        tokens = slice(self.first, self.last + 1)
        match name, value:
            case "attention_mask", Tensor():
                return value[:, :, tokens, : self.last + 1]
            case "position_ids", Tensor():
                return value[:, tokens]
            case "position_embeddings", tuple():
                return tuple(each[:, tokens] for each in value)
            case _, None | bool() | str():
                return value
        raise RuntimeError(f"the block's argument {name} cannot be cut to some of its tokens")


def _at(edit: Edit, positions: list[int], start: int) -> Edit:
    """The edit at some of its positions, counted from `start`."""
    edit = edit.only(positions)
    target = edit.target
    if target.position is not None:
        target = replace(target, position=target.position - start)
    return replace(edit, target=target, positions=tuple(each - start for each in positions))


def install(architecture: Architecture, current: Callable[[], Pass | None]) -> None:
    """Puts recording and resuming into a model's modules; `current` gives the pass that runs now.

    Must come before other hooks of blocks and final norm: they see what this hands on.
    """
    for index, layer in enumerate(architecture.layers):
        _install_block(index, layer, current)
        _install_attention(index, layer, current)
        if layer.mlp is not layer.mlp_down:
            _install_mlp(index, layer, current)

    def enter_final_norm(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        running = current()
        if isinstance(running, Recording):
            running.residuals.append(args[0].detach())
        if isinstance(running, Resumed) and running.skips(len(architecture.layers) - 1):
            return (running.cut(running.recording.residuals[-1]), *args[1:])
        return None

    architecture.final_norm.module.register_forward_pre_hook(enter_final_norm)


def _install_block(index: int, layer: Layer, current: Callable[[], Pass | None]) -> None:
    block = layer.block
    signature = inspect.signature(block.forward)
    forward = block.forward

    def enter(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        running = current()
        if isinstance(running, Recording):
            bound = signature.bind(*args, **kwargs).arguments
            bound |= bound.pop("kwargs", {})
            running.calls.append(bound)
            running.residuals.append(args[0].detach())
        if not isinstance(running, Resumed) or running.skips(index):
            return None
        hidden = args[0]
        if index == running.start.layer:
            hidden = running.cut(running.recording.residuals[index])
        first, *others = running.block_arguments(index, hidden).items()
        return (first[1],), dict(others)

    def run(*args: Any, **kwargs: Any) -> Any:
        running = current()
        if isinstance(running, Resumed) and running.skips(index):
            return args[0]
        return forward(*args, **kwargs)

    block.register_forward_pre_hook(enter, with_kwargs=True)
    block.forward = run


def _install_attention(index: int, layer: Layer, current: Callable[[], Pass | None]) -> None:
    module = layer.attention
    forward = module.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        running = current()
        if isinstance(running, Resumed) and running.given(index, Stage.ATTENTION):
            return running.cut(running.recording.attention_outputs[index]), None
        if isinstance(running, Resumed) and running.given(index, Stage.HEADS):
            return layer.attention_out(running.edited_sums(index).flatten(2)), None
        output = forward(*args, **kwargs)
        if isinstance(running, Recording):
            running.attention_outputs.append(output[0].detach())
        return output

    module.forward = run


def _install_mlp(index: int, layer: Layer, current: Callable[[], Pass | None]) -> None:
    module = layer.mlp
    forward = module.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        running = current()
        if isinstance(running, Resumed) and running.given(index, Stage.MLP):
            return running.cut(running.recording.mlp_outputs[index])
        if isinstance(running, Resumed) and running.given(index, Stage.NEURONS):
            assert layer.mlp_down is not None  # only neurons start there
            return layer.mlp_down(running.cut(running.recording.activations[index]))
        output = forward(*args, **kwargs)
        if isinstance(running, Recording):
            running.mlp_outputs.append(output.detach())
        return output

    module.forward = run
