"""Harvests in every family against Hugging Face's own pass with hooks, all activations at once."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from services.common.errors import InvalidArgument, ResourceExhausted
from services.common.harvest.state import Keep, State
from services.inference.engine.cancellation import CancelToken
from services.inference.engine.harvesting import groups
from services.inference.engine.harvesting.gathering import Gathering
from services.inference.engine.harvesting.harvest import AskedHarvest, CorpusSequence, Harvest
from services.inference.engine.harvesting.watching import Watched
from tests.inference.families.models import (
    EXPERT_VARIANTS,
    HEADS,
    LAYERS,
    VARIANTS,
    Reference,
    engine_of,
    reference_of,
)
from tests.inference.harvesting import brute
from tests.inference.harvesting.brute import Seen

ROUNDING = 1e-5
KEEP = Keep(top=4, random=3, strata=3, per_stratum=2, seed=1)


def corpus() -> tuple[CorpusSequence, ...]:
    random = np.random.default_rng(0)
    return tuple(
        CorpusSequence(int(index), tuple(map(int, random.integers(0, 61, length))))
        for index, length in zip(
            random.permutation(100), [9, 9, 4, 9, 1, 9, 4, 9, 9, 9, 9, 9], strict=False
        )
    )


def harvested(variant: str, *names: str) -> dict[str, State]:
    engine = engine_of(variant)
    asked = AskedHarvest(groups.all_of(names, engine.shape), KEEP, corpus(), (3, 5))
    harvest = Harvest(engine.hooks, asked)
    for number in range(len(harvest.batches)):
        harvest.batch(number, CancelToken())
    return {str(group): harvest.finish(group, CancelToken()) for group in asked.groups}


def neurons(reference: Reference, ids: tuple[int, ...]) -> list[Tensor]:
    """[T, F] of every layer."""
    found: list[Tensor] = []

    def site(kind: str, layer: int | None, values: Tensor) -> Tensor:
        if kind == "neurons":
            found.append(values[0].clone())
        return values

    with torch.no_grad():
        reference.run(ids, site)
    return found


def magnitudes(
    reference: Reference, layer: int, ids: tuple[int, ...], window: int | None
) -> Tensor:
    """[pairs, H]: lengths of A v W_O behind the post-norm, v read off a pass in which every query
    of the layer looks at its own token alone."""
    found: dict[str, Tensor] = {}

    def look(kind: str, at: int | None, values: Tensor) -> Tensor:
        if at == layer:
            found[kind] = values[0].clone()
        return values

    def own(kind: str, at: int | None, values: Tensor) -> Tensor:
        if at == layer and kind == "probabilities":
            return torch.eye(len(ids)).expand_as(values).clone()
        if at == layer and kind == "z":
            found["values"] = values[0].clone()
        return values

    with torch.no_grad():
        reference.run(ids, look)
        reference.run(ids, own)
        out = reference.blocks[layer].get_submodule(reference._out)
        weight = out.weight if isinstance(out, torch.nn.Linear) else out.weight.T
        by_head = weight.view(weight.shape[0], HEADS, -1)
        writes = torch.einsum("khw,dhw->khd", found["values"], by_head)
        writes = torch.einsum("hqk,khd->qkhd", found["probabilities"], writes)
        if reference._attn_write != reference._out:
            norm = reference.blocks[layer].get_submodule(reference._attn_write)
            scale = (found["attn_out"].pow(2).mean(-1) + norm.eps).sqrt()
            writes = writes * (1 + norm.weight) / scale[:, None, None, None]
        lengths = writes.norm(dim=-1)
    pairs = [
        (query, key)
        for query in range(len(ids))
        for key in range(query + 1)
        if window is None or query - key < window
    ]
    return torch.stack([lengths[pair] for pair in pairs])


@pytest.mark.parametrize("variant", VARIANTS)
def test_neurons_and_heads_are_those_of_a_pass_by_hand(variant: str) -> None:
    last = LAYERS - 1
    states = harvested(variant, f"neuron.{last}", "neuron.0", "head.0", f"head.{last}")
    reference = reference_of(variant)
    by_hand = {each.index: neurons(reference, each.ids) for each in corpus()}
    for layer in (0, last):
        seen = [Seen(each.index, each.ids, by_hand[each.index][layer].numpy()) for each in corpus()]
        brute.check(states[f"neuron.{layer}"], seen, ROUNDING)
        window = engine_of(variant).shape.windows[layer]
        pairs = [
            Seen(each.index, each.ids, magnitudes(reference, layer, each.ids, window).numpy())
            for each in corpus()
        ]
        brute.check(states[f"head.{layer}"], pairs, ROUNDING)
    # Another layer's activations are told apart.
    swapped = replace(states["neuron.0"], group=f"neuron.{last}")
    with pytest.raises(AssertionError):
        brute.check(swapped, seen, ROUNDING)


def test_a_pass_goes_no_further_than_the_last_group() -> None:
    engine = engine_of("gpt2/tied")
    ran: list[int] = []
    handles = [
        layer.mlp.register_forward_hook(lambda *_, number=number: ran.append(number))
        for number, layer in enumerate(engine.architecture.layers)
    ]
    try:
        for names, wanted in ((("neuron.1", "head.0"), [0]), (("head.0",), [])):
            ran.clear()
            asked = AskedHarvest(groups.all_of(names, engine.shape), KEEP, corpus()[:1])
            Harvest(engine.hooks, asked).batch(0, CancelToken())
            assert ran == wanted
    finally:
        for handle in handles:
            handle.remove()


def test_a_group_that_no_hook_reports_is_not_left_out_silently(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = engine_of("gpt2/tied")
    monkeypatch.setattr(Watched, "edit_neurons", lambda self, layer, activations: activations)
    asked = AskedHarvest(groups.all_of(["neuron.1"], engine.shape), KEEP, corpus())
    with pytest.raises(RuntimeError, match="bypassed"):
        Harvest(engine.hooks, asked).batch(0, CancelToken())


def test_a_batch_that_failed_half_way_is_not_counted_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = engine_of("gpt2/tied")
    asked = AskedHarvest(groups.all_of(["neuron.0", "neuron.1"], engine.shape), KEEP, corpus())
    harvest = Harvest(engine.hooks, asked)
    harvest.batch(0, CancelToken())
    add, calls = Gathering.add, 0

    def failing(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        add(*arguments)
        if calls == 2:
            raise RuntimeError("can't allocate memory")

    monkeypatch.setattr(Gathering, "add", failing)
    with pytest.raises(RuntimeError, match="memory"):
        harvest.batch(1, CancelToken())
    # The scheduler frees memory and tries once more.
    for number in (1, 2):
        with pytest.raises(ResourceExhausted):
            harvest.batch(number, CancelToken())


@pytest.mark.parametrize("variant", EXPERT_VARIANTS)
def test_experts_have_no_neurons_but_heads(variant: str) -> None:
    layer = min(engine_of(variant).shape.experts)
    assert harvested(variant, f"head.{layer}")[f"head.{layer}"].components == HEADS
    with pytest.raises(InvalidArgument, match="mixture of experts"):
        harvested(variant, f"neuron.{layer}")
