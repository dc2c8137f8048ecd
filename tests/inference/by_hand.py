"""Interventions on the pass written by hand: where each acts there, and what it makes of a value.

Values of other runs (MEAN, PATCH) are read off passes written by hand too.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from services.common.addresses import Address, Kind
from services.inference.engine.interventions import Intervention, Mask, Mean, Patch, Source
from tests.inference import plain

Change = tuple[str, int | None, Any, Callable[[Tensor], Tensor]]

SITES = {
    Kind.HEAD: "z",
    Kind.QUERY: "q",
    Kind.KEY: "k",
    Kind.VALUE: "v",
    Kind.EMBED: "embed",
    Kind.ATTN: "attn",
    Kind.MLP: "mlp",
    Kind.RESID_MID: "resid_mid",
    Kind.RESID_POST: "resid_post",
    Kind.NEURON: "neurons",
    Kind.BIAS_ATTN: "bias.attn",
    Kind.BIAS_MLP: "bias.mlp",
}


def place(target: Address, positions: Sequence[int]) -> tuple[str, int | None, Any]:
    """Site, layer and index of a target's values, [P] or [P, w]."""
    at = list(positions)
    if target.key is not None:
        return "probabilities", target.layer, (target.index, at, target.key)
    kind = SITES[target.kind]
    if kind in ("q", "k", "v"):
        return kind, target.layer, (target.index, at)
    if kind in ("z", "neurons"):
        return kind, target.layer, (at, target.index)
    return kind, target.layer, (at,)


def edited(model: Any, wanted: Iterable[Intervention], tokens: int) -> plain.Site:
    """The site callback that makes these edits of a prompt of that many tokens."""
    return plain.edited(*(change(model, each, tokens) for each in wanted))


def change(model: Any, wanted: Intervention, tokens: int) -> Change:
    target, operation = wanted.target, wanted.operation
    positions: Sequence[int] = range(tokens) if wanted.positions is None else wanted.positions
    if target.position is not None:
        positions = (target.position,)
    kind, layer, index = place(target, positions)
    match operation:
        case Mask():
            return "scores", layer, index, partial(plain.apply, operation)
        case Mean(prompts, per_position):
            read = [
                value(
                    model, each, target, positions if per_position else range(len(each.token_ids))
                )
                for each in prompts
            ]
            mean = torch.stack(read).mean(0) if per_position else torch.cat(read).mean(0)
            return kind, layer, index, partial(_become, mean)
        case Patch(source, alignment):
            moved = dict(alignment or [(each, each) for each in range(tokens)])
            there = target
            if target.key is not None:
                there = replace(target, position=moved[positions[0]], key=moved[target.key])
            patched = value(model, source, there, [moved[each] for each in positions])
            return kind, layer, index, partial(_become, patched)
        case _:
            return kind, layer, index, partial(plain.apply, operation)


def _become(values: Tensor, x: Tensor) -> Tensor:
    return values.expand_as(x)


def value(model: Any, source: Source, target: Address, positions: Sequence[int]) -> Tensor:
    """[P] or [P, w]: what a target's values are in a run, after its own edits."""
    kind, layer, index = place(target, positions)
    edit = edited(model, source.interventions, len(source.token_ids))
    found: list[Tensor] = []

    def site(at_kind: str, at_layer: int | None, values: Tensor) -> Tensor:
        values = edit(at_kind, at_layer, values)
        if (at_kind, at_layer) == (kind, layer):
            found.append(values[index])
        return values

    plain.forward(model, source.token_ids, site)
    return found[0]
