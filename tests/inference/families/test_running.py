"""Points, lens and generation of every variant of every family, against Hugging Face with hooks."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from services.common.addresses import Address, Kind, parse
from services.common.errors import InvalidArgument
from services.inference.engine import activations, points
from services.inference.engine.cancellation import CancelToken
from services.inference.engine.captured import Row
from services.inference.engine.generation import Continuation, Ending, Generated
from services.inference.engine.interventions import (
    Add,
    Edit,
    Intervention,
    Mask,
    Operation,
    ProjectOut,
    Scale,
    SetTo,
    Zero,
)
from services.inference.engine.lens import lens_logits
from services.inference.engine.points import Point
from services.inference.engine.sampling import Sampling
from services.inference.engine.text import Vocabulary
from tests.inference import plain
from tests.inference.families.models import (
    HEADS,
    IDS,
    LAYERS,
    NEURONS,
    VOCABULARY,
    WIDTH,
    edited,
    engine_of,
    reference_of,
)
from tests.inference.families.shared import close, every_variant
from tests.inference.helpers import Engine

LAST_LAYER = LAYERS - 1
SITES = {
    "embed": "embed",
    "z": "z",
    "attn_probs": "probabilities",
    "attn_out": "attn",
    "mlp_act": "neurons",
    "mlp_out": "mlp",
}


@every_variant
def test_points(variant: str) -> None:
    check_points(variant)


def check_points(variant: str) -> None:
    """Raises unless every point of a variant is what Hugging Face's pass has there."""
    seen: dict[tuple[str, int | None], Tensor] = {}

    def remember(kind: str, layer: int | None, values: Tensor) -> Tensor:
        seen[kind, layer] = values[0]
        return values

    logits = reference_of(variant).run(IDS, remember)[0]
    engine = engine_of(variant)
    architecture = engine.architecture
    wanted = {
        points.parse(f"{kind.name}.{layer}" if kind.of else kind.name, architecture)
        for kind in points.KINDS
        for layer in range(LAYERS)
        if kind.of != "D"
        and not (kind.name == "resid_mid" and architecture.parallel)
        and not (kind.name == "mlp_act" and architecture.layers[layer].experts)
    }
    rows = [Row(IDS), Row((*IDS, 9, 9))]
    current = engine.hooks.run(rows, range(len(IDS)), gradients=False, keep=frozenset(wanted))

    def ours(name: str, layer: int | None = None) -> Tensor:
        point = Point(name, layer)
        values = activations.read(point, architecture, current, 0)
        assert values.shape == points.shape(point, architecture, len(IDS))
        return values

    residual = seen["embed", None]
    for layer in range(LAYERS):
        weights = architecture.layers[layer]
        for name, site in SITES.items():
            where = None if name == "embed" else layer
            if name == "mlp_act" and weights.experts:
                continue
            assert close(ours(name, where), seen[site, where]), (name, layer)
        attended = residual + seen["attn", layer]
        if not architecture.parallel:
            assert close(ours("resid_mid", layer), attended)
        residual = attended + seen["mlp", layer]
        assert close(ours("resid_post", layer), residual)
        read = ours("resid_post", layer - 1) if layer else ours("embed")
        read = read if architecture.parallel else ours("resid_mid", layer)
        assert close(ours("mlp_in", layer), weights.mlp_norm.module(read))
        masked = ours("attn_probs", layer) == 0
        scores = ours("attn_scores", layer)
        if weights.attn_softcap is not None:
            scores = (scores / weights.attn_softcap).tanh() * weights.attn_softcap
        assert close(
            scores.masked_fill(masked, float("-inf")).softmax(-1), ours("attn_probs", layer)
        )
        values = ours("v", layer).transpose(0, 1)
        assert close((ours("attn_probs", layer) @ values).transpose(0, 1), ours("z", layer))
        dots = ours("q", layer).transpose(0, 1) @ ours("k", layer).permute(1, 2, 0)
        assert close(dots * weights.scaling, ours("attn_scores", layer))
    assert close(ours("logits"), logits)
    lens = lens_logits(architecture, ours("resid_post", LAST_LAYER)[None])[0]
    assert close(lens, logits)
    assert not close(lens_logits(architecture, ours("embed")[None])[0], logits)


PROMPT, NEW = IDS[:5], 6
TOKENS = len(PROMPT) + NEW - 1
VECTOR = torch.linspace(-1, 2, WIDTH, dtype=torch.float64)
BY_HAND: list[tuple[Intervention, tuple[str, int | None, Any]]] = [
    (Intervention(parse("neuron.0.7"), SetTo(3.0)), ("neurons", 0, (7,))),
    (Intervention(parse("attn.1"), Scale(2.0), tuple(range(4, TOKENS))), ("attn", 1, ())),
    (Intervention(parse("mlp.2~6"), Zero()), ("mlp", 2, ())),
    (Intervention(parse("embed"), Add(VECTOR), (1, 7)), ("embed", None, ())),
    (Intervention(parse("head.1.2"), Scale(-1.0), tuple(range(5, TOKENS))), ("z", 1, (2,))),
    (Intervention(parse("head.0.1~9-7"), SetTo(0.9)), ("probabilities", 0, (1, 9, 7))),
]
"""Interventions and their places in Hugging Face's pass; positions are put first, but in pairs."""
WITHOUT_A_CACHE = [
    Intervention(parse("head.0.2~8-6"), Mask()),
    Intervention(parse("head.0.2~3-2"), Mask()),
    Intervention(parse("mlp.0"), ProjectOut(VECTOR)),
    Intervention(parse("resid_post.1"), Add(0.3 * VECTOR, relative=True), (2, 6, 8)),
    Intervention(parse("head.0.3.k"), Scale(-3.0)),
    Intervention(parse("head.1.0.k~1"), Zero()),
    Intervention(parse("head.1.1.v"), Scale(2.0), (2, 6, 7)),
    Intervention(parse("head.2.2.q"), Scale(3.0)),
]


