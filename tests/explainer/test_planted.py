"""Latents of known meaning, through all services: each is found by its meaning among the
explanations, its explanation scores near 1, and another's near chance."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tdb.explainer.v1 import explain_pb2, explanation_pb2, search_pb2

from services.explainer.search import words
from tests.explainer.openai_server import EMBEDDING_MODEL, KEY, OpenAIServer
from tests.explainer.planted import DATASET, LATENTS, MEANINGFUL, Planted, address

TOKEN_PATTERN = explanation_pb2.METHOD_TOKEN_PATTERN
SCORERS = (
    explanation_pb2.SCORER_DETECTION,
    explanation_pb2.SCORER_FUZZING,
    explanation_pb2.SCORER_SIMULATION,
    explanation_pb2.SCORER_INTERVENTION,
)
HEADLINE = {
    explanation_pb2.SCORER_DETECTION: explanation_pb2.MEASURE_AUC,
    explanation_pb2.SCORER_FUZZING: explanation_pb2.MEASURE_AUC,
    explanation_pb2.SCORER_SIMULATION: explanation_pb2.MEASURE_PEARSON,
    explanation_pb2.SCORER_INTERVENTION: explanation_pb2.MEASURE_ACCURACY,
}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return Planted(tmp_path_factory.mktemp("planted"))


def understood(text: str) -> list[float]:
    """A vector of what a text is about: the classes of its words, or of the word for a class."""
    vector = np.full(len(LATENTS) + 1, 0.01)
    for word in words(text):
        for number in MEANINGFUL:
            latent = LATENTS[number]
            vector[number] += (word in latent.words) + 3 * (word == latent.meaning)
    return [float(value) for value in vector]


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with OpenAIServer() as running:
        running.embedding = understood
        yield running


async def explain_all(stub: Any) -> dict[str, str]:
    """The text for each latent that has one."""
    last = len(LATENTS) - 1
    request = explain_pb2.ExplainManyRequest(
        dataset=DATASET,
        range=explain_pb2.ComponentRange(first=address(0), last=address(last)),
        method=TOKEN_PATTERN,
    )
    found = {}
    async for response in stub.ExplainMany(request):
        if response.HasField("item") and response.item.explanation_id:
            found[response.item.component] = response.item.text
    return found


async def test_a_job_steers_too(planted: Planted, tmp_path: Path) -> None:
    request = explain_pb2.ExplainManyRequest(
        dataset=DATASET,
        list=explain_pb2.ComponentList(components=[address(1), address(2)]),
        method=TOKEN_PATTERN,
        scoring=explain_pb2.Scoring(scorers=[explanation_pb2.SCORER_INTERVENTION]),
    )
    async with planted.serving(tmp_path) as stub:
        ids = [each.item.explanation_id async for each in stub.ExplainMany(request)]
        for id in filter(None, ids):
            get = explanation_pb2.GetExplanationRequest(id=id)
            (score,) = (await stub.GetExplanation(get)).explanation.scores
            assert (score.value, score.n, score.judge, score.dataset) == (
                1.0,
                8,
                "offline",
                DATASET,
            )
    assert len([id for id in ids if id]) == 2


async def best(stub: Any, query: str, **more: Any) -> str:
    """The component whose explanation is found first."""
    response = await stub.Search(search_pb2.SearchRequest(query=query, limit=1, **more))
    return response.found[0].explanation.component if response.found else ""


def queries() -> dict[int, tuple[str, str]]:
    """What each latent means, in words that it fires on, and as one calls it."""
    return {
        number: (" ".join(LATENTS[number].words), LATENTS[number].meaning) for number in MEANINGFUL
    }


async def test_each_planted_latent_is_found_by_its_meaning(
    planted: Planted, server: OpenAIServer, tmp_path: Path
) -> None:
    variables = {
        "TDB_EMBEDDING_URL": server.url,
        "TDB_EMBEDDING_MODEL": EMBEDDING_MODEL,
        "TDB_EMBEDDING_KEY": KEY,
    }
    embed = search_pb2.EmbedExplanationsRequest(max_tokens=10**6)
    meaning = search_pb2.SEARCH_MODE_MEANING
    async with planted.serving(tmp_path / "right", **variables) as stub:
        texts = await explain_all(stub)
        assert set(texts) >= {address(number) for number in MEANINGFUL}
        assert address(len(LATENTS) - 1) not in texts, "what never fires is not explained"
        async for _ in stub.EmbedExplanations(embed):
            pass
        for number, (fires_on, name) in queries().items():
            assert await best(stub, fires_on) == address(number)
            assert await best(stub, name) == "", "no text has the word: only its meaning finds it"
            assert await best(stub, name, mode=meaning) == address(number)
    # Texts that are another latent's lead to that one, whichever way one looks.
    async with planted.serving(tmp_path / "shuffled", **variables) as stub:
        model = explanation_pb2.ExplainedModel(id="planted")
        rotated = [*list(texts)[1:], *list(texts)[:1]]
        for component, text in zip(rotated, texts.values(), strict=True):
            await stub.WriteExplanation(
                explanation_pb2.WriteExplanationRequest(model=model, component=component, text=text)
            )
        async for _ in stub.EmbedExplanations(embed):
            pass
        for number, (fires_on, name) in queries().items():
            assert await best(stub, fires_on) != address(number)
            assert await best(stub, name, mode=meaning) != address(number)


async def headlines(stub: Any, component: str, text: str) -> dict[int, float]:
    """The scores of a text, as somebody wrote it, for a component."""
    model = explanation_pb2.ExplainedModel(id="planted")
    written = await stub.WriteExplanation(
        explanation_pb2.WriteExplanationRequest(model=model, component=component, text=text)
    )
    request = explain_pb2.ScoreRequest(
        id=written.explanation.id,
        dataset=DATASET,
        scoring=explain_pb2.Scoring(scorers=SCORERS),
    )
    found = {}
    async for response in stub.Score(request):
        assert not response.summary.unscored
        score = response.score
        if response.HasField("score") and score.measure == HEADLINE[score.scorer]:
            found[score.scorer] = score.value
    assert set(found) == set(SCORERS)
    return found


async def test_what_is_right_scores_near_one_and_what_is_anothers_near_chance(
    planted: Planted, tmp_path: Path
) -> None:
    right: dict[int, list[float]] = {each: [] for each in SCORERS}
    wrong: dict[int, list[float]] = {each: [] for each in SCORERS}
    async with planted.serving(tmp_path) as stub:
        texts = await explain_all(stub)
        # Of classes that promote nothing in common.
        for number, another in ((0, 1), (1, 2), (2, 3), (6, 0)):
            component = address(number)
            for scorer, value in (await headlines(stub, component, texts[component])).items():
                right[scorer].append(value)
            other = texts[address(another)]
            for scorer, value in (await headlines(stub, component, other)).items():
                wrong[scorer].append(value)
    for scorer in SCORERS:
        name = explanation_pb2.Scorer.Name(scorer)
        assert min(right[scorer]) > 0.9, name
        if scorer == explanation_pb2.SCORER_INTERVENTION:
            # Somewhat below chance: what is promoted leaves less room for anything else.
            assert 0.2 < np.mean(wrong[scorer]) < 0.6
        else:
            chance = 0.0 if scorer == explanation_pb2.SCORER_SIMULATION else 0.5
            assert abs(np.mean(wrong[scorer]) - chance) < 0.15, name
