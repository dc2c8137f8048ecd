"""The columns are what SEMANTICS 4, 5 and 7 say: sums close, estimates are derivatives."""

from functools import partial
from typing import Any

import pytest
import torch

from services.common.addresses import parse
from services.inference.engine.attribution import NormMode
from services.inference.engine.columns import Column
from services.inference.engine.interventions import Add, Intervention, Scale, SetTo, Zero
from services.inference.engine.objectives import LogitDiff, LogitMinusMean, LogProb, OfLogits, Prob
from tests.inference import plain
from tests.inference.helpers import (
    FAMILIES,
    HEAD_WIDTH,
    LAYERS,
    WIDTH,
    direct_sums,
    explained,
    in_float64,
    matrices,
    random_engine,
    random_model,
)

__all__ = ["in_float64"]

IDS = (3, 17, 4, 4, 25, 60, 8, 1)
LAST = len(IDS) - 1
STEP = 1e-5
TWO = FAMILIES[:2]

VECTOR = torch.linspace(-1, 2, WIDTH, dtype=torch.float64)
HEAD_VECTOR = torch.linspace(1, -2, HEAD_WIDTH, dtype=torch.float64)

OBJECTIVES: dict[str, OfLogits] = {
    "logit_diff": LogitDiff((5, 6), (9, 11), LAST),
    "logit_diff without distractor": LogitDiff((5,), (), LAST),
    "logit_minus_mean": LogitMinusMean((5, 6), LAST),
    "log_prob": LogProb((5, 6), LAST),
    "prob": Prob((5, 6), LAST),
}
LINEAR = ("logit_diff", "logit_diff without distractor", "logit_minus_mean")


def plain_objective(objective: OfLogits, logits: torch.Tensor) -> float:
    """J by its definition, from logits [T, V]."""
    here = logits[objective.position].double()
    targets = here[list(objective.targets)]
    match objective:
        case LogitDiff(distractors=distractors):
            value = targets.sum() / len(objective.targets)
            if distractors:
                value = value - here[list(distractors)].sum() / len(distractors)
        case LogitMinusMean():
            value = targets.sum() / len(objective.targets) - here.sum() / len(here)
        case LogProb():
            value = (targets.exp().sum() / here.exp().sum()).log()
        case Prob():
            value = targets.exp().sum() / here.exp().sum()
    return float(value)


EDITED: dict[str, list[Intervention]] = {
    "plain": [],
    "neuron set": [Intervention(parse("neuron.1.7"), SetTo(2.5))],
    "heads zeroed": [
        Intervention(parse("head.1.2"), Zero()),
        Intervention(parse("head.2.1~7-3"), SetTo(0.8)),
    ],
    "steered": [
        Intervention(parse("resid_post.1"), Add(VECTOR)),
        Intervention(parse("resid_mid.2~7"), Add(2 * VECTOR)),
        Intervention(parse("embed~7"), Add(VECTOR)),
    ],
    "scaled": [
        Intervention(parse("mlp.0"), Scale(0.5)),
        Intervention(parse("attn.2~7"), Scale(-2.0)),
        Intervention(parse("resid_mid.1"), Scale(1.5)),
        Intervention(parse("embed"), Scale(3.0)),
    ],
    "sublayer zeroed": [
        Intervention(parse("attn.1"), Zero()),
        Intervention(parse("mlp.2"), Zero()),
    ],
    "stream cut": [Intervention(parse("resid_post.0"), SetTo(VECTOR))],
    "last stream scaled and moved": [
        Intervention(parse(f"resid_post.{LAYERS - 1}"), Add(VECTOR)),
        Intervention(parse(f"resid_post.{LAYERS - 1}"), Scale(0.3)),
    ],
    "head outputs": [
        Intervention(parse("head.2.1~7"), Scale(2.0)),
        Intervention(parse("head.2.1~7"), Add(HEAD_VECTOR)),
        Intervention(parse("head.1.0"), SetTo(HEAD_VECTOR)),
        Intervention(parse("head.0.3~7"), Zero()),
    ],
    "queries, keys and values": [
        Intervention(parse("head.2.1.v~2"), Add(HEAD_VECTOR)),
        Intervention(parse("head.2.1.v~2"), Scale(0.5)),
        Intervention(parse("head.2.2.v"), SetTo(HEAD_VECTOR)),
        Intervention(parse("head.1.0.k~3"), Scale(2.0)),
        Intervention(parse("head.2.3.q"), Add(HEAD_VECTOR)),
        Intervention(parse("head.2.1~7"), Scale(-1.0)),
    ],
}