def continued(variant: str, edits: Sequence[Edit]) -> list[Generated]:
    continuation = Continuation(
        engine_of(variant).hooks,
        Vocabulary(VOCABULARY, None),
        PROMPT,
        edits,
        Sampling(),
        Ending(NEW),
        top=VOCABULARY,
    )
    return [continuation.step(CancelToken()) for _ in range(NEW)]


def is_close(step: Generated, logits: Tensor) -> bool:
    ours = torch.tensor(sorted(step.top), dtype=torch.float64)[:, 1]
    return bool((ours - logits.double().log_softmax(-1)).abs().max() < 1e-4)


@every_variant
def test_generation(variant: str) -> None:
    """Every step over the cache is Hugging Face's pass over all tokens, or our own without one."""
    engine = engine_of(variant)
    edits = engine.edits(*(each for each, _ in BY_HAND), tokens=TOKENS)
    ids = list(PROMPT)
    for step in continued(variant, edits):
        changes = []
        for edit, (intervention, (kind, layer, index)) in zip(edits, BY_HAND, strict=True):
            here = [position for position in edit.positions if position < len(ids)]
            if here:
                where = (0, *index) if kind == "probabilities" else (0, here, *index)
                change = partial(plain.apply, intervention.operation)
                changes.append((kind, layer, where, change))
        logits = reference_of(variant).run(ids, edited(*changes))[0, -1]
        assert is_close(step, logits)
        ids.append(step.token_id)
    assert not is_close(step, reference_of(variant).run(ids[:-1], edited())[0, -1])

    edits = engine.edits(*WITHOUT_A_CACHE, tokens=TOKENS)
    ids = list(PROMPT)
    for step in continued(variant, edits):
        row = Row(tuple(ids), within(edits, len(ids)))
        uncached = engine.hooks.run([row], [len(ids) - 1], gradients=False).logits[0, 0]
        assert is_close(step, uncached)
        ids.append(step.token_id)
    assert not is_close(step, reference_of(variant).run(ids[:-1], edited())[0, -1])


_SPAN = {
    Kind.NEURON: NEURONS,
    **dict.fromkeys((Kind.HEAD, Kind.QUERY, Kind.KEY, Kind.VALUE), HEADS),
}


@st.composite
def interventions(draw: st.DrawFn, engine: Engine) -> Intervention:
    kinds = [*_SPAN, Kind.EMBED, Kind.ATTN, Kind.MLP, Kind.RESID_MID, Kind.RESID_POST]
    kind = draw(st.sampled_from(kinds))
    layer = None if kind is Kind.EMBED else draw(st.integers(0, LAYERS - 1))
    index = draw(st.integers(0, _SPAN[kind] - 1)) if kind in _SPAN else None
    position = draw(st.none() | st.integers(0, TOKENS - 1))
    key = None
    if kind is Kind.HEAD and position is not None and layer is not None:
        visible = engine.architecture.shape.first_visible(layer, position)
        key = draw(st.none() | st.integers(visible, position))
    target = Address(kind, layer, index, position=position, key=key)
    positions = None
    if position is None:
        positions = tuple(draw(st.sets(st.integers(0, TOKENS - 1), min_size=1)))
    number = draw(st.floats(-3, 3))
    vector = torch.linspace(-1, number, engine.architecture.widths.of(target)).double()
    operations: list[Operation] = [Zero(), Scale(number)]
    if kind is Kind.NEURON or key is not None:
        operations += [SetTo(number), Add(number)]
    else:
        operations += [SetTo(vector), Add(vector), Add(vector, relative=True), ProjectOut(vector)]
    if key is not None:
        operations.append(Mask())
    return Intervention(target, draw(st.sampled_from(operations)), positions)


@pytest.mark.parametrize("variant", ["gpt2/tied", "llama/grouped", "mistral/window"])
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_random_edits_of_a_growing_sequence(variant: str, data: st.DataObject) -> None:
    engine = engine_of(variant)
    wanted = data.draw(st.lists(interventions(engine), min_size=1, max_size=5))
    try:
        edits = engine.edits(*wanted, tokens=TOKENS)
    except InvalidArgument:  # two of them set one value, or mask a whole row
        return
    ids = list(PROMPT)
    for step in continued(variant, edits):
        row = Row(tuple(ids), within(edits, len(ids)))
        assert is_close(step, engine.hooks.run([row], [len(ids) - 1], gradients=False).logits[0, 0])
        ids.append(step.token_id)


def within(edits: Sequence[Edit], tokens: int) -> tuple[Edit, ...]:
    """The edits at positions that exist in a pass over so many tokens."""
    found = []
    for edit in edits:
        positions = tuple(position for position in edit.positions if position < tokens)
        if positions:
            found.append(edit.only(positions))
    return tuple(found)
