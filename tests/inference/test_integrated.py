"""Integrated effects against the same sums written out over a forward pass by hand."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from services.common.addresses import Address, Kind, parse
from services.inference.engine import baselines, integrated
from services.inference.engine.attribution import ExplainedRun
from services.inference.engine.baselines import Reference
from services.inference.engine.cancellation import CancelToken
from services.inference.engine.objectives import Along, LogitDiff, Objective
from services.inference.engine.sublayers import EMBEDDINGS, Sublayer
from services.inference.engine.tracing import Side, TracedScore
from tests.inference import plain
from tests.inference.helpers import (
    HEAD_WIDTH,
    HEADS,
    NEURONS,
    WIDTH,
    Engine,
    random_engine,
    random_model,
)
from tests.inference.test_verification import BASE, IDS, of_base

POSITION = 6
OBJECTIVE = LogitDiff((5,), (9, 11), POSITION)
SITES: dict[str, tuple[Sublayer, str, int | None]] = {
    "embeddings": (Sublayer(Kind.EMBED, None), "embed", None),
    "heads": (Sublayer(Kind.HEAD, 1), "probabilities", 1),
    "neurons": (Sublayer(Kind.NEURON, 0), "neurons", 0),
    "last neurons": (Sublayer(Kind.NEURON, 2), "neurons", 2),
}


def nodes_of(sublayer: Sublayer) -> list[Address]:
    tokens = range(len(IDS))
    match sublayer.kind:
        case Kind.EMBED:
            return [Address(Kind.EMBED, position=token) for token in tokens]
        case Kind.HEAD:
            return [
                Address(Kind.HEAD, sublayer.layer, head, position=query, key=key)
                for head in range(HEADS)
                for query in tokens
                for key in range(query + 1)
            ]
        case _:
            return [
                Address(Kind.NEURON, sublayer.layer, neuron, position=token)
                for token in tokens
                for neuron in range(NEURONS)
            ]


def by_hand(
    family: str, name: str, shares: list[float], base: list[tuple[str, int | None, Any, Any]]
) -> tuple[Tensor, Tensor, list[float]]:
    """x, the mean of G over the shares of the way from 0, and J at each."""
    _, kind, layer = SITES[name]
    edited: plain.Site = plain.edited(*base)
    values: list[Tensor] = []
    gradients, objectives = [], []
    for share in shares:
        leaf: list[Tensor] = []

        def site(
            at: str,
            at_layer: int | None,
            x: Tensor,
            share: float = share,
            leaf: list[Tensor] = leaf,
        ) -> Tensor:
            x = edited(at, at_layer, x)
            if (at, at_layer) != (kind, layer):
                return x
            values.append(x.detach())
            leaf.append((share * x).detach().requires_grad_())
            return leaf[0]

        objective = OBJECTIVE.of_logits(plain.forward(random_model(family), IDS, site)[POSITION])
        gradients.append(torch.autograd.grad(objective, leaf)[0])
        objectives.append(float(objective.detach()))
    return values[0], torch.stack(gradients).mean(0), objectives


def integrate(
    engine: Engine,
    run: ExplainedRun,
    nodes: list[Address],
    steps: int,
    starts: dict[Sublayer, Tensor] | None = None,
    along_input: bool = False,
) -> list[float]:
    begun = integrated.begin(
        engine.hooks, run, nodes, steps, CancelToken(), starts, along_input=along_input
    )
    for number in range(len(begun.chunks)):
        begun.chunk(number, CancelToken())
    return begun.effects(nodes)


@pytest.mark.parametrize("edited", [False, True])
@pytest.mark.parametrize("name", SITES)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_effects_are_the_sum_over_midpoints_written_out(
    family: str, name: str, edited: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integrated, "TOKENS_PER_CHUNK", {"cpu": 15})  # two rows a batch
    engine = random_engine(family)
    base = of_base() if edited else []
    edits = engine.edits(*(each for each, _ in BASE), tokens=len(IDS)) if edited else ()
    sublayer = SITES[name][0]
    nodes = nodes_of(sublayer)
    got = torch.tensor(integrate(engine, ExplainedRun(IDS, edits, OBJECTIVE), nodes, 5))
    x, gradient, _ = by_hand(family, name, [0.1, 0.3, 0.5, 0.7, 0.9], base)
    effects = x * gradient
    if sublayer.kind is Kind.EMBED:
        expected = effects.sum(-1)
    elif sublayer.kind is Kind.HEAD:
        queries, keys = torch.tril_indices(len(IDS), len(IDS))
        expected = effects[:, queries, keys].flatten()
    else:
        expected = effects.flatten()
    assert (got - expected).abs().max() < 2e-5 * expected.abs().max()
    other, wrong, _ = by_hand(family, name, [0.2, 0.4, 0.6, 0.8, 1.0], base)
    assert (effects - other * wrong).abs().max() > 1e-3 * expected.abs().max()


# Not the embeddings from 0: the first norm makes J jump there, within a thousandth of the way.
@pytest.mark.parametrize("name", ["heads", "neurons", "last neurons"])
def test_rows_of_a_sublayer_add_up_to_what_removing_it_does(name: str) -> None:
    engine = random_engine("llama")
    run = ExplainedRun(IDS, (), OBJECTIVE)
    nodes = nodes_of(SITES[name][0])
    _, _, (without, whole) = by_hand("llama", name, [0.0, 1.0], [])
    sums = {steps: sum(integrate(engine, run, nodes, steps)) for steps in (2, 16, 128)}
    errors = {steps: abs(total - (whole - without)) for steps, total in sums.items()}
    assert errors[128] < 1e-2 * abs(whole - without)
    assert errors[128] < errors[16] < errors[2]


def test_only_sublayers_of_the_nodes_are_run() -> None:
    engine = random_engine()
    nodes = [parse("neuron.1.3~2"), parse("neuron.1.4~6"), parse("head.0.1~3-2")]
    begun = integrated.begin(
        engine.hooks, ExplainedRun(IDS, (), OBJECTIVE), nodes, 4, CancelToken()
    )
    assert {moving for moving, _ in begun.chunks} == {
        Sublayer(Kind.NEURON, 1),
        Sublayer(Kind.HEAD, 0),
    }


def test_nodes_after_the_position_of_j_have_none() -> None:
    engine = random_engine()
    nodes = [parse("neuron.1.3~7"), parse("head.0.1~7-2"), parse("embed~7"), parse("embed~6")]
    effects = integrate(engine, ExplainedRun(IDS, (), OBJECTIVE), nodes, 4)
    assert effects[:3] == [0.0, 0.0, 0.0]
    assert effects[3] != 0


OTHER = (3, 50, 4, 7, 25, 60, 2, 1)


def seen_by_hand(family: str, ids: tuple[int, ...]) -> dict[tuple[str, int | None], Tensor]:
    seen: dict[tuple[str, int | None], Tensor] = {}

    def remember(kind: str, layer: int | None, values: Tensor) -> Tensor:
        seen[kind, layer] = values
        return values

    plain.forward(random_model(family), ids, remember)
    return seen


def starts_of(engine: Engine, *prompts: tuple[int, ...]) -> dict[Sublayer, Tensor]:
    reference = Reference(tuple((ids, ()) for ids in prompts), tuple(range(len(IDS))))
    return baselines.starts(engine.hooks, reference, CancelToken())


@pytest.mark.parametrize("name", SITES)
def test_baselines_are_the_values_of_the_other_runs(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sublayer, kind, layer = SITES[name]
    values = [seen_by_hand("llama", ids)[kind, layer] for ids in (IDS, OTHER)]
    engine = random_engine("llama")
    got = starts_of(engine, OTHER)[sublayer]
    assert (got - values[1]).abs().max() < 1e-5 * values[1].abs().max()
    assert (got - values[0]).abs().max() > 1e-2 * values[1].abs().max()
    monkeypatch.setattr(baselines, "TOKENS_PER_BATCH", 1)
    mean = starts_of(engine, IDS, OTHER)[sublayer]
    assert (mean - (values[0] + values[1]) / 2).abs().max() < 1e-5 * values[1].abs().max()
    reference = Reference(((OTHER, ()),), (0, 0, 1, 1, 2, 3, 4, 7))
    aligned = baselines.starts(engine.hooks, reference, CancelToken())[sublayer]
    at = (3, slice(None)) if sublayer.kind is not Kind.HEAD else (slice(None), 6, 5)
    there = (1, slice(None)) if sublayer.kind is not Kind.HEAD else (slice(None), 4, 3)
    assert (aligned[at] - values[1][there]).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["embeddings", "neurons"])
def test_from_another_runs_values_rows_add_up_too(name: str) -> None:
    sublayer, kind, layer = SITES[name]
    engine = random_engine("llama")
    starts = starts_of(engine, OTHER)
    nodes = nodes_of(sublayer)
    got = sum(integrate(engine, ExplainedRun(IDS, (), OBJECTIVE), nodes, 128, starts))
    there = seen_by_hand("llama", OTHER)[kind, layer]
    moved = plain.edited((kind, layer, slice(None), lambda x: there))
    changed, whole = (
        float(OBJECTIVE.of_logits(plain.forward(random_model("llama"), IDS, site)[POSITION]))
        for site in (moved, plain.untouched)
    )
    assert got == pytest.approx(whole - changed, rel=1e-2)
    assert abs(whole - changed) > 0.02


@pytest.mark.parametrize("edited", [False, True])
def test_along_the_input_every_node_is_read_off_the_same_passes(edited: bool) -> None:
    family = "llama"
    engine = random_engine(family)
    base = of_base() if edited else []
    edits = engine.edits(*(each for each, _ in BASE), tokens=len(IDS)) if edited else ()
    run = ExplainedRun(IDS, edits, OBJECTIVE)
    nodes = [*nodes_of(SITES["embeddings"][0]), parse("neuron.0.3~2"), parse("head.1.2~6-3")]
    got = integrate(engine, run, nodes, 3, starts_of(engine, OTHER), along_input=True)

    here, there = seen_by_hand(family, IDS), seen_by_hand(family, OTHER)
    start, end = there["embed", None], here["embed", None]
    places: dict[str, tuple[str, int | None, Any]] = {
        "neuron": ("neurons", 0, (2, 3)),
        "pair": ("probabilities", 1, (2, 6, 3)),
    }
    run_values: dict[str, Tensor] = {}
    plain.forward(random_model(family), IDS, _reading(plain.edited(*base), places, run_values))
    sums: dict[str, Tensor] = {}
    for share in (1 / 6, 1 / 2, 5 / 6):
        leaf = (start + share * (end - start)).detach().requires_grad_()
        read: dict[str, Tensor] = {}
        moved_there = ("embed", None, slice(None), partial(_instead, leaf))
        site = _reading(plain.edited(moved_there, *base), places, read)
        objective = OBJECTIVE.of_logits(plain.forward(random_model(family), IDS, site)[POSITION])
        wanted = {"embed": leaf, **read}
        gradients = torch.autograd.grad(objective, list(wanted.values()))
        for name, gradient in zip(wanted, gradients, strict=True):
            sums[name] = sums.get(name, torch.zeros(())) + gradient / 3
    expected = ((end - start) * sums["embed"]).sum(-1).tolist()
    for name, (kind, layer, index) in places.items():
        moved = run_values[name][index] - there[kind, layer][index]
        expected.append(float(moved * sums[name][index]))
    largest = max(map(abs, expected))
    assert got == pytest.approx(expected, abs=2e-5 * largest)
    if not edited:
        embeddings = nodes_of(EMBEDDINGS)
        many = integrate(engine, run, embeddings, 128, starts_of(engine, OTHER), along_input=True)
        moved_to = plain.edited(("embed", None, slice(None), lambda x: start))
        without, whole = (
            float(OBJECTIVE.of_logits(plain.forward(random_model(family), IDS, site)[POSITION]))
            for site in (moved_to, plain.untouched)
        )
        assert sum(many) == pytest.approx(whole - without, rel=1e-2)


def _instead(value: Tensor, before: Tensor) -> Tensor:
    return value


def _reading(
    site: plain.Site, places: dict[str, tuple[str, int | None, Any]], read: dict[str, Tensor]
) -> plain.Site:
    """The site, remembering what stands at the places after it."""

    def visit(kind: str, layer: int | None, values: Tensor) -> Tensor:
        values = site(kind, layer, values)
        for name, place in places.items():
            if place[:2] == (kind, layer):
                read[name] = values
        return values

    return visit


DIRECTION = torch.linspace(-1, 2, WIDTH)
PAIR = parse("head.1.2~6-3")
Seen = dict[tuple[str, int | None], Tensor]


def score(query: Tensor, key: Tensor) -> Tensor:
    scaled: Tensor = query[2, 6] @ key[2, 3] / HEAD_WIDTH**0.5
    return scaled


OTHER_OBJECTIVES: dict[str, tuple[Objective, Callable[[Seen, Seen], Tensor]]] = {
    "along": (
        Along(parse("resid_post.1"), DIRECTION, 5),
        lambda seen, _: seen["resid_post", 1][5] @ DIRECTION,
    ),
    "score": (TracedScore(PAIR, Side.BOTH), lambda seen, _: score(seen["q", 1], seen["k", 1])),
    "query": (TracedScore(PAIR, Side.QUERY), lambda seen, run: score(seen["q", 1], run["k", 1])),
}


@pytest.mark.parametrize("name", OTHER_OBJECTIVES)
@pytest.mark.parametrize("where", ["embeddings", "neurons"])
def test_objectives_that_are_no_function_of_the_logits(where: str, name: str) -> None:
    objective, value = OTHER_OBJECTIVES[name]
    sublayer, kind, layer = SITES[where]
    engine = random_engine("llama")
    nodes = nodes_of(sublayer)
    got = torch.tensor(integrate(engine, ExplainedRun(IDS, (), objective), nodes, 3))
    run = seen_by_hand("llama", IDS)
    expected = torch.zeros(())
    for share in (1 / 6, 1 / 2, 5 / 6):
        leaf = (share * run[kind, layer]).requires_grad_()
        seen: Seen = {}
        moved = plain.edited((kind, layer, slice(None), partial(_instead, leaf)))
        places = {str(each): (*each, ()) for each in run}
        read: dict[str, Tensor] = {}
        plain.forward(random_model("llama"), IDS, _reading(moved, places, read))
        seen = {each: read[str(each)] for each in run}
        (gradient,) = torch.autograd.grad(value(seen, run), [leaf])
        expected = expected + run[kind, layer] * gradient / 3
    expected = expected.sum(-1) if sublayer.kind is Kind.EMBED else expected.flatten()
    assert expected.abs().max() > 1e-3
    assert (got - expected).abs().max() < 2e-5 * expected.abs().max()


@pytest.mark.parametrize("name", OTHER_OBJECTIVES)
def test_what_is_not_upstream_of_such_an_objective_has_none(name: str) -> None:
    objective, _ = OTHER_OBJECTIVES[name]
    engine = random_engine("llama")
    nodes = [PAIR, parse("head.2.0~7-1"), parse("neuron.2.3~5"), parse("embed~3")]
    run = ExplainedRun(IDS, (), objective)
    *_, last, upstream = integrate(engine, run, nodes, 2)
    assert last == 0
    assert upstream != 0
    if name != "along":
        assert integrate(engine, run, nodes[:1], 2) == [0.0]
