"""Steering the demo's model: the tokens that a latent promotes are what it then says more of."""

import asyncio
import statistics
from pathlib import Path
from typing import Any

import pytest
from tdb.explainer.v1 import explain_pb2, explanation_pb2

from services.common.settings import DictionarySource
from tests.dataset.building import helpers
from tests.explainer.services import Services

DEMO = Path(__file__).parents[2] / "demo"
NAME, LATENTS = "demo-mlp_out-1", 10
INTERVENTION = explanation_pb2.SCORER_INTERVENTION

pytestmark = pytest.mark.long


@pytest.fixture
def demo(tmp_path: Path) -> Services:
    source = DictionarySource(NAME, str(DEMO / "dictionaries" / NAME), unchecked=False)
    made = Services("demo-gpt2", DEMO / "model", [source], tmp_path / "data")
    request = helpers.request(
        dataset="demo",
        groups=[f"latent.{NAME}"],
        corpus={"demo": {}},
        tokens="16384",
        sequenceLength=64,
        topK=12,
        random=12,
        quantiles=3,
        segmentTokens=16_384,
    )
    asyncio.run(made.build(request))
    return made


async def accuracy(stub: Any, id: str) -> float:
    """The intervention score of an explanation."""
    scoring = explain_pb2.Scoring(scorers=[INTERVENTION])
    request = explain_pb2.ScoreRequest(id=id, dataset="demo", scoring=scoring)
    (value,) = [each.score.value async for each in stub.Score(request) if each.HasField("score")]
    return float(value)


async def test_what_a_latent_promotes_is_said_when_it_is_amplified(
    demo: Services, tmp_path: Path
) -> None:
    async with demo.serving(tmp_path) as stub:
        explained: list[Any] = []
        number = 0
        while len(explained) < LATENTS:
            request = explain_pb2.ExplainManyRequest(
                dataset="demo",
                list=explain_pb2.ComponentList(components=[f"latent.{NAME}.{number}"]),
                method=explanation_pb2.METHOD_TOKEN_PATTERN,
            )
            async for response in stub.ExplainMany(request):
                if response.item.explanation_id and "Promotes" in response.item.text:
                    explained.append(response.item)
            number += 1
        right = [await accuracy(stub, each.explanation_id) for each in explained]
        wrong = []
        for number, each in enumerate(explained):
            write = explanation_pb2.WriteExplanationRequest(
                model=explanation_pb2.ExplainedModel(id="demo-gpt2"),
                component=each.component,
                text=explained[number - 1].text,
            )
            written = await stub.WriteExplanation(write)
            wrong.append(await accuracy(stub, written.explanation.id))
    assert statistics.mean(right) > 0.65, right
    assert 0.3 < statistics.mean(wrong) < 0.55, wrong
    assert statistics.mean(right) > statistics.mean(wrong) + 0.15
