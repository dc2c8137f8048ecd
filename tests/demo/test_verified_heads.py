"""On the demo model the estimate finds the heads that matter; real ablation says so."""

import random
from pathlib import Path

import pytest

from services.common.addresses import Address, Kind
from services.common.settings import ModelSource
from services.inference.engine.attribution import ExplainedRun, NormMode
from services.inference.engine.cancellation import CancelToken
from services.inference.engine.correlation import spearman
from services.inference.engine.model import Model
from services.inference.engine.objectives import LogitDiff
from services.inference.server import load_model
from services.inference.verify import ablations

TOP = 8
MODEL = Path(__file__).parents[2] / "demo" / "model"


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(ModelSource("demo", str(MODEL)), None)


def estimated_and_verified(model: Model, number: int) -> tuple[list[float], list[float]]:
    """The effect of every head on one of the model's examples, by both ways."""
    example, words = model.examples[number], model.vocabulary
    ids = words.encode(example.prompt, None)
    target, distractor = words.single(example.target), words.single(example.distractor)
    run = ExplainedRun(ids, (), LogitDiff((target,), (distractor,), len(ids) - 1))
    shape = model.architecture.shape
    heads = [
        Address(Kind.HEAD, layer, head)
        for layer in range(shape.layers)
        for head in range(shape.heads)
    ]
    targets = ablations(heads, model, len(ids))
    cancel = CancelToken()
    estimates = model.estimate(run, targets, NormMode.FINAL_NORM_FROZEN, cancel)
    begun = model.verify(run, targets, NormMode.FINAL_NORM_FROZEN, cancel)
    chunks = (begun.chunk(index, cancel) for index in range(len(begun.chunks)))
    effects = {each.node: each.effect for chunk in chunks for each in chunk}
    return estimates, [effects[head] for head in heads]


def test_top_heads_by_estimate_are_confirmed_and_random_ones_are_not(model: Model) -> None:
    top_shares, random_shares = [], []
    for number, example in enumerate(model.examples):
        estimates, effects = estimated_and_verified(model, number)
        rank = spearman(estimates, effects)
        print(f"{example.title}: rank correlation {rank:.3f}")
        assert rank is not None
        assert rank > 0.4

        def share(heads: list[int], effects: list[float] = effects) -> float:
            """Of what the heads really do, in that of as many that really do most."""
            most = sorted(map(abs, effects), reverse=True)[:TOP]
            return sum(abs(effects[head]) for head in heads) / sum(most)

        by_estimate = sorted(range(len(effects)), key=lambda head: -abs(estimates[head]))
        top_shares.append(share(by_estimate[:TOP]))
        dice = random.Random(number)
        sets = [dice.sample(range(len(effects)), TOP) for _ in range(20)]
        random_shares.append(sum(map(share, sets)) / len(sets))
    print("share of the strongest heads' effect, by estimate:", top_shares)
    print("share of the strongest heads' effect, at random:  ", random_shares)
    assert min(top_shares) > 0.7
    assert max(random_shares) < 0.6
    for top, at_random in zip(top_shares, random_shares, strict=True):
        assert top > 1.5 * at_random