@pytest.mark.parametrize("edits", EDITED)
@pytest.mark.parametrize("norm_mode", NormMode)
@pytest.mark.parametrize("family", TWO)
def test_direct_effects_and_remainder_sum_to_the_objective(
    family: str, norm_mode: NormMode, edits: str
) -> None:
    engine = random_engine(family)
    run = explained(IDS, *engine.edits(*EDITED[edits], tokens=len(IDS)))
    (explanation,) = engine.explain(run, norm_mode=norm_mode)
    total, size = direct_sums(explanation)
    assert abs(total - explanation.value) <= 1e-5 * size
    rest_is_zero = abs(explanation.remainder["rest"]) <= 1e-5 * size
    assert rest_is_zero is (norm_mode is not NormMode.LIVE)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("family", TWO)
def test_every_objective_is_its_definition_and_sums(family: str, name: str) -> None:
    objective = OBJECTIVES[name]
    (explanation,) = random_engine(family).explain(explained(IDS, objective=objective))
    logits = plain.forward(random_model(family, torch.float64), IDS)
    assert explanation.value == pytest.approx(plain_objective(objective, logits), rel=1e-4)
    total, size = direct_sums(explanation)
    assert abs(total - explanation.value) <= 1e-5 * size
    assert (abs(explanation.remainder["rest"]) <= 1e-5 * size) is (name in LINEAR)


def test_the_sum_does_not_close_without_any_one_remainder_row() -> None:
    engine = random_engine()
    run = explained(IDS, *engine.edits(*EDITED["steered"], tokens=len(IDS)))
    (explanation,) = engine.explain(run)
    total, size = direct_sums(explanation)
    names = {"edit.resid_post.1~7", "edit.resid_mid.2~7", "edit.embed~7", "bias.read"}
    assert names <= set(explanation.remainder)
    for name, value in explanation.remainder.items():
        if name != "rest":
            assert abs(total - value - explanation.value) > 1e-5 * size, name


def test_nodes_of_an_ablated_sublayer_have_no_direct_effect() -> None:
    engine = random_engine()
    run = explained(IDS, *engine.edits(*EDITED["sublayer zeroed"], tokens=len(IDS)))
    (explanation,) = engine.explain(run)
    direct = matrices(explanation, Column.DIRECT_EFFECT)
    assert float(direct[2].abs().max()) == 0
    assert float(direct[6].abs().max()) == 0
    assert explanation.remainder["bias.attn.1"] == 0
    assert explanation.remainder["bias.mlp.2"] == 0
    assert float(direct[1].abs().max()) > 0


def test_a_steering_vector_has_the_direct_effect_of_a_write() -> None:
    """Added after the last block, it moves J by exactly its row while the final scale is held."""
    model = random_model("gpt2", torch.float64)
    engine = random_engine("gpt2", torch.float64)
    wanted = Intervention(parse(f"resid_post.{LAYERS - 1}~7"), Add(VECTOR))
    (steered,) = engine.explain(explained(IDS, *engine.edits(wanted, tokens=len(IDS))))
    scales: plain.Scales = {}
    site = plain.edited(("resid_post", LAYERS - 1, (7,), lambda x: x + VECTOR))
    objective = LogitDiff((5,), (9, 11), LAST)
    with_vector = plain_objective(objective, plain.forward(model, IDS, site, scales=scales))
    held = {"final": scales["final"]}
    without = plain_objective(objective, plain.forward(model, IDS, held=held))
    assert steered.value == pytest.approx(with_vector, rel=1e-9)
    row = steered.remainder[f"edit.resid_post.{LAYERS - 1}~7"]
    assert row == pytest.approx(with_vector - without, rel=1e-9)


def test_group_totals_are_the_sums_of_their_columns() -> None:
    (explanation,) = random_engine().explain(explained(IDS))
    for group in explanation.groups:
        column = float(group.column(Column.DIRECT_EFFECT).double().sum())
        assert group.direct_total() == pytest.approx(column, abs=1e-5)


