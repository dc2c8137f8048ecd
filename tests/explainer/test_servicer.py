"""The RPCs of stored explanations over real gRPC: what comes back, and every refusal's field."""

import logging
import math
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from tdb.explainer.v1 import explain_pb2, explanation_pb2, service_pb2

from services.explainer.engine.explanations import Method
from services.explainer.stored import ExplainedModel, NewExplanation
from tests.explainer import stack, synthetic
from tests.explainer.stack import WEIGHTS, Stack, refusal

MODEL = explanation_pb2.ExplainedModel(id="demo", weights_hash=WEIGHTS)
ADDRESS = "neuron.1.7"


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Stack]:
    async with stack.serving(tmp_path, [synthetic.component(count=40)]) as found:
        yield found


async def write(served: Stack, text: str = "names", **fields: Any) -> explanation_pb2.Explanation:
    known: dict[str, Any] = {} if "based_on" in fields else {"model": MODEL, "component": ADDRESS}
    request = explanation_pb2.WriteExplanationRequest(**(known | {"text": text} | fields))
    return (await served.stub.WriteExplanation(request)).explanation


async def listed(
    served: Stack, *components: str, **fields: Any
) -> list[explanation_pb2.Explanation]:
    request = explanation_pb2.ListExplanationsRequest(
        model=MODEL, components=components or (ADDRESS,), **fields
    )
    return list((await served.stub.ListExplanations(request)).explanations)


async def test_a_text_is_written_read_rated_and_deleted(
    served: Stack, caplog: pytest.LogCaptureFixture
) -> None:
    stub = served.stub
    written = await write(served, '  fires on " Mary",\n\tsometimes ')
    assert written.text == 'fires on " Mary",\n\tsometimes'
    assert written.provenance.method == explanation_pb2.METHOD_HUMAN
    assert written.provenance.author == "local"
    assert not written.provenance.HasField("seed")
    assert written.model == MODEL
    assert written.created_ms > 1_700_000_000_000
    got = await stub.GetExplanation(explanation_pb2.GetExplanationRequest(id=written.id))
    assert got.explanation == written
    assert await listed(served) == [written]

    rate = explanation_pb2.RateExplanationRequest(id=written.id, rating=4)
    ratings = (await stub.RateExplanation(rate)).ratings
    assert ratings == explanation_pb2.Ratings(count=1, mean=4.0, own=4)
    assert (await listed(served))[0].ratings == ratings
    rate.ClearField("rating")
    assert (await stub.RateExplanation(rate)).ratings == explanation_pb2.Ratings()

    caplog.set_level(logging.INFO, "tdb.explainer")
    await stub.DeleteExplanation(explanation_pb2.DeleteExplanationRequest(id=written.id))
    assert await listed(served) == []
    (said,) = [each for each in caplog.records if each.message == "an explanation was deleted"]
    assert said.fields == {"user": "local", "id": written.id}  # type: ignore[attr-defined]
    capabilities = await stub.GetCapabilities(service_pb2.GetCapabilitiesRequest())
    assert capabilities.explanations == 0


async def test_an_edit_stands_before_what_it_was_made_from(served: Stack) -> None:
    first = await write(served, "names")
    edit = await write(served, "names of women", based_on=first.id)
    assert edit.provenance.based_on == first.id
    assert (edit.model, edit.component) == (first.model, first.component)
    assert [each.id for each in await listed(served)] == [edit.id, first.id]
    assert [each.id for each in await listed(served, best_only=True)] == [edit.id]


async def test_every_user_rates_for_themselves(tmp_path: Path) -> None:
    tokens = "ada:token-of-ada-0123456789,ben:token-of-ben-0123456789"
    async with stack.serving(tmp_path, TDB_TOKENS=tokens) as served:

        def as_user(name: str) -> dict[str, Any]:
            return {"metadata": [("authorization", f"Bearer token-of-{name}-0123456789")]}

        request = explanation_pb2.WriteExplanationRequest(model=MODEL, component=ADDRESS, text="x")
        written = (await served.stub.WriteExplanation(request, **as_user("ada"))).explanation
        assert written.provenance.author == "ada"
        for name, rating in (("ada", 5), ("ben", 2)):
            rate = explanation_pb2.RateExplanationRequest(id=written.id, rating=rating)
            await served.stub.RateExplanation(rate, **as_user(name))
        get = explanation_pb2.GetExplanationRequest(id=written.id)
        for name, rating in (("ada", 5), ("ben", 2)):
            ratings = (await served.stub.GetExplanation(get, **as_user(name))).explanation.ratings
            assert ratings == explanation_pb2.Ratings(count=2, mean=3.5, own=rating)


async def test_an_answer_that_no_message_holds_is_refused(served: Stack) -> None:
    components = [f"neuron.0.{number}" for number in range(2000)]
    given = NewExplanation(
        model=ExplainedModel("demo", WEIGHTS),
        component="",
        text="\U0001f600" * 2000,
        method=Method.HUMAN,
        code_version="1",
        author="ada",
    )
    await served.store.add_many([(replace(given, component=each), ()) for each in components])
    assert len(await listed(served, *components[:400])) == 400
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await listed(served, *components)
    assert refusal(refused.value) == ("INVALID_ARGUMENT", "components", "TOO_LARGE")


