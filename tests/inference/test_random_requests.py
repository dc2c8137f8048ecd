"""Random prompts, edits and objectives: the engine is the pass written by hand, and sums close.

A tenth of the examples in `make test`, all of them in `make test-long`.
"""

import gc
from functools import partial
from typing import Any

import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from services.common.addresses import Address, Kind
from services.inference.engine.attribution import ExplainedRun, NormMode
from services.inference.engine.captured import Row
from services.inference.engine.columns import Column
from services.inference.engine.interventions import Add, Intervention, Operation, Scale, SetTo, Zero
from services.inference.engine.objectives import LogitDiff
from tests.inference import plain
from tests.inference.helpers import (
    HEAD_WIDTH,
    HEADS,
    LAYERS,
    NEURONS,
    VOCABULARY,
    WIDTH,
    Engine,
    random_engine,
    random_model,
)

EXAMPLES = 30
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
}


@st.composite
def prompts(draw: st.DrawFn) -> tuple[int, ...]:
    return tuple(draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=12)))


@st.composite
def interventions(draw: st.DrawFn, tokens: int) -> Intervention:
    kind = draw(st.sampled_from(list(SITES)))
    layer = None if kind is Kind.EMBED else draw(st.integers(0, LAYERS - 1))
    index = None
    if kind is Kind.NEURON:
        index = draw(st.integers(0, NEURONS - 1))
    elif kind in (Kind.HEAD, Kind.QUERY, Kind.KEY, Kind.VALUE):
        index = draw(st.integers(0, HEADS - 1))
    position = draw(st.integers(0, tokens - 1))
    key = draw(st.none() | st.integers(0, position)) if kind is Kind.HEAD else None
    target = Address(kind, layer, index, position=position, key=key)
    width = HEAD_WIDTH if kind in (Kind.HEAD, Kind.QUERY, Kind.KEY, Kind.VALUE) else WIDTH
    number = draw(st.floats(-3, 3))
    scalar = kind is Kind.NEURON or key is not None
    value: float | Tensor = number if scalar else torch.linspace(-1, number, width).double()
    operations: list[Operation] = [Zero(), SetTo(value), Scale(number), Add(value)]
    operation = draw(st.sampled_from(operations))
    return Intervention(target, operation)


def place(target: Address) -> tuple[str, int | None, Any]:
    if target.key is not None:
        return "probabilities", target.layer, (target.index, target.position, target.key)
    site = SITES[target.kind]
    if site in ("q", "k", "v"):
        return site, target.layer, (target.index, target.position)
    if site in ("z", "neurons"):
        return site, target.layer, (target.position, target.index)
    return site, target.layer, (target.position,)


ENGINES: dict[str, tuple[Engine, Any]] = {}


def engine_of(family: str) -> tuple[Engine, Any]:
    if family not in ENGINES:
        ENGINES[family] = random_engine(family), random_model(family)
    return ENGINES[family]


def check(family: str, data: st.DataObject) -> None:
    engine, model = engine_of(family)
    ids = data.draw(prompts())
    wanted = data.draw(st.lists(interventions(len(ids)), max_size=4, unique_by=lambda i: i.target))
    pairs = {
        (i.target.layer, i.target.index, i.target.position)
        for i in wanted
        if i.target.key is not None
    }
    rows = {
        (i.target.layer, i.target.index, i.target.position)
        for i in wanted
        if i.target.kind is Kind.HEAD and i.target.key is None
    }
    if pairs & rows:  # a row and its pair may conflict: that refusal has tests of its own
        return
    edits = engine.edits(*wanted, tokens=len(ids))
    site = plain.edited(
        *((*place(each.target), partial(plain.apply, each.operation)) for each in wanted)
    )
    theirs = plain.forward(model, ids, site)
    ours = engine.hooks.run([Row(ids, edits)], range(len(ids)), gradients=False).logits[0]
    assert (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max()
    objective = LogitDiff((5,), (9,), data.draw(st.integers(0, len(ids) - 1)))
    norm_mode = data.draw(st.sampled_from(NormMode))
    (explanation,) = engine.explain(ExplainedRun(ids, edits, objective), norm_mode=norm_mode)
    columns = [group.column(Column.DIRECT_EFFECT).double() for group in explanation.groups]
    remainder = list(explanation.remainder.values())
    total = sum(float(column.sum()) for column in columns) + sum(remainder)
    size = sum(float(column.abs().sum()) for column in columns) + sum(map(abs, remainder))
    assert abs(total - explanation.value) <= 1e-5 * size + 1e-6


FAST = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
FULL = settings(max_examples=EXAMPLES * 10, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@FAST
@given(data=st.data())
def test_random_requests(family: str, data: st.DataObject) -> None:
    check(family, data)


@pytest.mark.long
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@FULL
@given(data=st.data())
def test_many_random_requests(family: str, data: st.DataObject) -> None:
    check(family, data)


def grown_mib(requests: int) -> float:
    """Growth of resident memory over the second half of `requests` attributions."""
    engine, _ = engine_of("gpt2")
    process = psutil.Process()
    middle = 0
    for number in range(requests):
        ids = tuple((number * 7 + place) % VOCABULARY for place in range(1 + number % 12))
        engine.explain(ExplainedRun(ids, (), LogitDiff((5,), (9,), len(ids) - 1)))
        if number == requests // 2:
            gc.collect()
            middle = process.memory_info().rss
    gc.collect()
    return (process.memory_info().rss - middle) / 2**20


def test_memory_is_flat() -> None:
    assert grown_mib(400) < 30


@pytest.mark.long
def test_memory_is_flat_over_many_requests() -> None:
    assert grown_mib(4000) < 30