def test_live_reference_dot_is_about_zero() -> None:
    """A live norm ignores the length of its input: x_ref . g* vanishes, so rest carries J."""
    (explanation,) = random_engine("gpt2", torch.float64).explain(
        explained(IDS), norm_mode=NormMode.LIVE
    )
    constants = explanation.remainder["bias.read"]
    assert explanation.remainder["rest"] + constants == pytest.approx(explanation.value, rel=1e-3)


def slope(
    model: Any, kind: str, layer: int, index: Any, held: plain.Scales | None, objective: OfLogits
) -> float:
    """Central difference of J by one activation, in the pass written by hand."""
    values = []
    for step in (STEP, -STEP):
        site = plain.edited(
            (kind, layer, index, partial(torch.add, torch.tensor(step, dtype=torch.float64)))
        )
        values.append(plain_objective(objective, plain.forward(model, IDS, site, held)))
    return (values[0] - values[1]) / (2 * STEP)


NEURONS = [(0, 2, 5), (1, 7, 40), (2, 7, 63), (0, 7, 1)]
PAIRS = [(0, 3, 7, 2), (1, 1, 5, 5), (2, 0, 7, 4), (0, 2, 4, 0)]


def scales_held(model: Any, norm_mode: NormMode) -> plain.Scales:
    """The clean scales of the norms that the mode freezes."""
    scales: plain.Scales = {}
    plain.forward(model, IDS, scales=scales)
    match norm_mode:
        case NormMode.LIVE:
            return {}
        case NormMode.FINAL_NORM_FROZEN:
            return {"final": scales["final"]}
        case NormMode.ALL_NORMS_FROZEN:
            return scales


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("norm_mode", NormMode)
@pytest.mark.parametrize("family", FAMILIES)
def test_estimates_are_finite_differences(family: str, norm_mode: NormMode) -> None:
    """LIVE against the real model; frozen modes against a pass with just those scales held."""
    model = random_model(family, torch.float64)
    objective = LogitDiff((5,), (9, 11), LAST)
    (explanation,) = random_engine(family, torch.float64).explain(
        explained(IDS, objective=objective), norm_mode=norm_mode
    )
    held = scales_held(model, norm_mode)
    activation = matrices(explanation, Column.ACTIVATION)
    total = matrices(explanation, Column.TOTAL_EFFECT)
    for layer, t, n in NEURONS:
        expected = slope(model, "neurons", layer, (t, n), held, objective)
        expected *= float(activation[1 + LAYERS + layer][t, n])
        ours = float(total[1 + LAYERS + layer][t, n])
        assert ours == pytest.approx(expected, rel=1e-4, abs=1e-9)
    for layer, head, q, k in PAIRS:
        expected = slope(model, "probabilities", layer, (head, q, k), held, objective)
        expected *= float(activation[1 + layer][head, q, k])
        ours = float(total[1 + layer][head, q, k])
        assert ours == pytest.approx(expected, rel=1e-4, abs=1e-9)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("name", ["log_prob", "prob", "logit_minus_mean"])