def explain(**fields: Any) -> explain_pb2.ExplainRequest:
    known: dict[str, Any] = {
        "dataset": "small",
        "component": ADDRESS,
        "method": explanation_pb2.METHOD_TOKEN_PATTERN,
    }
    return explain_pb2.ExplainRequest(**(known | fields))


def scoring(*scorers: Any, **fields: Any) -> explain_pb2.Scoring:
    return explain_pb2.Scoring(scorers=scorers or [explanation_pb2.SCORER_DETECTION], **fields)


def texts(*tokens: str) -> list[explain_pb2.TokenTexts]:
    return [explain_pb2.TokenTexts(tokens=tokens)]


HUGE = "x" * 201
LIST, WRITE = explanation_pb2.ListExplanationsRequest, explanation_pb2.WriteExplanationRequest
RATE, SCORE = explanation_pb2.RateExplanationRequest, explain_pb2.ScoreRequest
SIMULATE = explain_pb2.SimulateRequest
PATTERN = 'Fires on the token " red" (10).'
NO_HASH = explanation_pb2.ExplainedModel(id="demo", weights_hash="XYZ")
HEADS = explanation_pb2.METHOD_ATTENTION_HEAD
CONTRASTIVE = explanation_pb2.METHOD_CONTRASTIVE
DETECTION, PAIRS = explanation_pb2.SCORER_DETECTION, explanation_pb2.SCORER_HEAD_PAIRS

D = explanation_pb2.ExplainedDictionary(id="d", weights_hash="ab")


def of(*dictionaries: explanation_pb2.ExplainedDictionary, **fields: str) -> Any:
    """A model with dictionaries; with `fields`, with one of them."""
    given = dictionaries or [explanation_pb2.ExplainedDictionary(**fields)]
    return explanation_pb2.ExplainedModel(id="demo", dictionaries=given)


REFUSED: list[tuple[str, Any, str]] = [
    ("ListExplanations", LIST(components=[ADDRESS]), "model.id"),
    ("ListExplanations", LIST(model=NO_HASH, components=[ADDRESS]), "model.weights_hash"),
    (
        "ListExplanations",
        LIST(model=of(id="d"), components=[ADDRESS]),
        "model.dictionaries[0].weights_hash",
    ),
    (
        "ListExplanations",
        LIST(model=of(weights_hash="ab"), components=[ADDRESS]),
        "model.dictionaries[0].id",
    ),
    ("ListExplanations", LIST(model=of(D, D), components=[ADDRESS]), "model.dictionaries[1].id"),
    ("ListExplanations", LIST(model=MODEL), "components"),
    ("ListExplanations", LIST(model=MODEL, components=["mlp.3"]), "components[0]"),
    ("ListExplanations", LIST(model=MODEL, components=[ADDRESS, "neuron.1.7~3"]), "components[1]"),
    ("ListExplanations", LIST(model=MODEL, components=[ADDRESS, ADDRESS]), "components[1]"),
    (
        "ListExplanations",
        LIST(model=MODEL, components=[f"neuron.0.{each}" for each in range(10_001)]),
        "components",
    ),
    ("GetExplanation", explanation_pb2.GetExplanationRequest(), "id"),
    ("GetExplanation", explanation_pb2.GetExplanationRequest(id=HUGE), "id"),
    ("DeleteExplanation", explanation_pb2.DeleteExplanationRequest(), "id"),
    ("RateExplanation", RATE(rating=3), "id"),
    ("RateExplanation", RATE(id="x", rating=0), "rating"),
    ("RateExplanation", RATE(id="x", rating=6), "rating"),
    ("WriteExplanation", WRITE(model=MODEL, component=ADDRESS), "text"),
    ("WriteExplanation", WRITE(model=MODEL, component=ADDRESS, text=" \n "), "text"),
    ("WriteExplanation", WRITE(model=MODEL, component=ADDRESS, text="x" * 2001), "text"),
    ("WriteExplanation", WRITE(model=MODEL, component=ADDRESS, text="a\x00b"), "text"),
    ("WriteExplanation", WRITE(component=ADDRESS, text="x"), "model"),
    ("WriteExplanation", WRITE(model=MODEL, text="x"), "component"),
    ("WriteExplanation", WRITE(model=MODEL, component="head.1.2.q", text="x"), "component"),
    ("WriteExplanation", WRITE(based_on="x", component=ADDRESS, text="x"), "component"),
    ("WriteExplanation", WRITE(based_on="x", model=MODEL, text="x"), "model"),
    ("Explain", explain(dataset=""), "dataset"),
    ("Explain", explain(component=""), "component"),
    ("Explain", explain(component="mlp.3"), "component"),
    ("Explain", explain(method=0), "method"),
    ("Explain", explain(method=99), "method"),
    ("Explain", explain(method=explanation_pb2.METHOD_HUMAN), "method"),
    ("Explain", explain(method=explanation_pb2.METHOD_IMPORTED), "method"),
    ("Explain", explain(method=HEADS), "method"),
    ("Explain", explain(method=CONTRASTIVE, component="head.1.2"), "method"),
    ("Explain", explain(scoring=explain_pb2.Scoring()), "scoring.scorers"),
    ("Explain", explain(scoring=scoring(0)), "scoring.scorers[0]"),
    ("Explain", explain(scoring=scoring(DETECTION, DETECTION)), "scoring.scorers[1]"),
    ("Explain", explain(scoring=scoring(DETECTION, PAIRS)), "scoring.scorers[1]"),
    ("Explain", explain(component="head.1.2", scoring=scoring(DETECTION)), "scoring.scorers[0]"),
    ("Explain", explain(scoring=scoring(items=0)), "scoring.items"),
    ("Explain", explain(scoring=scoring(items=201)), "scoring.items"),
    ("Explain", explain(scoring=scoring(judge=7)), "scoring.judge"),
    (
        "Explain",
        explain(method=CONTRASTIVE, scoring=scoring(judge=explain_pb2.JUDGE_OFFLINE)),
        "scoring.judge",
    ),
    ("Explain", explain(budget=explain_pb2.Budget()), "budget"),
    ("Explain", explain(budget=explain_pb2.Budget(max_tokens=-1)), "budget.max_tokens"),
    ("Explain", explain(budget=explain_pb2.Budget(max_cost=math.nan)), "budget.max_cost"),
    ("Explain", explain(budget=explain_pb2.Budget(max_cost=-0.5)), "budget.max_cost"),
    ("Score", SCORE(dataset="small", scoring=scoring()), "id"),
    ("Score", SCORE(id="x", scoring=scoring()), "dataset"),
    ("Score", SCORE(id="x", dataset="small"), "scoring.scorers"),
    ("Simulate", SIMULATE(texts=texts("a")), "explanation"),
    ("Simulate", SIMULATE(id="", texts=texts("a")), "id"),
    ("Simulate", SIMULATE(text="", texts=texts("a")), "text"),
    ("Simulate", SIMULATE(text=PATTERN), "texts"),
    ("Simulate", SIMULATE(text=PATTERN, texts=texts("a") * 101), "texts"),
    ("Simulate", SIMULATE(text=PATTERN, texts=texts("a") + texts()), "texts[1].tokens"),
    ("Simulate", SIMULATE(text=PATTERN, texts=texts(*["a"] * 1025)), "texts[0].tokens"),
    ("Simulate", SIMULATE(text=synthetic.HEAD, texts=texts("a")), "text"),
]


