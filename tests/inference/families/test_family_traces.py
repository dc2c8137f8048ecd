"""Traced nodes on every variant of every family: Hugging Face's own values, slopes, and sums."""

from functools import partial

import pytest
import torch
from torch import Tensor

from services.common.addresses import parse
from services.inference.engine.attribution import Explanation, NormMode
from services.inference.engine.columns import Column
from services.inference.engine.objectives import LogitDiff, Objective
from services.inference.engine.tracing import (
    Branch,
    Side,
    TracedNeuron,
    TracedScore,
    TracedValue,
)
from tests.inference.families.models import (
    EXPERT_VARIANTS,
    IDS,
    VARIANTS,
    KeepDouble,
    Scales,
    Site,
    edited,
    engine_of,
    reference_of,
    scales_held,
    untouched,
)
from tests.inference.families.shared import direct_sums, edits_of
from tests.inference.helpers import explained

LAYER, HEAD, QUERY, KEY = 1, 2, 6, 4
PAIR = parse("head.1.2~6-4")
STEP = 1e-5
Seen = dict[tuple[str, int | None], Tensor]

every_model = pytest.mark.parametrize("variant", [*VARIANTS, *EXPERT_VARIANTS])


def traces_of(variant: str) -> dict[str, Objective]:
    """Every trace that the variant has."""
    plain = LogitDiff((5,), (9, 11), QUERY)
    found: dict[str, Objective] = {
        "query": TracedScore(PAIR, Side.QUERY),
        "key": TracedScore(PAIR, Side.KEY),
        "both": TracedScore(PAIR, Side.BOTH),
        "probability": TracedScore(PAIR, Side.BOTH, post=True),
        "probability, query": TracedScore(PAIR, Side.QUERY, post=True),
        "probability, key": TracedScore(PAIR, Side.KEY, post=True),
        "value": TracedValue(PAIR, plain),
        "value on a key": TracedValue(PAIR, TracedScore(parse("head.2.0~8-6"), Side.KEY)),
    }
    layer = engine_of(variant).architecture.layers[LAYER]
    if not layer.experts:
        node = parse("neuron.1.7~6")
        found["neuron"] = TracedNeuron(node, Branch.GATE)
        found["activation"] = TracedNeuron(node, None)
    if layer.gated:
        found["up"] = TracedNeuron(parse("neuron.1.7~6"), Branch.UP)
    return found


def seen_by(variant: str, site: Site, held: Scales) -> Seen:
    """What Hugging Face's own pass shows at each site of the reference."""
    seen: Seen = {}

    def watch(kind: str, layer: int | None, values: Tensor) -> Tensor:
        seen[kind, layer] = site(kind, layer, values)
        return seen[kind, layer]

    reference_of(variant, torch.float64).run(IDS, watch, held)
    return seen


def by_hand(variant: str, name: str, seen: Seen, clean: Seen) -> float:
    """The traced value, of Hugging Face's tensors."""
    if name == "activation":
        return float(seen["neurons", LAYER][0, 6, 7])
    if name == "probability":
        return float(seen["probabilities", LAYER][0, HEAD, QUERY, KEY])
    query = (clean if name == "key" else seen)["q", LAYER][0, HEAD, QUERY]
    keys = (clean if name == "query" else seen)["k", LAYER][0]
    key = keys[HEAD * len(keys) // seen["q", LAYER].shape[1], KEY]
    return float(query @ key) * engine_of(variant, torch.float64).architecture.layers[LAYER].scaling


@pytest.mark.parametrize("norm_mode", [NormMode.LIVE, NormMode.ALL_NORMS_FROZEN])
@every_model
def test_tracing(variant: str, norm_mode: NormMode) -> None:
    names = [
        name
        for name in ("query", "key", "both", "probability", "activation")
        if name in traces_of(variant)
    ]
    with KeepDouble():
        held = scales_held(variant, norm_mode)
        clean = seen_by(variant, untouched, held)
        found = engine_of(variant, torch.float64).explain(
            *(explained(IDS, objective=traces_of(variant)[name]) for name in names),
            norm_mode=norm_mode,
        )
        for name, explanation in zip(names, found, strict=True):
            expected = by_hand(variant, name, clean, clean)
            assert explanation.value == pytest.approx(expected, rel=1e-6), name
        for token in (2, 5):
            moved = [
                seen_by(
                    variant,
                    edited(("embed", None, (0, token), partial(torch.mul, 1 + step))),
                    held,
                )
                for step in torch.tensor([STEP, -STEP], dtype=torch.float64)
            ]
            for name, explanation in zip(names, found, strict=True):
                values = [by_hand(variant, name, each, clean) for each in moved]
                slope = (values[0] - values[1]) / (2 * STEP)
                total = float(explanation.groups[0].column(Column.TOTAL_EFFECT)[token])
                assert total == pytest.approx(slope, rel=1e-4, abs=1e-7), name


@every_model
def test_tracing_sums(variant: str) -> None:
    engine = engine_of(variant)
    traces = traces_of(variant)
    edits = edits_of(engine)
    if engine.architecture.layers[LAYER].experts:
        edits = {"plain": []}
    cases = [(mode, "plain") for mode in NormMode]
    cases += [(NormMode.FINAL_NORM_FROZEN, name) for name in edits if name != "plain"]
    for norm_mode, name in cases:
        applied = engine.edits(*edits[name], tokens=len(IDS))
        runs = [explained(IDS, *applied, objective=each) for each in traces.values()]
        found = engine.explain(*runs, norm_mode=norm_mode)
        for trace, explanation in zip(traces, found, strict=True):
            check_sum(trace, explanation, norm_mode)


def check_sum(trace: str, explanation: Explanation, norm_mode: NormMode) -> None:
    total, size = direct_sums(explanation)
    assert abs(total - explanation.value) <= 1e-5 * size, trace
    rest = explanation.remainder["rest"]
    if norm_mode is NormMode.LIVE or trace.startswith(("probability", "activation")):
        return
    expected = -explanation.value if trace == "both" else 0.0
    assert abs(rest - expected) <= 1e-5 * size, trace


@every_model
def test_a_probability_is_the_listed_one_and_a_value_the_listed_direct_effect(
    variant: str,
) -> None:
    engine = engine_of(variant)
    traces = traces_of(variant)
    value = traces["value"]
    assert isinstance(value, TracedValue)
    names = ["probability", "probability, query", "probability, key", "value"]
    objectives = [value.downstream, *(traces[name] for name in names)]
    table, *found = engine.explain(*(explained(IDS, objective=each) for each in objectives))
    heads = table.groups[1 + LAYER]
    pair = heads.find(PAIR)
    assert pair is not None
    listed = float(heads.column(Column.ACTIVATION)[pair])
    for explanation in found[:3]:
        assert explanation.value == pytest.approx(listed, rel=1e-5)
    direct = heads.column(Column.DIRECT_EFFECT)
    largest = float(direct.abs().max())
    expected = float(direct[pair])
    assert found[3].value == pytest.approx(expected, rel=1e-4, abs=1e-5 * largest)
    assert expected != 0
