"""Verified and integrated effects in every variant of every family, against Hugging Face."""

from typing import Any

import pytest
import torch
from torch import Tensor

from services.common.addresses import Address, Kind, parse
from services.inference.engine import integrated, verification
from services.inference.engine.attribution import ExplainedRun
from services.inference.engine.cancellation import CancelToken
from services.inference.engine.interventions import Intervention, Scale, Zero
from services.inference.engine.objectives import LogitDiff
from services.inference.engine.verification import Ablation
from tests.inference import plain
from tests.inference.families.models import (
    HEADS,
    IDS,
    LAST,
    LAYERS,
    NEURONS,
    VARIANTS,
    edited,
    engine_of,
    reference_of,
)

every_variant = pytest.mark.parametrize("variant", VARIANTS)
OBJECTIVE = LogitDiff((5,), (9, 11), LAST)
TOP = LAYERS - 1
PLACES: dict[str, tuple[str, int | None, Any]] = {
    "embed~2": ("embed", None, (0, 2)),
    f"head.{TOP}.1~{LAST}-{LAST - 1}": ("probabilities", TOP, (0, 1, LAST, LAST - 1)),
    "head.0.2~4-3": ("probabilities", 0, (0, 2, 4, 3)),
    "head.1.1~5": ("z", 1, (0, 5, 1)),
    "head.1.3": ("z", 1, (0, slice(None), 3)),
    f"neuron.{TOP}.7~{LAST}": ("neurons", TOP, (0, LAST, 7)),
    "neuron.0.3": ("neurons", 0, (0, slice(None), 3)),
    "attn.1~3": ("attn", 1, (0, 3)),
    "mlp.0": ("mlp", 0, (0, slice(None))),
}
BASE = (
    (Intervention(parse("neuron.0.5~3"), Scale(3.0)), ("neurons", 0, (0, 3, 5))),
    (Intervention(parse("head.1.1~4"), Scale(-2.0)), ("z", 1, (0, 4, 1))),
    (Intervention(parse("mlp.1~5"), Scale(0.5)), ("mlp", 1, (0, 5))),
)


def of_base() -> list[tuple[str, int | None, Any, Any]]:
    return [
        (*place, lambda x, operation=each.operation: plain.apply(operation, x))
        for each, place in BASE
    ]


def objective_of(variant: str, *changes: tuple[str, int | None, Any, Any]) -> float:
    logits = reference_of(variant).run(IDS, edited(*of_base(), *changes))[0, LAST]
    return float(OBJECTIVE.of_logits(logits))


@every_variant
def test_verification(variant: str) -> None:
    engine = engine_of(variant)
    edits = engine.edits(*(each for each, _ in BASE), tokens=len(IDS))
    run = ExplainedRun(IDS, edits, OBJECTIVE)
    nodes = [parse(name) for name in PLACES]
    ablations = [
        Ablation(node, *engine.edits(Intervention(node, Zero()), tokens=len(IDS))) for node in nodes
    ]
    whole = objective_of(variant)
    expected = [
        whole - objective_of(variant, (*place, torch.zeros_like)) for place in PLACES.values()
    ]
    largest = max(map(abs, expected))
    for tokens in (1, 4000):  # each node resumed where it starts, all of them from one place
        begun = verification.begin(engine.hooks, run, ablations, CancelToken(), tokens)
        numbers = range(len(begun.chunks))
        assert len(numbers) == (len(nodes) if tokens == 1 else 1)
        chunks = (begun.chunk(number, CancelToken()) for number in numbers)
        found = {each.node: each.effect for chunk in chunks for each in chunk}
        for node, effect in zip(nodes, expected, strict=True):
            assert found[node] == pytest.approx(effect, abs=2e-5 * largest), (node, tokens)
    assert sum(abs(effect) > 1e-2 * largest for effect in expected) > len(nodes) // 2


@every_variant
def test_integration(variant: str) -> None:
    engine = engine_of(variant)
    edits = engine.edits(*(each for each, _ in BASE), tokens=len(IDS))
    run = ExplainedRun(IDS, edits, OBJECTIVE)
    for kind, site, shape in (
        (Kind.HEAD, "probabilities", (HEADS, len(IDS), len(IDS))),
        (Kind.NEURON, "neurons", (len(IDS), NEURONS)),
    ):
        places = [tuple(each) for each in torch.ones(shape).nonzero().tolist()]
        if kind is Kind.HEAD:
            places = [place for place in places if place[2] <= place[1]]
            nodes = [Address(kind, 1, head, position=q, key=k) for head, q, k in places]
        else:
            nodes = [Address(kind, 1, neuron, position=token) for token, neuron in places]
        begun = integrated.begin(engine.hooks, run, nodes, 3, CancelToken())
        for number in range(len(begun.chunks)):
            begun.chunk(number, CancelToken())
        got = torch.tensor(begun.effects(nodes))
        expected = torch.zeros(shape)
        for share in (1 / 6, 1 / 2, 5 / 6):
            x, gradient = _at(variant, site, share)
            expected += x * gradient / 3
        wanted = torch.stack([expected[place] for place in places])
        assert (got - wanted).abs().max() < 2e-5 * wanted.abs().max()
        assert wanted.abs().max() > 0


def _at(variant: str, site: str, share: float) -> tuple[Tensor, Tensor]:
    """x of layer 1's nodes of one kind, and G with all of them at a share of it."""
    base = edited(*of_base())
    leaf: list[Tensor] = []

    def visit(kind: str, layer: int | None, values: Tensor) -> Tensor:
        values = base(kind, layer, values)
        if (kind, layer) != (site, 1):
            return values
        leaf.extend([values.detach(), (share * values).detach().requires_grad_()])
        return leaf[1]

    logits = reference_of(variant).run(IDS, visit)[0, LAST]
    (gradient,) = torch.autograd.grad(OBJECTIVE.of_logits(logits), [leaf[1]])
    return leaf[0][0], gradient[0]
