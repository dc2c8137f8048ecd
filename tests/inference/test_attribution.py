"""The columns are what SEMANTICS 4 and 5 say: sums close, estimates are derivatives."""

import pytest
import torch

from services.common.addresses import parse
from services.inference.engine.attribution import Explanation, NormMode
from services.inference.engine.columns import Column
from services.inference.engine.interventions import Edit, Intervention, SetValue, Zero, resolve
from tests.inference.helpers import (
    Engine,
    explained,
    final_scale,
    matrices,
    plain_edits,
    plain_objective,
    random_engine,
    random_model,
)

IDS = (3, 17, 4, 4, 25, 60, 8, 1)
STEP = 1e-5


def edits(engine: Engine, *wanted: Intervention, tokens: int = len(IDS)) -> tuple[Edit, ...]:
    return resolve(wanted, engine.architecture.shape, tokens)


def direct_sums(explanation: Explanation) -> tuple[float, float]:
    """Sum of all direct effects and remainder rows, and the sum of their absolute values."""
    columns = [group.column(Column.DIRECT_EFFECT).double() for group in explanation.groups]
    remainder = explanation.remainder.values()
    total = sum(float(column.sum()) for column in columns) + sum(remainder)
    size = sum(float(column.abs().sum()) for column in columns) + sum(map(abs, remainder))
    return total, size


EDITED = [
    (),
    (Intervention(parse("neuron.1.7~3"), SetValue(2.5)),),
    (Intervention(parse("head.1.2"), Zero()), Intervention(parse("head.2.1~7-3"), SetValue(0.8))),
]


@pytest.mark.parametrize("wanted", EDITED, ids=["plain", "neuron set", "heads edited"])
@pytest.mark.parametrize("norm_mode", NormMode)
def test_direct_effects_and_remainder_sum_to_the_objective(
    norm_mode: NormMode, wanted: tuple[Intervention, ...]
) -> None:
    engine = random_engine()
    run = explained(IDS, *edits(engine, *wanted))
    (explanation,) = engine.explain(run, norm_mode=norm_mode)
    total, size = direct_sums(explanation)
    assert abs(total - explanation.value) <= 1e-5 * size
    rest_is_zero = abs(explanation.remainder["rest"]) <= 1e-5 * size
    assert rest_is_zero is (norm_mode is not NormMode.LIVE)


def test_the_sum_does_not_close_without_any_one_remainder_row() -> None:
    (explanation,) = random_engine().explain(explained(IDS))
    total, size = direct_sums(explanation)
    for name, value in explanation.remainder.items():
        if name != "rest":
            assert abs(total - value - explanation.value) > 1e-5 * size, name


def test_group_totals_are_the_sums_of_their_columns() -> None:
    (explanation,) = random_engine().explain(explained(IDS))
    for group in explanation.groups:
        column = float(group.column(Column.DIRECT_EFFECT).double().sum())
        assert group.direct_total() == pytest.approx(column, abs=1e-5)


def test_live_reference_dot_is_about_zero() -> None:
    """A live norm ignores the length of its input: x_ref . g* vanishes, so rest carries J."""
    (explanation,) = random_engine(torch.float64).explain(explained(IDS), norm_mode=NormMode.LIVE)
    constants = explanation.remainder["bias.read"]
    assert explanation.remainder["rest"] + constants == pytest.approx(explanation.value, rel=1e-3)


def central_difference(value: float, site: str, place: tuple[int, ...], held: bool) -> float:
    """(J(x + h) - J(x - h)) / 2h for one activation, by a float64 forward pass of Hugging Face."""
    model = random_model(torch.float64)
    run = explained(IDS)
    scale = final_scale(model, IDS) if held else None
    results = []
    for step in (STEP, -STEP):

        def moved(values: torch.Tensor, step: float = step) -> torch.Tensor:
            changed = values.clone()
            changed[place[1:]] += step
            return changed

        with plain_edits(model, **{site: {place[0]: moved}}, final_scale=scale):  # type: ignore[arg-type]
            results.append(plain_objective(model, run))
    return value * (results[0] - results[1]) / (2 * STEP)


NEURON_PLACES = [(layer, 0, t, n) for layer, t, n in [(0, 2, 5), (1, 7, 40), (2, 7, 63), (0, 7, 1)]]
PAIR_PLACES = [(0, 0, 3, 7, 2), (1, 0, 1, 5, 5), (2, 0, 0, 7, 4), (0, 0, 2, 4, 0)]


@pytest.mark.parametrize(
    ("norm_mode", "held"), [(NormMode.LIVE, False), (NormMode.FINAL_NORM_FROZEN, True)]
)
def test_estimates_are_finite_differences(norm_mode: NormMode, held: bool) -> None:
    (explanation,) = random_engine(torch.float64).explain(explained(IDS), norm_mode=norm_mode)
    activation = matrices(explanation, Column.ACTIVATION)
    total = matrices(explanation, Column.TOTAL_EFFECT)
    for layer, _, t, n in NEURON_PLACES:
        value = float(activation[4 + layer][t, n])
        expected = central_difference(value, "neurons", (layer, 0, t, n), held)
        assert float(total[4 + layer][t, n]) == pytest.approx(expected, rel=1e-4, abs=1e-9)
    for layer, _, head, q, k in PAIR_PLACES:
        value = float(activation[1 + layer][head, q, k])
        expected = central_difference(value, "probabilities", (layer, 0, head, q, k), held)
        assert float(total[1 + layer][head, q, k]) == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_default_mode_is_not_the_derivative_of_the_real_model() -> None:
    (explanation,) = random_engine(torch.float64).explain(explained(IDS))
    activation = matrices(explanation, Column.ACTIVATION)
    total = matrices(explanation, Column.TOTAL_EFFECT)
    layer, _, t, n = NEURON_PLACES[2]
    real = central_difference(
        float(activation[4 + layer][t, n]), "neurons", (layer, 0, t, n), False
    )
    assert float(total[4 + layer][t, n]) != pytest.approx(real, rel=1e-2)


