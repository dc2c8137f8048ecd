"""Verified effects against a forward pass written by hand with the value really changed."""

from typing import Any

import pytest
import torch
from torch import Tensor

from services.common.addresses import Address, Kind, parse
from services.inference.engine import estimates, resuming, verification
from services.inference.engine.attribution import ExplainedRun, NormMode
from services.inference.engine.cancellation import CancelToken
from services.inference.engine.captured import Row
from services.inference.engine.columns import Column
from services.inference.engine.interventions import (
    Add,
    Intervention,
    Mask,
    Mean,
    Patch,
    ProjectOut,
    Scale,
    SetTo,
    Source,
    Zero,
)
from services.inference.engine.objectives import LogitDiff, LogProb, OfLogits
from services.inference.engine.resuming import Stage
from services.inference.engine.verification import Ablation, Verified
from tests.inference import plain
from tests.inference.helpers import (
    FAMILIES,
    HEAD_WIDTH,
    HEADS,
    LAYERS,
    WIDTH,
    Engine,
    explained,
    matrices,
    random_engine,
    random_model,
)

IDS = (3, 17, 4, 4, 25, 60, 8, 1)
LAST = len(IDS) - 1
OBJECTIVE = LogitDiff((5,), (9, 11), LAST)
BIASES = (Kind.BIAS_ATTN, Kind.BIAS_MLP)

# Nodes and components of every kind, and the same place in the pass written by hand.
TARGETS: dict[str, tuple[str, int | None, Any]] = {
    "neuron.1.7~3": ("neurons", 1, (3, 7)),
    f"neuron.2.9~{LAST}": ("neurons", 2, (LAST, 9)),
    "neuron.0.11": ("neurons", 0, (slice(None), 11)),
    "head.1.2~6-3": ("probabilities", 1, (2, 6, 3)),
    f"head.2.1~{LAST}-0": ("probabilities", 2, (1, LAST, 0)),
    "head.1.0~4": ("z", 1, (4, 0)),
    "head.0.3": ("z", 0, (slice(None), 3)),
    "head.2.3": ("z", 2, (slice(None), 3)),
    "head.1.3.q~6": ("q", 1, (3, 6)),
    "head.1.2.k~2": ("k", 1, (2, 2)),
    "head.0.2.v": ("v", 0, (2, slice(None))),
    "embed~1": ("embed", None, (1,)),
    "embed": ("embed", None, slice(None)),
    "attn.1~4": ("attn", 1, (4,)),
    "attn.2": ("attn", 2, slice(None)),
    "resid_mid.1~7": ("resid_mid", 1, (7,)),
    "mlp.0~0": ("mlp", 0, (0,)),
    "mlp.2": ("mlp", 2, slice(None)),
    "resid_post.0~5": ("resid_post", 0, (5,)),
    f"resid_post.{LAYERS - 1}~{LAST}": ("resid_post", LAYERS - 1, (LAST,)),
}
BASE: tuple[tuple[Intervention, tuple[str, int | None, Any]], ...] = (
    (Intervention(parse("neuron.0.11~2"), SetTo(0.5)), ("neurons", 0, (2, 11))),
    (Intervention(parse("head.1.2~6-3"), Scale(2.0)), ("probabilities", 1, (2, 6, 3))),
    (Intervention(parse("head.1.0~4"), Scale(-1.0)), ("z", 1, (4, 0))),
    (Intervention(parse("head.0.2.v~1"), Scale(3.0)), ("v", 0, (2, 1))),
    (Intervention(parse("mlp.0~3"), Zero()), ("mlp", 0, (3,))),
    (
        Intervention(parse("resid_post.1~5"), Add(torch.linspace(-1, 1, WIDTH))),
        ("resid_post", 1, (5,)),
    ),
)
"""Interventions of the run itself: some on the sites verified, some up- and downstream."""


def by_hand(
    family: str, changes: list[tuple[str, int | None, Any, Any]], objective: OfLogits
) -> float:
    site = plain.edited(*changes)
    return float(objective.of_logits(plain.forward(random_model(family), IDS, site)[LAST]))


def of_base() -> list[tuple[str, int | None, Any, Any]]:
    return [
        (*place, lambda x, operation=base.operation: plain.apply(operation, x))
        for base, place in BASE
    ]


