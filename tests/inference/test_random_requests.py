"""Random prompts, edits and objectives: the engine is the pass written by hand, and sums close.

A tenth of the examples in `make test`, all of them in `make test-long`.
"""

import gc
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
from services.inference.engine.interventions import (
    Add,
    Intervention,
    Mask,
    Mean,
    Operation,
    Patch,
    ProjectOut,
    Scale,
    SetTo,
    Source,
    Zero,
)
from services.inference.engine.objectives import LogitDiff
from tests.inference import by_hand, plain
from tests.inference.helpers import (
    HEAD_WIDTH,
    HEADS,
    LAYERS,
    NEURONS,
    VOCABULARY,
    WIDTH,
    Engine,
    direct_sums,
    random_engine,
    random_model,
)

EXAMPLES = 30
KINDS = [kind for kind in by_hand.SITES if kind not in (Kind.BIAS_ATTN, Kind.BIAS_MLP)]


@st.composite
def prompts(draw: st.DrawFn) -> tuple[int, ...]:
    return tuple(draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=12)))


def prompts_of(tokens: int) -> st.SearchStrategy[tuple[int, ...]]:
    ids = st.integers(0, VOCABULARY - 1)
    return st.lists(ids, min_size=tokens, max_size=tokens).map(tuple)


@st.composite
def interventions(draw: st.DrawFn, tokens: int) -> Intervention:
    kind = draw(st.sampled_from(KINDS))
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
    prompts = tuple(Source(draw(prompts_of(tokens))) for _ in range(draw(st.integers(1, 3))))
    source = draw(prompts_of(tokens + 2))
    aligned = ((position, position + 2), *(() if key in (None, position) else ((key, key + 1),)))
    inner = Intervention(Address(Kind.NEURON, 0, 3), SetTo(number))
    operations: list[Operation] = [Zero(), SetTo(value), Scale(number), Add(value)]
    operations += [Mean(prompts, per_position=True), Patch(Source(source, (inner,)), aligned)]
    if key is None:
        operations.append(Mean((*prompts, Source(source))))
    elif position:
        operations.append(Mask())
    if isinstance(value, Tensor):
        operations += [Add(value, relative=True), ProjectOut(value)]
    return Intervention(target, draw(st.sampled_from(operations)))


ENGINES: dict[str, tuple[Engine, Any]] = {}


def engine_of(family: str) -> tuple[Engine, Any]:
    if family not in ENGINES:
        ENGINES[family] = random_engine(family), random_model(family)
    return ENGINES[family]


@st.composite
def runs(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Intervention], LogitDiff]:
    """A prompt, edits that do not refuse each other, and an objective."""
    ids = draw(prompts())
    wanted = draw(st.lists(interventions(len(ids)), max_size=4, unique_by=lambda i: i.target))
    pairs = {
        (i.target.layer, i.target.index, i.target.position)
        for i in wanted
        if i.target.key is not None
    }
    # A row and its pair may conflict, and masks may use up a row: refusals have their own tests.
    rows = [
        i
        for i in wanted
        if i.target.kind is Kind.HEAD
        and i.target.key is None
        and (i.target.layer, i.target.index, i.target.position) in pairs
    ]
    masks = [i for i in wanted if isinstance(i.operation, Mask)]
    kept = [i for i in wanted if i not in rows and i not in masks[1:]]
    return ids, kept, LogitDiff((5,), (9,), draw(st.integers(0, len(ids) - 1)))


def check(family: str, data: st.DataObject) -> None:
    engine, model = engine_of(family)
    ids, wanted, objective = data.draw(runs())
    edits = engine.edits(*wanted, tokens=len(ids))
    theirs = plain.forward(model, ids, by_hand.edited(model, wanted, len(ids)))
    ours = engine.hooks.run([Row(ids, edits)], range(len(ids)), gradients=False).logits[0]
    assert (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max()
    norm_mode = data.draw(st.sampled_from(NormMode))
    (explanation,) = engine.explain(ExplainedRun(ids, edits, objective), norm_mode=norm_mode)
    total, size = direct_sums(explanation)
    assert abs(total - explanation.value) <= 1e-5 * size + 1e-6


def check_batch(family: str, data: st.DataObject) -> None:
    """Runs of one batch are the runs alone, in every column."""
    engine, _ = engine_of(family)
    batch = [
        ExplainedRun(ids, engine.edits(*wanted, tokens=len(ids)), objective)
        for ids, wanted, objective in data.draw(st.lists(runs(), min_size=2, max_size=3))
    ]
    norm_mode = data.draw(st.sampled_from(NormMode))
    together = engine.explain(*batch, norm_mode=norm_mode)
    for run, batched in zip(batch, together, strict=True):
        (alone,) = engine.explain(run, norm_mode=norm_mode)
        assert abs(batched.value - alone.value) <= 1e-5 * max(1.0, abs(alone.value))
        for column in Column:
            ours = torch.cat([group.column(column) for group in batched.groups])
            theirs = torch.cat([group.column(column) for group in alone.groups])
            assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max() + 1e-7
        for left, right in zip(batched.receipts, alone.receipts, strict=True):
            assert left.delta_norm == pytest.approx(right.delta_norm, rel=1e-4, abs=1e-6)


FAST = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
BATCHES = settings(
    max_examples=EXAMPLES // 3, deadline=None, suppress_health_check=list(HealthCheck)
)
FULL = settings(max_examples=EXAMPLES * 10, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@FAST
@given(data=st.data())
def test_random_requests(family: str, data: st.DataObject) -> None:
    check(family, data)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@BATCHES
@given(data=st.data())
def test_random_batches(family: str, data: st.DataObject) -> None:
    check_batch(family, data)


@pytest.mark.long
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@FULL
@given(data=st.data())
def test_many_random_batches(family: str, data: st.DataObject) -> None:
    check_batch(family, data)


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
