"""Latents in the node table: each column by its definition, sums that close, views alone."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from services.common.addresses import Address, Kind, parse
from services.inference.engine import tables
from services.inference.engine.attribution import Explanation, NormMode
from services.inference.engine.columns import Column
from services.inference.engine.dictionaries.dictionary import Dictionary, InputNorm, NormKind
from services.inference.engine.dictionaries.sites import Point
from services.inference.engine.interventions import Add, Intervention, Scale, SetTo, Zero
from services.inference.engine.latents import LatentNodes
from services.inference.engine.objectives import LogitDiff
from tests.inference import plain
from tests.inference.helpers import (
    LAYERS,
    WIDTH,
    direct_sums,
    explained,
    in_float64,
    random_engine,
    random_model,
)
from tests.inference.planted import ACTIVATIONS, LATENTS, ByHand, random_dictionary
from tests.inference.test_splice import IDS, by_hand

__all__ = ["in_float64"]

DOUBLE = torch.float64
LAST = len(IDS) - 1
VECTOR = torch.linspace(-1, 2, WIDTH, dtype=DOUBLE)
LAYER_NORM = InputNorm(NormKind.LAYER_NORM)

SETS: dict[str, list[Dictionary]] = {
    "mlp_out and attn_out": [
        random_dictionary(f"{point}-{layer}", point, layer, activation, seed=layer)
        for layer in range(LAYERS)
        for point, activation in ((Point.MLP_OUT, "topk"), (Point.ATTN_OUT, "jumprelu"))
    ],
    "mlp_act and z": [
        random_dictionary("a", Point.MLP_ACT, LAYERS - 1, "gated"),
        random_dictionary("b", Point.Z, LAYERS - 1),
        random_dictionary("c", Point.Z, 0, norm=LAYER_NORM),
    ],
    "transcoder with skip": [
        random_dictionary("t", Point.MLP_OUT, LAYERS - 1, reads=Point.MLP_IN, skip=True),
        random_dictionary("u", Point.MLP_OUT, 1, norm=LAYER_NORM),
    ],
}
EDITS: dict[str, list[Intervention]] = {
    "plain": [],
    "sublayers and stream": [
        Intervention(parse("mlp.2"), Scale(0.5)),
        Intervention(parse("attn.1"), Zero()),
        Intervention(parse("resid_post.1"), Add(VECTOR)),
        Intervention(parse("neuron.2.5"), SetTo(2.0)),
        Intervention(parse("head.2.1~7"), Scale(2.0)),
    ],
}


def of_dictionaries(names: list[str]) -> list[Intervention]:
    """Edits of latents, error and bias of each."""
    return [
        Intervention(parse(f"{target.format(name)}"), operation)
        for name in names
        for target, operation in (
            ("latent.{}.3", SetTo(1.5)),
            ("latent.{}.5~7", Zero()),
            ("error.{}~7", Scale(0.25)),
            ("bias.{}", Scale(2.0)),
        )
    ]


@pytest.mark.parametrize("norm_mode", NormMode)
@pytest.mark.parametrize("edits", [*EDITS, "dictionaries"])
@pytest.mark.parametrize("which", SETS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_latents_bias_skip_and_error_sum_to_the_objective(
    family: str, which: str, edits: str, norm_mode: NormMode
) -> None:
    names = [each.id for each in SETS[which]]
    engine = random_engine(family, dictionaries=SETS[which])
    wanted = EDITS.get(edits) or (of_dictionaries(names) if edits == "dictionaries" else [])
    run = explained(IDS, *engine.edits(*wanted, tokens=len(IDS)))
    (explanation,) = engine.explain(run, norm_mode=norm_mode, dictionaries=names)
    total, size = direct_sums(explanation)
    assert abs(total - explanation.value) <= 1e-5 * size
    (plain_table,) = engine.explain(run, norm_mode=norm_mode)
    assert explanation.value == pytest.approx(plain_table.value, rel=1e-5, abs=1e-5)
    without, size = direct_sums(plain_table)
    assert abs(without - plain_table.value) <= 1e-5 * size


def test_the_sum_does_not_close_without_any_one_part_of_a_dictionary() -> None:
    names = [each.id for each in SETS["transcoder with skip"]]
    engine = random_engine("gpt2", dictionaries=SETS["transcoder with skip"])
    (explanation,) = engine.explain(explained(IDS), dictionaries=names)
    total, size = direct_sums(explanation)
    assert "bias.mlp.2" not in explanation.remainder
    assert "bias.mlp.0" in explanation.remainder
    for name in ("bias.t", "skip.t", "error.t", "bias.u", "error.u"):
        without = total - explanation.remainder[name]
        assert abs(without - explanation.value) > 1e-5 * size, name


def test_edits_of_a_dictionary_that_stands_for_nothing_have_rows() -> None:
    dictionary = random_dictionary("D", Point.MLP_OUT, LAYERS - 1)
    engine = random_engine("gpt2", dictionaries=[dictionary])
    wanted = Intervention(parse("latent.D.3~7"), SetTo(2.0))
    run = explained(IDS, *engine.edits(wanted, tokens=len(IDS)))
    (neurons,) = engine.explain(run)
    assert "edit.latent.D.3~7" in neurons.remainder
    (latents,) = engine.explain(run, dictionaries=["D"])
    assert not [name for name in latents.remainder if name.startswith("edit.")]


def nodes_of(explanation: Explanation, name: str) -> LatentNodes:
    (found,) = (
        group
        for group in explanation.groups
        if isinstance(group, LatentNodes) and group.address(0).dictionary == name
    )
    return found


def columns_of(explanation: Explanation, name: str) -> dict[Column, Tensor]:
    """Every column of a dictionary as [T, N]."""
    nodes = nodes_of(explanation, name)
    nodes.prepare(nodes.nodes)
    found = {}
    for column in Column:
        full = torch.full((len(IDS), LATENTS), torch.nan, dtype=DOUBLE)
        for index, value in enumerate(nodes.column(column).tolist()):
            address = nodes.address(index)
            full[address.position or 0, address.index or 0] = value
        found[column] = full
    return found


def objective_of(logits: Tensor) -> Tensor:
    return logits[LAST, 5] - (logits[LAST, 9] + logits[LAST, 11]) / 2


def derivative(model: Any, dictionary: Dictionary, token: int, latent: int) -> tuple[float, float]:
    """f and dJ/df of one latent, with everything live, in the pass written by hand."""
    step = 1e-6
    found: dict[str, float] = {}

    def change(formulas: ByHand, x: Tensor, target: Tensor, *, by: float) -> Tensor:
        f = formulas.latents(x)
        found["f"] = float(f[token, latent])
        moved = f.clone()
        moved[token, latent] += by
        return formulas.write(moved, x) - formulas.write(f, x)

    above, below = (
        float(objective_of(by_hand(model, dictionary, partial(change, by=by))))
        for by in (step, -step)
    )
    return found["f"], (above - below) / (2 * step)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("point", [Point.Z, Point.ATTN_OUT, Point.MLP_ACT, Point.MLP_OUT])
def test_estimates_are_finite_differences(point: Point, activation: str) -> None:
    dictionary = random_dictionary("D", point, 1, activation, norm=LAYER_NORM, dtype=DOUBLE)
    model = random_model("llama", DOUBLE)
    engine = random_engine("llama", DOUBLE, [dictionary])
    (explanation,) = engine.explain(explained(IDS), norm_mode=NormMode.LIVE, dictionaries=["D"])
    columns = columns_of(explanation, "D")
    f = columns[Column.ACTIVATION]
    token, latent = divmod(int(f.flatten().argmax()), LATENTS)
    others = [(1, 2), (LAST, 7), (token, latent)]
    for at, index in others:
        value, slope = derivative(model, dictionary, at, index)
        assert float(f[at, index]) == pytest.approx(value, rel=1e-9, abs=1e-12)
        ours = float(columns[Column.TOTAL_EFFECT][at, index])
        assert ours == pytest.approx(value * slope, rel=1e-4, abs=1e-9)
    assert float(f[token, latent]) != 0


@pytest.mark.parametrize("point", [Point.Z, Point.ATTN_OUT, Point.MLP_ACT, Point.MLP_OUT])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_direct_effect_and_write_magnitude_are_those_of_the_write(
    family: str, point: Point
) -> None:
    dictionary = random_dictionary("D", point, LAYERS - 1, norm=LAYER_NORM, dtype=DOUBLE)
    model: Any = random_model(family, DOUBLE)
    engine = random_engine(family, DOUBLE, [dictionary])
    (explanation,) = engine.explain(explained(IDS), dictionaries=["D"])
    columns = columns_of(explanation, "D")
    scales: plain.Scales = {}
    plain.forward(model, IDS, scales=scales)
    of_attention = point in (Point.Z, Point.ATTN_OUT)
    behind = "resid_mid" if of_attention else "resid_post"

    def without(at: int, latent: int) -> tuple[Tensor, Tensor]:
        """What the latent adds to the last residual, and J with it removed, final scale held."""
        seen: dict[str, Tensor] = {}

        def change(formulas: ByHand, x: Tensor, target: Tensor) -> Tensor:
            f = formulas.latents(x)
            kept = f.clone()
            kept[at, latent] = 0
            return formulas.write(kept, x) - formulas.write(f, x)

        logits = by_hand(model, dictionary, change, held={"final": scales["final"]}, seen=seen)
        return seen[behind], objective_of(logits)

    clean_seen: dict[str, Tensor] = {}
    by_hand(model, dictionary, lambda _, __, t: torch.zeros_like(t), seen=clean_seen)
    active = (columns[Column.ACTIVATION][LAST] != 0).nonzero()[:3, 0].tolist()
    assert active
    for latent in active:
        moved, value = without(LAST, latent)
        write = (clean_seen[behind] - moved)[LAST]
        assert float(columns[Column.WRITE_MAGNITUDE][LAST, latent]) == pytest.approx(
            float(write.norm()), rel=1e-4
        )
        if not of_attention:  # the MLP reads what attention writes: that is no direct effect
            assert explanation.value - float(value) == pytest.approx(
                float(columns[Column.DIRECT_EFFECT][LAST, latent]), rel=1e-5, abs=1e-9
            )
    assert float(columns[Column.DIRECT_EFFECT][:LAST].abs().max()) == 0


@pytest.mark.parametrize("point", [Point.RESID_PRE, Point.RESID_MID, Point.RESID_POST])
@pytest.mark.parametrize("layer", [0, 1, LAYERS - 1])
def test_views_close_on_their_own_and_leave_the_table_alone(point: Point, layer: int) -> None:
    dictionary = random_dictionary("V", point, layer, norm=LAYER_NORM)
    engine = random_engine("gpt2", dictionaries=[dictionary])
    for wanted in (
        [],
        [Intervention(parse("latent.V.3"), SetTo(1.5)), Intervention(parse("error.V"), Zero())],
        [Intervention(parse("resid_post.1"), Add(VECTOR))],
    ):
        run = explained(IDS, *engine.edits(*wanted, tokens=len(IDS)))
        (explanation,) = engine.explain(run, dictionaries=["V"])
        (view,) = explanation.views
        parts = view.latents + view.bias + view.error
        size = abs(view.latents) + abs(view.bias) + abs(view.error)
        assert abs(parts - view.site) <= 1e-5 * size
        assert abs(view.latents + view.bias - view.site) > 1e-5 * size or wanted
        groups = [group for group in explanation.groups if not isinstance(group, LatentNodes)]
        table = sum(group.direct_total() for group in groups) + sum(explanation.remainder.values())
        magnitude = sum(map(abs, explanation.remainder.values())) + abs(explanation.value)
        assert abs(table - explanation.value) <= 1e-4 * magnitude


def test_a_table_asks_for_more_rows_than_latents_are_active() -> None:
    names = ["a", "b"]
    engine = random_engine(
        "gpt2",
        dictionaries=[
            random_dictionary("a", Point.MLP_OUT, 0, "topk"),
            random_dictionary("b", Point.ATTN_OUT, 1, "jumprelu"),
        ],
    )
    (explanation,) = engine.explain(explained(IDS), dictionaries=names)
    nodes = sum(
        group.nodes if isinstance(group, LatentNodes) else group.size
        for group in explanation.groups
    )
    for wanted in (1, 50, nodes, nodes + 5):
        table = tables.build([explanation], tables.Ranking(Column.TOTAL_EFFECT, wanted))
        listed = [row.node for row in table.rows]
        assert len(listed) == len(set(listed)) == min(wanted, nodes)
    zero = [row for row in table.rows if row.values and row.values.activation == 0]
    assert zero
    assert all(row.values and row.values.total_effect == 0 for row in zero if row.node.dictionary)


def test_a_latent_is_found_in_the_other_run_active_or_not() -> None:
    engine = random_engine("gpt2", dictionaries=[random_dictionary("D", Point.MLP_OUT, 1)])
    edits = engine.edits(Intervention(parse("latent.D.3"), Zero()), tokens=len(IDS))
    runs = (explained(IDS), explained(IDS, *edits), explained(IDS[:4]))
    whole, ablated, short = engine.explain(*runs[:2], dictionaries=["D"]) + engine.explain(
        runs[2], dictionaries=["D"]
    )
    node = next(
        Address(Kind.LATENT, index=3, dictionary="D", position=t)
        for t in range(len(IDS))
        if columns_of(whole, "D")[Column.ACTIVATION][t, 3] != 0
    )
    for explanation, exists in ((whole, True), (ablated, True), (short, (node.position or 0) < 4)):
        assert (nodes_of(explanation, "D").find(node) is not None) is exists
    table = tables.build([whole, ablated], tables.Ranking(Column.ACTIVATION, 400))
    (row,) = (row for row in table.rows if row.node == node)
    assert row.values is not None
    assert row.values.activation > 0
    assert row.compare is not None
    assert row.compare.activation == 0


def test_batched_runs_are_the_runs_alone() -> None:
    dictionaries = SETS["mlp_out and attn_out"]
    names = [each.id for each in dictionaries]
    engine = random_engine("llama", dictionaries=dictionaries)
    edits = engine.edits(*of_dictionaries(names[:2]), tokens=len(IDS))
    runs = [explained(IDS, *edits), explained(IDS[:5], objective=LogitDiff((5,), (9,), 4))]
    together = engine.explain(*runs, dictionaries=names)
    for run, batched in zip(runs, together, strict=True):
        (alone,) = engine.explain(run, dictionaries=names)
        assert batched.value == pytest.approx(alone.value, rel=1e-5)
        for ours, theirs in zip(batched.groups, alone.groups, strict=True):
            assert ours.address(0).component == theirs.address(0).component
            for column in Column:
                a, b = ours.column(column), theirs.column(column)
                assert (a - b).abs().max() <= 1e-5 * b.abs().max()