def verify(
    engine: Engine, run: ExplainedRun, *ablations: Ablation, tokens: int | None = None
) -> dict[Address, Verified]:
    """`tokens`: how many a chunk may have; 1 gives every node one of its own."""
    begun = verification.begin(engine.hooks, run, ablations, CancelToken(), tokens)
    numbers = range(len(begun.chunks))
    found = [each for number in numbers for each in begun.chunk(number, CancelToken())]
    return {each.node: each for each in found}


def zeroed(engine: Engine, *names: str, tokens: int = len(IDS)) -> list[Ablation]:
    nodes = [parse(name) for name in names]
    return [
        Ablation(node, *engine.edits(Intervention(node, Zero()), tokens=tokens)) for node in nodes
    ]


@pytest.mark.parametrize("tokens", [1, 40, 4000])
@pytest.mark.parametrize("edited", [False, True])
@pytest.mark.parametrize("family", FAMILIES[:2])
def test_effects_are_those_of_a_pass_with_the_value_zeroed_by_hand(
    family: str, edited: bool, tokens: int
) -> None:
    engine = random_engine(family)
    base = of_base() if edited else []
    edits = engine.edits(*(each for each, _ in BASE), tokens=len(IDS)) if edited else ()
    run = ExplainedRun(IDS, edits, OBJECTIVE)
    found = verify(engine, run, *zeroed(engine, *TARGETS), tokens=tokens)
    untouched = by_hand(family, base, OBJECTIVE)
    largest = max(abs(each.effect) for each in found.values())
    for name, place in TARGETS.items():
        expected = by_hand(family, [*base, (*place, torch.zeros_like)], OBJECTIVE)
        got = found[parse(name)]
        assert got.effect == pytest.approx(untouched - expected, abs=2e-5 * largest), name
        assert got.value == pytest.approx(expected, abs=2e-5 * largest), name
    assert sum(abs(each.effect) > 1e-3 * largest for each in found.values()) > len(TARGETS) // 2


def test_a_start_too_late_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = random_engine()
    ablation = zeroed(engine, "head.1.2~6-3")
    (right,) = verify(engine, explained(IDS), *ablation).values()
    monkeypatch.setitem(resuming._STAGES, Kind.HEAD, Stage.ATTENTION)
    (wrong,) = verify(engine, explained(IDS), *ablation).values()
    assert abs(right.effect) > 1e-4
    assert wrong.effect == pytest.approx(0, abs=1e-6)


def test_a_pair_goes_alone_and_its_row_is_not_renormalised() -> None:
    engine = random_engine()
    found = verify(engine, explained(IDS), *zeroed(engine, "head.1.2~6-3"))
    (effect,) = [each.effect for each in found.values()]

    def renormalised(row: Tensor) -> Tensor:
        row = row.clone()
        row[3] = 0
        return row / row.sum()

    row = ("probabilities", 1, (2, 6), renormalised)
    other = by_hand("gpt2", [], OBJECTIVE) - by_hand("gpt2", [row], OBJECTIVE)
    assert effect != pytest.approx(other, rel=1e-2)


def test_nodes_after_the_position_of_j_have_no_effect_at_all() -> None:
    engine = random_engine()
    run = explained(IDS, objective=LogProb((5,), 3))
    names = ["embed~4", "neuron.1.7~5", "head.1.2~6-3", "mlp.2~7", "head.1.2~3-3"]
    found = verify(engine, run, *zeroed(engine, *names))
    effects = [each.effect for each in found.values()]
    assert max(map(abs, effects[:-1])) < 1e-6
    assert abs(effects[-1]) > 1e-4


@pytest.mark.parametrize(
    ("name", "tokens_run"),
    [
        ("embed~5", [3, 3, 3]),
        ("head.0.1", [0, 8, 8]),
        ("neuron.1.7~6", [0, 0, 2]),
        (f"head.2.1~{LAST}-0", [0, 0, 0]),
        ("resid_post.0~4", [0, 4, 4]),
        ("attn.1~7", [0, 0, 1]),
    ],
)
@pytest.mark.parametrize("family", FAMILIES[:2])
def test_attention_runs_only_from_the_first_layer_and_token_changed(
    family: str, name: str, tokens_run: list[int]
) -> None:
    engine = random_engine(family)
    begun = verification.begin(
        engine.hooks, explained(IDS), zeroed(engine, name), CancelToken(), 4000
    )
    counts = [0] * LAYERS
    for number, layer in enumerate(engine.architecture.layers):

        def count(module: object, args: tuple[Tensor], number: int = number) -> None:
            counts[number] += args[0].shape[1]

        projection = next(iter(layer.attention.children()))  # of the queries, or fused
        projection.register_forward_pre_hook(count)
    begun.chunk(0, CancelToken())
    assert counts == tokens_run


