"""Integrated effects of latents against the sum over midpoints by hand, in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from services.common.addresses import Address, Kind, parse
from services.inference.engine import integrated
from services.inference.engine.attribution import ExplainedRun
from services.inference.engine.cancellation import CancelToken
from services.inference.engine.dictionaries.dictionary import Dictionary, InputNorm, NormKind
from services.inference.engine.dictionaries.sites import Point
from services.inference.engine.interventions import Intervention, SetTo
from services.inference.engine.objectives import LogitDiff
from tests.inference.helpers import in_float64, random_engine, random_model
from tests.inference.planted import LATENTS, ByHand, random_dictionary
from tests.inference.test_splice import IDS, by_hand

__all__ = ["in_float64"]

DOUBLE = torch.float64
LAST = len(IDS) - 1
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


def integrate(dictionary: Dictionary, nodes: list[Address], steps: int, edited: bool) -> Tensor:
    engine = random_engine("gpt2", DOUBLE, [dictionary])
    wanted = [Intervention(parse("latent.D.3~5"), SetTo(2.0))] if edited else []
    run = ExplainedRun(IDS, engine.edits(*wanted, tokens=len(IDS)), OBJECTIVE)
    begun = integrated.begin(engine.hooks, run, nodes, steps, CancelToken())
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
    tokens, latents = torch.ones(len(IDS), LATENTS).nonzero(as_tuple=True)
    nodes = [
        Address(Kind.LATENT, index=int(latent), dictionary="D", position=int(token))
        for token, latent in zip(tokens, latents, strict=True)
    ]
    got = integrate(dictionary, nodes, 3, edited)
    assert expected.abs().max() > 1e-4
    assert (got - expected[tokens, latents]).abs().max() < 1e-8 * expected.abs().max()
    change_in_j = float(at(1.0) - at(0.0))
    many = float(integrate(dictionary, nodes, 64, edited).sum())
    assert many == pytest.approx(change_in_j, rel=2e-2)
