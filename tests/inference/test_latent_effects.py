"""Latents verified and estimated, at 0 and at values of other runs, against whole passes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from services.common.addresses import Address, Kind, parse
from services.inference.engine import estimates, resuming, whole_verification
from services.inference.engine.attribution import NormMode
from services.inference.engine.cancellation import CancelToken
from services.inference.engine.captured import Row
from services.inference.engine.columns import Column
from services.inference.engine.dictionaries.dictionary import Dictionary, InputNorm, NormKind
from services.inference.engine.dictionaries.sites import Point
from services.inference.engine.interventions import (
    Add,
    Intervention,
    Mean,
    Operation,
    Patch,
    Scale,
    SetTo,
    Source,
)
from services.inference.engine.objectives import Along
from services.inference.engine.resuming import Stage
from services.inference.engine.verification import Ablation
from tests.inference.helpers import WIDTH, Engine, explained, random_engine, random_model
from tests.inference.planted import LATENTS, ByHand, random_dictionary
from tests.inference.test_latents import columns_of, objective_of
from tests.inference.test_splice import IDS, VIEWS, WRITERS, by_hand
from tests.inference.test_verification import verify, zeroed

LAST = len(IDS) - 1
LAYER = 1
SITES = [*WRITERS, *VIEWS, Point.MLP_IN]
"""MLP_IN: a transcoder."""


def dictionary_at(point: Point, layer: int = LAYER, activation: str = "relu") -> Dictionary:
    norm = InputNorm(NormKind.LAYER_NORM)
    if point is Point.MLP_IN:
        return random_dictionary("D", Point.MLP_OUT, layer, activation, norm, reads=point)
    return random_dictionary("D", point, layer, activation, norm)


def active(engine: Engine, token: int = LAST) -> list[str]:
    """Latents that are active there: one everywhere, the same at the token, and another."""
    current = engine.hooks.run([Row(IDS)], [0], gradients=False, dictionaries=["D"])
    found = current.sites.found["D"].clean(0, len(IDS))[token].topk(2).indices.tolist()
    first, second = found
    return [f"latent.D.{first}", f"latent.D.{first}~{token}", f"latent.D.{second}~{token}"]


def whole_values(engine: Engine, edits: tuple[Any, ...], ablations: list[Ablation]) -> list[float]:
    """J of the run, then with each ablation, by passes from the beginning."""
    rows = [Row(IDS, edits), *(Row(IDS, (*edits, each.edit)) for each in ablations)]
    logits = engine.hooks.run(rows, [LAST], gradients=False).logits[:, 0]
    return [float(each[5] - (each[9] + each[11]) / 2) for each in logits]


PARTS = ["error.D~5", "bias.D"]
OTHERS = ["neuron.1.7~3", "resid_post.0~5", "mlp.2"]
BASE = (
    Intervention(parse("latent.D.3~4"), Scale(2.0)),
    Intervention(parse("latent.D.5"), SetTo(1.5)),
    Intervention(parse("error.D"), Scale(0.5)),
    Intervention(parse("neuron.0.11~2"), SetTo(0.5)),
    Intervention(parse("mlp.1~6"), Scale(0.3)),
    Intervention(parse("resid_post.1~5"), Add(torch.linspace(-1, 1, WIDTH))),
)


@pytest.mark.parametrize("edited", [False, True])
@pytest.mark.parametrize("point", SITES)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_verified_effects_are_those_of_whole_passes(
    family: str, point: Point, edited: bool
) -> None:
    engine = random_engine(family, dictionaries=[dictionary_at(point)])
    edits = engine.edits(*(BASE if edited else ()), tokens=len(IDS))
    names = [*active(engine), "latent.D.9~2", *PARTS, *OTHERS]
    ablations = zeroed(engine, *names)
    value, *without = whole_values(engine, edits, ablations)
    largest = max(abs(each - value) for each in without)
    for tokens in (1, 4000):
        found = verify(engine, explained(IDS, *edits), *ablations, tokens=tokens)
        for name, expected in zip(names, without, strict=True):
            verified = found[parse(name)]
            assert verified.effect == pytest.approx(value - expected, abs=1e-5 * largest), name
    assert sum(abs(each - value) > 1e-3 * largest for each in without[:6]) >= 4


@pytest.mark.parametrize("point", SITES[:-1])
def test_verified_effects_are_those_of_the_latent_zeroed_by_hand(point: Point) -> None:
    dictionary = dictionary_at(point)
    engine = random_engine("llama", dictionaries=[dictionary])
    model = random_model("llama")

    def without(formulas: ByHand, x: Tensor, target: Tensor) -> Tensor:
        f = formulas.latents(x)
        kept = f.clone()
        kept[:, 3] = 0
        return formulas.write(kept, x) - formulas.write(f, x)

    clean = objective_of(by_hand(model, dictionary, lambda _, __, t: torch.zeros_like(t)))
    expected = float(clean - objective_of(by_hand(model, dictionary, without)))
    (found,) = verify(engine, explained(IDS), *zeroed(engine, "latent.D.3")).values()
    assert found.effect == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert abs(expected) > 1e-3


def test_a_start_behind_the_dictionary_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = random_engine(dictionaries=[dictionary_at(Point.MLP_ACT)])
    ablations = zeroed(engine, *active(engine))
    (right, *_) = verify(engine, explained(IDS), *ablations).values()
    monkeypatch.setitem(resuming._SITE_STAGES, Point.MLP_ACT, Stage.MLP)
    (wrong, *_) = verify(engine, explained(IDS), *ablations).values()
    assert abs(right.effect) > 1e-3
    assert wrong.effect != pytest.approx(right.effect, rel=1e-2)


def test_effects_on_what_is_no_logit_are_those_of_whole_passes() -> None:
    engine = random_engine(dictionaries=[dictionary_at(Point.ATTN_OUT)])
    along = Along(parse("resid_post.1"), torch.linspace(-1, 1, WIDTH), 5)
    run = explained(IDS, objective=along)
    ablations = zeroed(engine, *active(engine, token=5))
    begun = whole_verification.begin(
        engine.hooks, run, ablations, NormMode.FINAL_NORM_FROZEN, CancelToken()
    )
    found = [
        each for number, _ in enumerate(begun.chunks) for each in begun.chunk(number, CancelToken())
    ]
    rows = [Row(IDS), *(Row(IDS, (each.edit,)) for each in ablations)]
    stream = engine.hooks.run(rows, [0], gradients=False).resid_post(1)[:, 5]
    value, *without = (stream @ torch.linspace(-1, 1, WIDTH)).tolist()
    assert [each.effect for each in found] == pytest.approx(
        [value - each for each in without], abs=1e-5
    )
    assert abs(found[0].effect) > 1e-3
    assert abs(found[1].effect) > 1e-3


@pytest.mark.parametrize("mode", NormMode)
@pytest.mark.parametrize("edited", [False, True])
@pytest.mark.parametrize("point", SITES)
def test_estimates_are_the_tables(point: Point, edited: bool, mode: NormMode) -> None:
    engine = random_engine("llama", dictionaries=[dictionary_at(point)])
    run = explained(IDS, *engine.edits(*(BASE if edited else ()), tokens=len(IDS)))
    (explanation,) = engine.explain(run, norm_mode=mode, dictionaries=["D"])
    total = columns_of(explanation, "D")[Column.TOTAL_EFFECT].nan_to_num(0.0)
    expected = {
        "latent.D.3~5": total[5, 3],
        f"latent.D.8~{LAST}": total[LAST, 8],
        "latent.D.3": total[:, 3].sum(),
        "latent.D.5": total[:, 5].sum(),
    }
    wanted = [each.edit for each in zeroed(engine, *expected)]
    got = estimates.estimate(engine.hooks, run, wanted, mode, CancelToken())
    largest = float(total.abs().max())
    for name, value in zip(expected, got, strict=True):
        assert value == pytest.approx(float(expected[name]), abs=1e-5 * largest), name
    assert float(total[:, 3].abs().max()) > 0


PROMPTS = ((5, 6, 7), (40, 3, 3, 9), tuple(reversed(IDS)))


def latents_by_hand(
    family: str,
    dictionary: Dictionary,
    ids: tuple[int, ...],
    change: Callable[[Tensor], Tensor] = lambda f: f,
) -> Tensor:
    """[T, N]: what the dictionary makes of another run, after a change of its latents there."""
    found: list[Tensor] = []

    def keep(formulas: ByHand, x: Tensor, target: Tensor) -> Tensor:
        found.append(change(formulas.latents(x)))
        return torch.zeros_like(target)

    by_hand(random_model(family), dictionary, keep, ids=ids)
    return found[0]


@pytest.mark.parametrize("activation", ["relu", "topk"])
@pytest.mark.parametrize("point", SITES)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_values_of_other_runs_are_set_as_by_hand(
    family: str, point: Point, activation: str
) -> None:
    dictionary = dictionary_at(point, activation=activation)
    engine = random_engine(family, dictionaries=[dictionary])
    seen = [latents_by_hand(family, dictionary, ids) for ids in PROMPTS]
    inside = Intervention(parse("latent.D.5~2"), Scale(3.0))
    edited_there = seen[1].clone()
    edited_there[2, 5] *= 3

    wanted: dict[str, tuple[Operation, Callable[[Tensor], Tensor]]] = {
        "latent.D.3": (
            Mean(tuple(map(Source, PROMPTS))),
            lambda f: f[:, 3].fill_(torch.cat(seen)[:, 3].mean()),
        ),
        "latent.D.4": (
            Mean((Source(PROMPTS[2]),), per_position=True),
            lambda f: f[:, 4].copy_(seen[2][:, 4]),
        ),
        "latent.D.5~6": (
            Patch(Source(PROMPTS[1], (inside,)), ((6, 2),)),
            lambda f: f[6, 5].copy_(edited_there[2, 5]),
        ),
        "latent.D.6": (Patch(Source(PROMPTS[2])), lambda f: f[:, 6].copy_(seen[2][:, 6])),
    }

    def change(formulas: ByHand, x: Tensor, target: Tensor) -> Tensor:
        f = formulas.latents(x)
        after = f.clone()
        for _, move in wanted.values():
            move(after)
        return formulas.write(after, x) - formulas.write(f, x)

    theirs = by_hand(random_model(family), dictionary, change)
    interventions = [Intervention(parse(name), each) for name, (each, _) in wanted.items()]
    row = Row(IDS, engine.edits(*interventions, tokens=len(IDS)))
    ours = engine.hooks.run([row], range(len(IDS)), gradients=False).logits[0]
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    clean = by_hand(random_model(family), dictionary, lambda _, __, t: torch.zeros_like(t))
    assert (ours - clean).abs().max() > 1e-3 * clean.abs().max()


@pytest.mark.parametrize("operation", ["mean", "patch"])
@pytest.mark.parametrize("point", [Point.ATTN_OUT, Point.MLP_ACT, Point.MLP_IN])
def test_effects_from_other_runs_are_those_of_whole_passes(point: Point, operation: str) -> None:
    engine = random_engine("llama", dictionaries=[dictionary_at(point)])
    source = Source(PROMPTS[2], (Intervention(parse("latent.D.3"), Scale(2.0)),))
    change: Operation = Patch(source) if operation == "patch" else Mean((source,))
    nodes = [parse(name) for name in ("latent.D.3~5", "latent.D.3", f"latent.D.8~{LAST}")]
    ablations = [
        Ablation(node, *engine.edits(Intervention(node, change), tokens=len(IDS))) for node in nodes
    ]
    edits = engine.edits(*BASE, tokens=len(IDS))
    value, *moved = whole_values(engine, edits, ablations)
    found = verify(engine, explained(IDS, *edits), *ablations, tokens=1)
    largest = max(abs(each - value) for each in moved)
    for node, expected in zip(nodes, moved, strict=True):
        assert found[node].effect == pytest.approx(value - expected, abs=1e-5 * largest)
    assert largest > 1e-3
    run = explained(IDS)
    (explanation,) = engine.explain(run, norm_mode=NormMode.LIVE, dictionaries=["D"])
    columns = columns_of(explanation, "D")
    f, total = (
        columns[column].nan_to_num(0.0) for column in (Column.ACTIVATION, Column.TOTAL_EFFECT)
    )
    (there,) = engine.explain(
        explained(PROMPTS[2], *engine.edits(*source.interventions, tokens=len(IDS))),
        dictionaries=["D"],
    )
    start = columns_of(there, "D")[Column.ACTIVATION].nan_to_num(0.0)
    token = int(f[:, 3].argmax())
    assert f[token, 3] > 0
    x0 = start[token, 3] if operation == "patch" else start[:, 3].mean()
    node = Address(Kind.LATENT, index=3, dictionary="D", position=token)
    (edit,) = engine.edits(Intervention(node, change), tokens=len(IDS))
    (estimate,) = estimates.estimate(engine.hooks, run, [edit], NormMode.LIVE, CancelToken())
    expected = float((f[token, 3] - x0) * total[token, 3] / f[token, 3])
    assert estimate == pytest.approx(expected, rel=1e-4)
    moved_start = abs(float(x0)) > 0.01
    assert (abs(estimate - float(total[token, 3])) > 1e-4 * abs(estimate)) is moved_start


def test_every_latent_of_a_dictionary_is_verified_in_one_call() -> None:
    engine = random_engine(dictionaries=[dictionary_at(Point.MLP_OUT)])
    names = [f"latent.D.{latent}~{LAST}" for latent in range(LATENTS)]
    ablations = zeroed(engine, *names)
    value, *without = whole_values(engine, (), ablations)
    found = verify(engine, explained(IDS), *ablations)
    for name, expected in zip(names, without, strict=True):
        assert found[parse(name)].effect == pytest.approx(value - expected, abs=1e-5)