@pytest.mark.parametrize("mode", NormMode)
def test_estimates_of_nodes_are_the_tables_and_of_components_their_sums(mode: NormMode) -> None:
    engine = random_engine("llama")
    edits = engine.edits(*(each for each, _ in BASE), tokens=len(IDS))
    run = ExplainedRun(IDS, edits, OBJECTIVE)
    (explanation,) = engine.explain(run, norm_mode=mode)
    columns = matrices(explanation, Column.TOTAL_EFFECT)
    embed, heads, neurons = columns[0], columns[1 : 1 + LAYERS], columns[1 + LAYERS :]
    expected: dict[str, Tensor] = {
        "embed~2": embed[2],
        "embed": embed.sum(),
        "neuron.1.7~3": neurons[1][3, 7],
        "neuron.0.11": neurons[0][:, 11].sum(),
        "head.1.2~6-3": heads[1][2, 6, 3],
        "head.1.0~5": heads[1][0, 5].sum(),
    }
    expected |= {f"head.2.{head}": heads[2][head].sum() for head in range(HEADS)}
    wanted = [each.edit for each in zeroed(engine, *expected)]
    got = estimates.estimate(engine.hooks, run, wanted, mode, CancelToken())
    largest = max(abs(float(value)) for value in expected.values())
    for name, value in zip(expected, got, strict=True):
        assert value == pytest.approx(float(expected[name]), abs=1e-5 * largest), name
    assert largest > 1e-2


EVERY_OPERATION = (
    Intervention(parse("embed~2"), ProjectOut(torch.linspace(-1, 2, WIDTH))),
    Intervention(parse("head.0.1~5-2"), Mask()),
    Intervention(parse("head.1.2~6-4"), Mask()),
    Intervention(parse("head.1.3"), Mean((Source((1, 2, 3)), Source((9, 8, 7, 6))))),
    Intervention(parse("head.1.1.k"), Scale(1.5)),
    Intervention(parse("head.2.0.q~7"), ProjectOut(torch.linspace(-1, 2, HEAD_WIDTH))),
    Intervention(parse("attn.1"), Patch(Source((5, 4, 3, 2, 1, 0, 9, 8)))),
    Intervention(parse("bias.attn.1"), Scale(3.0), (3, 7)),
    Intervention(parse("resid_mid.2"), Add(torch.linspace(-0.5, 1, WIDTH), relative=True)),
    Intervention(parse("neuron.1.3"), Mean((Source((1, 2, 3)),))),
    Intervention(parse("bias.mlp.0"), Zero()),
    Intervention(parse("mlp.2~7"), ProjectOut(torch.linspace(2, -1, WIDTH))),
    Intervention(parse("resid_post.0"), Patch(Source((5, 4, 3)), ((1, 2), (6, 0))), (1, 6)),
)


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("family", FAMILIES)
def test_under_every_operation_resuming_is_running_the_whole_pass(family: str, tokens: int) -> None:
    engine = random_engine(family)
    biased = engine.architecture.layers[0].b_o is not None
    wanted = [each for each in EVERY_OPERATION if biased or each.target.kind not in BIASES]
    edits = engine.edits(*wanted, tokens=len(IDS))
    run = ExplainedRun(IDS, edits, OBJECTIVE)
    names = [*TARGETS, *(["bias.attn.2~7", "bias.mlp.1"] if biased else [])]
    ablations = zeroed(engine, *names)
    found = verify(engine, run, *ablations, tokens=tokens)
    rows = [Row(IDS, edits), *(Row(IDS, (*edits, each.edit)) for each in ablations)]
    whole = engine.hooks.run(rows, [LAST], gradients=False).logits[:, 0]
    values = [float(OBJECTIVE.of_logits(logits)) for logits in whole]
    largest = max(abs(value - values[0]) for value in values)
    for name, value in zip(names, values[1:], strict=True):
        effect = found[parse(name)].effect
        assert effect == pytest.approx(values[0] - value, abs=1e-5 * largest), name
    assert sum(abs(values[0] - value) > 1e-3 * largest for value in values) > 5