async def answer(served: Stack, rpc: str, request: Any) -> list[Any]:
    call = getattr(served.stub, rpc)(request)
    if rpc in ("Explain", "Score"):
        return [each async for each in call]
    return [await call]


async def test_what_can_never_work_is_refused_by_its_field(served: Stack) -> None:
    for rpc, request, field in REFUSED:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await answer(served, rpc, request)
        assert refusal(refused.value)[:2] == ("INVALID_ARGUMENT", field), (rpc, request)
    assert await served.store.count() == 0


async def test_what_is_not_there_is_not_found(served: Stack) -> None:
    for rpc, request, field in (
        ("GetExplanation", explanation_pb2.GetExplanationRequest(id="x"), "id"),
        ("RateExplanation", RATE(id="x", rating=3), "id"),
        ("DeleteExplanation", explanation_pb2.DeleteExplanationRequest(id="x"), "id"),
        ("WriteExplanation", WRITE(based_on="x", text="x"), "based_on"),
        ("Score", SCORE(id="x", dataset="small", scoring=scoring()), "id"),
        ("Simulate", SIMULATE(id="x", texts=texts("a")), "id"),
        ("Explain", explain(dataset="large"), "dataset"),
        ("Explain", explain(component="neuron.1.8"), "component"),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await answer(served, rpc, request)
        assert refusal(refused.value) == ("NOT_FOUND", field, "NOT_FOUND"), rpc


async def test_without_a_language_model_nothing_is_asked_of_one(served: Stack) -> None:
    written = await write(served, "names")
    pattern = await write(served, PATTERN)
    provider = explain_pb2.JUDGE_PROVIDER
    for rpc, request in (
        ("Explain", explain(method=CONTRASTIVE)),
        ("Explain", explain(method=explanation_pb2.METHOD_OUTPUT_CENTRED)),
        ("Explain", explain(scoring=scoring(judge=provider))),
        ("Score", SCORE(id=written.id, dataset="small", scoring=scoring())),
        ("Score", SCORE(id=pattern.id, dataset="small", scoring=scoring(judge=provider))),
        ("Simulate", SIMULATE(id=written.id, texts=texts("a"))),
        ("Simulate", SIMULATE(text=PATTERN, texts=texts("a"), judge=provider)),
    ):
        with pytest.raises(grpc.aio.AioRpcError, match="set TDB_PROVIDER_URL to") as refused:
            await answer(served, rpc, request)
        expected = ("FAILED_PRECONDITION", "", "PROVIDER_NOT_CONFIGURED")
        assert refusal(refused.value) == expected, (rpc, request)