def test_estimates_of_other_objectives_are_finite_differences(name: str) -> None:
    model = random_model("llama", torch.float64)
    objective = OBJECTIVES[name]
    (explanation,) = random_engine("llama", torch.float64).explain(
        explained(IDS, objective=objective), norm_mode=NormMode.LIVE
    )
    for layer, t, n in NEURONS:
        group = 1 + LAYERS + layer
        value = float(matrices(explanation, Column.ACTIVATION)[group][t, n])
        expected = value * slope(model, "neurons", layer, (t, n), None, objective)
        ours = float(matrices(explanation, Column.TOTAL_EFFECT)[group][t, n])
        assert ours == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_frozen_modes_are_not_the_derivative_of_the_real_model() -> None:
    """Negative control of the finite differences."""
    model = random_model("gpt2", torch.float64)
    objective = LogitDiff((5,), (9, 11), LAST)
    layer, t, n = NEURONS[3]
    real = slope(model, "neurons", layer, (t, n), None, objective)
    found = set()
    for norm_mode in NormMode:
        (explanation,) = random_engine("gpt2", torch.float64).explain(
            explained(IDS, objective=objective), norm_mode=norm_mode
        )
        value = float(matrices(explanation, Column.ACTIVATION)[1 + LAYERS + layer][t, n])
        total = float(matrices(explanation, Column.TOTAL_EFFECT)[1 + LAYERS + layer][t, n])
        found.add(round(total / value, 6))
        if norm_mode is not NormMode.LIVE:
            assert total / value != pytest.approx(real, rel=1e-2)
    assert len(found) == 3


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("family", TWO)
def test_ablating_a_last_layer_neuron_with_the_scale_held_moves_j_by_its_direct_effect(
    family: str,
) -> None:
    model = random_model(family, torch.float64)
    (explanation,) = random_engine(family, torch.float64).explain(explained(IDS))
    held = scales_held(model, NormMode.FINAL_NORM_FROZEN)
    for n in (0, 31, 63):
        site = plain.edited(("neurons", LAYERS - 1, (LAST, n), torch.zeros_like))
        logits = plain.forward(model, IDS, site, held)
        without = plain_objective(LogitDiff((5,), (9, 11), LAST), logits)
        direct = float(matrices(explanation, Column.DIRECT_EFFECT)[2 * LAYERS][LAST, n])
        assert explanation.value - without == pytest.approx(direct, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("family", TWO)
def test_write_magnitude_is_the_length_of_the_write(family: str) -> None:
    engine = random_engine(family)
    (explanation,) = engine.explain(explained(IDS))
    magnitude = matrices(explanation, Column.WRITE_MAGNITUDE)
    seen: dict[str, torch.Tensor] = {}

    def remember(kind: str, layer: int | None, values: torch.Tensor) -> torch.Tensor:
        if layer in (None, 1):
            seen[kind] = values
        return values

    model: Any = random_model(family)
    plain.forward(model, IDS, remember)
    if family == "gpt2":
        down, out = (
            part.c_proj.weight for part in (model.transformer.h[1].mlp, model.transformer.h[1].attn)
        )
    else:
        block = model.model.layers[1]
        down, out = block.mlp.down_proj.weight.T, block.self_attn.o_proj.weight.T
    neurons = (seen["neurons"][:, :, None] * down).norm(dim=-1)
    assert torch.allclose(magnitude[1 + LAYERS + 1], neurons, rtol=1e-4, atol=1e-6)
    assert torch.allclose(magnitude[0], seen["embed"].norm(dim=-1), rtol=1e-5)
    w_o = out.view(4, HEAD_WIDTH, WIDTH)
    writes = torch.einsum("hqk,hke,hed->hqkd", seen["probabilities"], seen["v"], w_o)
    assert torch.allclose(magnitude[2], writes.norm(dim=-1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", TWO)
def test_two_runs_in_one_batch_are_the_two_runs_alone(family: str) -> None:
    engine = random_engine(family)
    edits = engine.edits(*EDITED["queries, keys and values"], tokens=len(IDS))
    long = explained(IDS, *edits)
    short = explained(IDS[:5], objective=LogProb((2, 3), 3))
    together = engine.explain(long, short)
    for run, batched in zip((long, short), together, strict=True):
        (alone,) = engine.explain(run)
        assert batched.value == pytest.approx(alone.value, rel=1e-5)
        for column in Column:
            for ours, theirs in zip(
                matrices(batched, column), matrices(alone, column), strict=True
            ):
                assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_the_position_of_the_objective_counts() -> None:
    engine = random_engine()
    objective = LogitDiff((5,), (9, 11), 3)
    (early,) = engine.explain(explained(IDS, objective=objective))
    total = matrices(early, Column.TOTAL_EFFECT)
    assert all(float(part[4:].abs().max()) == 0 for part in (total[0], total[4], total[5]))
    expected = plain_objective(objective, plain.forward(random_model(), IDS))
    assert early.value == pytest.approx(expected, rel=1e-5)


def test_an_edited_node_is_reported_at_its_edited_value() -> None:
    engine = random_engine()
    edits = engine.edits(Intervention(parse("head.1.2~6-3"), SetTo(0.75)), tokens=len(IDS))
    (explanation,) = engine.explain(explained(IDS, *edits))
    assert float(matrices(explanation, Column.ACTIVATION)[2][2, 6, 3]) == 0.75
    edits = engine.edits(Intervention(parse("head.2.2~7"), Zero()), tokens=len(IDS))
    (explanation,) = engine.explain(explained(IDS, *edits))
    assert float(matrices(explanation, Column.ACTIVATION)[3][2, 7].abs().max()) == 0
    assert float(matrices(explanation, Column.DIRECT_EFFECT)[3][2, 7].abs().max()) == 0
    assert float(matrices(explanation, Column.DIRECT_EFFECT)[3][1, 7].abs().max()) > 0
