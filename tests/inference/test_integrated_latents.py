"""Integrated effects of latents against the sum over midpoints by hand, in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from services.common.addresses import Address, Kind, parse
from services.inference.engine import baselines, integrated
from services.inference.engine.attribution import ExplainedRun, NormMode, explain
from services.inference.engine.baselines import Reference
from services.inference.engine.cancellation import CancelToken
from services.inference.engine.columns import COLUMNS, Column
from services.inference.engine.dictionaries.dictionary import Dictionary, InputNorm, NormKind
from services.inference.engine.dictionaries.sites import Point
from services.inference.engine.interventions import Intervention, SetTo
from services.inference.engine.latents import LatentNodes
from services.inference.engine.objectives import LogitDiff
from services.inference.engine.sublayers import Sublayer
from tests.inference.helpers import in_float64, random_engine, random_model
from tests.inference.planted import LATENTS, ByHand, random_dictionary
from tests.inference.test_splice import IDS, by_hand

__all__ = ["in_float64"]

DOUBLE = torch.float64
LAST = len(IDS) - 1
OTHER = (3, 50, 4, 7, 25, 60, 2, 1)
NODES = [
    Address(Kind.LATENT, index=latent, dictionary="D", position=token)
    for token in range(len(IDS))
    for latent in range(LATENTS)
]
OBJECTIVE = LogitDiff((5,), (9, 11), LAST)
DICTIONARIES: dict[str, Dictionary] = {
    **{
        point.name: random_dictionary("D", point, 1, dtype=DOUBLE)
        for point in (Point.Z, Point.ATTN_OUT, Point.MLP_ACT, Point.RESID_MID, Point.RESID_POST)
    },
    "layer norm": random_dictionary(
        "D", Point.MLP_OUT, 0, norm=InputNorm(NormKind.LAYER_NORM), dtype=DOUBLE
    ),
    "transcoder": random_dictionary(
        "D", Point.MLP_OUT, 1, reads=Point.MLP_IN, skip=True, dtype=DOUBLE
    ),
}


def integrate(
    dictionary: Dictionary,
    nodes: list[Address],
    steps: int,
    edited: bool = False,
    reference: Reference | None = None,
    along_input: bool = False,
) -> Tensor:
    engine = random_engine("gpt2", DOUBLE, [dictionary])
    wanted = [Intervention(parse("latent.D.3~5"), SetTo(2.0))] if edited else []
    run = ExplainedRun(IDS, engine.edits(*wanted, tokens=len(IDS)), OBJECTIVE)
    starts = None
    if reference:
        starts = baselines.starts(engine.hooks, reference, CancelToken(), ["D"])
    begun = integrated.begin(
        engine.hooks, run, nodes, steps, CancelToken(), starts, along_input=along_input
    )
    for number in range(len(begun.chunks)):
        begun.chunk(number, CancelToken())
    return torch.tensor(begun.effects(nodes), dtype=DOUBLE)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("edited", [False, True])
@pytest.mark.parametrize("name", DICTIONARIES)
def test_effects_of_latents_are_the_sum_over_midpoints_written_out(name: str, edited: bool) -> None:
    dictionary = DICTIONARIES[name]
    model: Any = random_model("gpt2", DOUBLE)
    found: list[tuple[Tensor, Tensor]] = []

    def at(share: float) -> Tensor:
        leaf: list[Tensor] = []

        def change(formulas: ByHand, x: Tensor, target: Tensor) -> Tensor:
            before = formulas.latents(x).detach()
            f = before.clone()
            if edited:
                f[5, 3] = 2.0
            leaf.extend([f, (share * f).requires_grad_()])
            return formulas.write(leaf[1], x) - formulas.write(before, x)

        logits = by_hand(model, dictionary, change)[LAST]
        (gradient,) = torch.autograd.grad(OBJECTIVE.of_logits(logits), [leaf[1]])
        found.append((leaf[0], gradient))
        return OBJECTIVE.of_logits(logits.detach())

    for share in (1 / 6, 1 / 2, 5 / 6):
        at(share)
    expected = sum((f * gradient for f, gradient in found), torch.zeros(())) / 3
    got = integrate(dictionary, NODES, 3, edited)
    assert expected.abs().max() > 1e-4
    assert (got - expected.flatten()).abs().max() < 1e-8 * expected.abs().max()
    change_in_j = float(at(1.0) - at(0.0))
    many = float(integrate(dictionary, NODES, 64, edited).sum())
    assert many == pytest.approx(change_in_j, rel=2e-2)


def latents_by_hand(dictionary: Dictionary, ids: tuple[int, ...]) -> Tensor:
    """f of another prompt: what the formulas make of the vectors that stand at its site there."""
    found: list[Tensor] = []

    def change(formulas: ByHand, x: Tensor, target: Tensor) -> Tensor:
        found.append(formulas.latents(x).detach())
        return torch.zeros_like(target)

    by_hand(random_model("gpt2", DOUBLE), dictionary, change, ids=ids)
    return found[0]


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("name", ["Z", "MLP_ACT", "layer norm", "transcoder", "RESID_POST"])
def test_from_another_runs_latents(name: str) -> None:
    dictionary = DICTIONARIES[name]
    model: Any = random_model("gpt2", DOUBLE)
    start = latents_by_hand(dictionary, OTHER)
    reference = Reference(((OTHER, ()),), tuple(range(len(IDS))))

    engine = random_engine("gpt2", DOUBLE, [dictionary])
    starts = baselines.starts(engine.hooks, reference, CancelToken(), ["D"])
    assert torch.allclose(starts[Sublayer(Kind.LATENT, None, "D")], start, atol=1e-9)

    (explanation,), _ = explain(
        engine.hooks,
        engine.architecture,
        [ExplainedRun(IDS, (), OBJECTIVE)],
        [NormMode.LIVE],
        CancelToken(),
        ["D"],
    )
    (group,) = [each for each in explanation.groups if isinstance(each, LatentNodes)]
    group.measure_from(start)
    indices = torch.tensor([group.find(node) for node in NODES])
    estimates = group.gather(indices)[:, COLUMNS.index(Column.TOTAL_EFFECT)]
    active = [group.address(number) for number in range(group.size)]
    assert set(active) >= {
        node for node, value in zip(NODES, start.flatten(), strict=True) if value
    }

    sums, moved = [], torch.zeros(())
    for share in (1.0, 1 / 6, 1 / 2, 5 / 6):
        leaf: list[Tensor] = []

        def change(
            formulas: ByHand,
            x: Tensor,
            target: Tensor,
            share: float = share,
            leaf: list[Tensor] = leaf,
        ) -> Tensor:
            f = formulas.latents(x).detach()
            leaf.extend([f - start, (start + share * (f - start)).requires_grad_()])
            return formulas.write(leaf[1], x) - formulas.write(f, x)

        logits = by_hand(model, dictionary, change)[LAST]
        (gradient,) = torch.autograd.grad(OBJECTIVE.of_logits(logits), [leaf[1]])
        sums.append(gradient)
        moved = leaf[0]
    expected = (moved * sums[0]).flatten()
    # Latents that are 0 in both runs have no effect, whatever their gradient.
    assert (estimates - expected).abs().max() < 1e-8 * expected.abs().max()
    expected = (moved * sum(sums[1:]) / 3).flatten()
    got = integrate(dictionary, NODES, 3, reference=reference)
    assert (got - expected).abs().max() < 1e-8 * expected.abs().max()
    along = integrate(dictionary, NODES, 3, reference=reference, along_input=True)
    assert along.abs().max() > 0
    assert (along - got).abs().max() > 1e-3 * got.abs().max()