def test_all_norms_frozen_freezes_the_block_norms_too() -> None:
    """Holding the block norms changes what an early neuron's effect is estimated to be."""
    engine = random_engine(torch.float64)
    (default,) = engine.explain(explained(IDS))
    (frozen,) = engine.explain(explained(IDS), norm_mode=NormMode.ALL_NORMS_FROZEN)
    assert frozen.value == default.value
    layer, _, t, n = NEURON_PLACES[3]
    a = matrices(default, Column.TOTAL_EFFECT)[4 + layer][t, n]
    b = matrices(frozen, Column.TOTAL_EFFECT)[4 + layer][t, n]
    assert float(a) != pytest.approx(float(b), rel=1e-2)


def test_all_norms_frozen_is_the_derivative_with_every_scale_held() -> None:
    model = random_model(torch.float64)
    norms = [norm for block in model.transformer.h for norm in (block.ln_1, block.ln_2)]
    norms.append(model.transformer.ln_f)
    scales: list[torch.Tensor] = []
    for norm in norms:
        norm.register_forward_pre_hook(
            lambda module, args: (
                scales.append((args[0].var(-1, keepdim=True, correction=0) + module.eps).sqrt())
                if len(scales) < len(norms)
                else None
            )
        )
    clean = plain_objective(model, explained(IDS))
    for norm, scale in zip(norms, list(scales), strict=True):
        norm.register_forward_hook(
            lambda module, args, output, scale=scale: (
                (args[0] - args[0].mean(-1, keepdim=True)) / scale * module.weight + module.bias
            )
        )
    assert plain_objective(model, explained(IDS)) == pytest.approx(clean, rel=1e-12)
    (explanation,) = random_engine(torch.float64).explain(
        explained(IDS), norm_mode=NormMode.ALL_NORMS_FROZEN
    )
    for layer, _, t, n in NEURON_PLACES:
        results = []
        for step in (STEP, -STEP):

            def moved(a: torch.Tensor, step: float = step, t: int = t, n: int = n) -> torch.Tensor:
                changed = a.clone()
                changed[0, t, n] += step
                return changed

            with plain_edits(model, neurons={layer: moved}):
                results.append(plain_objective(model, explained(IDS)))
        slope = (results[0] - results[1]) / (2 * STEP)
        value = float(matrices(explanation, Column.ACTIVATION)[4 + layer][t, n])
        ours = float(matrices(explanation, Column.TOTAL_EFFECT)[4 + layer][t, n])
        assert ours == pytest.approx(value * slope, rel=1e-4, abs=1e-9)


def test_ablating_a_last_layer_neuron_with_the_scale_held_changes_j_by_its_direct_effect() -> None:
    model = random_model(torch.float64)
    (explanation,) = random_engine(torch.float64).explain(explained(IDS))
    scale = final_scale(model, IDS)
    for n in (0, 31, 63):

        def zeroed(a: torch.Tensor, n: int = n) -> torch.Tensor:
            changed = a.clone()
            changed[0, 7, n] = 0
            return changed

        with plain_edits(model, neurons={2: zeroed}, final_scale=scale):
            without = plain_objective(model, explained(IDS))
        direct = float(matrices(explanation, Column.DIRECT_EFFECT)[6][7, n])
        assert explanation.value - without == pytest.approx(direct, rel=1e-9, abs=1e-12)


def test_write_magnitude_is_the_length_of_the_write() -> None:
    model = random_model()
    (explanation,) = random_engine().explain(explained(IDS))
    activation = matrices(explanation, Column.ACTIVATION)
    magnitude = matrices(explanation, Column.WRITE_MAGNITUDE)
    w_out = model.transformer.h[1].mlp.c_proj.weight
    expected = (activation[5][:, :, None] * w_out).norm(dim=-1)
    assert torch.allclose(magnitude[5], expected, rtol=1e-4)
    assert (magnitude[5] >= 0).all()
    embed = model.transformer.wte(torch.tensor(IDS)) + model.transformer.wpe.weight[: len(IDS)]
    assert torch.allclose(magnitude[0], embed.norm(dim=-1), rtol=1e-5)


def test_two_runs_in_one_batch_are_the_two_runs_alone() -> None:
    engine = random_engine()
    long = explained(IDS, *edits(engine, Intervention(parse("head.0.1~6-2"), SetValue(0.6))))
    short = explained(IDS[:5], targets=(2, 3), distractors=(), position=3)
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
    (early,) = engine.explain(explained(IDS, position=3))
    total = matrices(early, Column.TOTAL_EFFECT)
    assert all(float(part[4:].abs().max()) == 0 for part in (total[0], total[4], total[5]))
    value = plain_objective(random_model(), explained(IDS, position=3))
    assert early.value == pytest.approx(value, rel=1e-5)


def test_an_edited_node_is_reported_at_its_edited_value() -> None:
    engine = random_engine()
    run = explained(IDS, *edits(engine, Intervention(parse("head.1.2~6-3"), SetValue(0.75))))
    (explanation,) = engine.explain(run)
    assert float(matrices(explanation, Column.ACTIVATION)[2][2, 6, 3]) == 0.75
    zeroed = explained(IDS, *edits(engine, Intervention(parse("head.2.2~7"), Zero())))
    (explanation,) = engine.explain(zeroed)
    assert float(matrices(explanation, Column.DIRECT_EFFECT)[3][2, 7].abs().max()) == 0
    assert float(matrices(explanation, Column.DIRECT_EFFECT)[3][1, 7].abs().max()) > 0
