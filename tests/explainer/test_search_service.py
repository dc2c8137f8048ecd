"""Search, embedding and import over real gRPC: what comes back, and every refusal's field."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from tdb.dataset.v1 import explanations_pb2
from tdb.explainer.v1 import explain_pb2, explanation_pb2, search_pb2, service_pb2

from services.dataset import explanations, groups
from services.dataset.explanations import Explanation
from services.dataset.store import DatasetWriter
from services.explainer import importing
from tests.dataset import helpers as dataset_helpers
from tests.dataset.building import helpers as building_helpers
from tests.explainer import stack
from tests.explainer.openai_server import EMBEDDING_MODEL, KEY, OpenAIServer
from tests.explainer.stack import DATASET_HASH, WEIGHTS, Stack, refusal
from tests.explainer.test_search import meaning

MODEL = explanation_pb2.ExplainedModel(id="demo", weights_hash=WEIGHTS)
MEANING = search_pb2.SEARCH_MODE_MEANING
SEARCH, EMBED = search_pb2.SearchRequest, search_pb2.EmbedExplanationsRequest
ESTIMATE = explain_pb2.EstimateCostRequest
IMPORT = search_pb2.ImportExplanationsRequest


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with OpenAIServer() as running:
        running.embedding = meaning
        yield running


@pytest.fixture
async def served(tmp_path: Path, server: OpenAIServer) -> AsyncIterator[Stack]:
    variables: dict[str, Any] = {
        "TDB_EMBEDDING_URL": server.url,
        "TDB_EMBEDDING_MODEL": EMBEDDING_MODEL,
        "TDB_EMBEDDING_KEY": KEY,
    }
    async with stack.serving(tmp_path, **variables) as found:
        yield found


@pytest.fixture
async def plain(tmp_path: Path) -> AsyncIterator[Stack]:
    async with stack.serving(tmp_path) as found:
        yield found


async def write(served: Stack, component: str, text: str) -> None:
    request = explanation_pb2.WriteExplanationRequest(model=MODEL, component=component, text=text)
    await served.stub.WriteExplanation(request)


def source(component: str = "neuron.0.1", text: str = "names", **more: Any) -> Any:
    scores = [
        explanations_pb2.SourceScore(name=name, value=value)
        for name, value in more.pop("scores", {}).items()
    ]
    return explanations_pb2.SourceExplanation(component=component, text=text, scores=scores, **more)


async def imported(served: Stack, dataset: str = "small") -> search_pb2.ImportSummary:
    responses = [each async for each in served.stub.ImportExplanations(IMPORT(dataset=dataset))]
    read = [each.progress.read for each in responses[:-1]]
    assert read == sorted(read)
    assert responses[-1].WhichOneof("event") == "summary"
    return responses[-1].summary


async def found(served: Stack, query: str, **more: Any) -> list[search_pb2.FoundExplanation]:
    return list((await served.stub.Search(SEARCH(query=query, **more))).found)


async def test_search_by_words(served: Stack) -> None:
    for number in range(5):
        await write(served, f"neuron.{number % 2}.{number}", f"names of women {'x ' * number}")
    await write(served, "head.0.1", "looks at towns")
    page = await served.stub.Search(SEARCH(query="WOM", model=MODEL, limit=2))
    assert (page.total, page.without_embedding, len(page.found)) == (5, 0, 2)
    whole = list(page.found)
    while page.next_cursor:
        request = SEARCH(query="WOM", model=MODEL, limit=2, cursor=page.next_cursor)
        page = await served.stub.Search(request)
        whole += page.found
    relevances = [each.relevance for each in whole]
    assert relevances == sorted(relevances, reverse=True)
    assert whole == await found(served, "WOM", model=MODEL)
    first = whole[0].explanation
    got = await served.stub.GetExplanation(explanation_pb2.GetExplanationRequest(id=first.id))
    assert got.explanation == first
    of_one = await found(served, "women", groups=["neuron.1"])
    assert sorted(each.explanation.component for each in of_one) == ["neuron.1.1", "neuron.1.3"]
    assert await found(served, "women", methods=[explanation_pb2.METHOD_IMPORTED]) == []


async def test_search_by_meaning(served: Stack, server: OpenAIServer) -> None:
    await write(served, "neuron.0.1", "names of women")
    await write(served, "neuron.0.2", "towns")
    page = await served.stub.Search(SEARCH(query="female", mode=MEANING))
    assert (page.total, page.without_embedding) == (0, 2)
    asked = len(server.requests)
    estimate = await served.stub.EstimateCost(ESTIMATE(embed_explanations=EMBED()))
    assert (estimate.calls, estimate.components) == (1, 2)
    assert (estimate.provider_model, estimate.provider) == (EMBEDDING_MODEL, server.url[7:-3])
    assert not estimate.HasField("expected_cost")
    assert len(server.requests) == asked, "an estimate asks nobody"
    request = EMBED(max_tokens=estimate.most_tokens)
    responses = [each async for each in served.stub.EmbedExplanations(request)]
    assert [each.progress.embedded for each in responses[:-1]] == [0, 2]
    summary = responses[-1].summary
    assert (summary.total, summary.embedded, summary.refused, summary.calls) == (2, 2, 0, 1)
    assert 0 < summary.tokens <= estimate.most_tokens
    assert summary.bounded_calls == 0
    page = await served.stub.Search(SEARCH(query="female", mode=MEANING))
    assert [each.explanation.component for each in page.found] == ["neuron.0.1", "neuron.0.2"]
    assert page.found[0].relevance == pytest.approx(1.0, abs=0.01)
    assert (page.total, page.without_embedding) == (2, 0)
    capabilities = await served.stub.GetCapabilities(service_pb2.GetCapabilitiesRequest())
    assert capabilities.has_embeddings
    assert (capabilities.embedding_provider, capabilities.embedding_model) == (
        server.url[7:-3],
        EMBEDDING_MODEL,
    )
    server.requests.clear()
    assert await found(served, "female") == []
    assert server.requests == []


async def test_a_budget_that_is_too_small_stops_it(served: Stack, server: OpenAIServer) -> None:
    await write(served, "neuron.0.1", "names of women")
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        [each async for each in served.stub.EmbedExplanations(EMBED(max_tokens=3))]
    assert refusal(refused.value)[2] == "BUDGET_EXCEEDED"
    assert server.requests == []


REFUSED = [
    ("Search", SEARCH(), "query"),
    ("Search", SEARCH(query="?!"), "query"),
    ("Search", SEARCH(query="x" * 1001), "query"),
    ("Search", SEARCH(query="a", limit=0), "limit"),
    ("Search", SEARCH(query="a", limit=1001), "limit"),
    ("Search", SEARCH(query="a", cursor="x"), "cursor"),
    ("Search", SEARCH(query="a", model=explanation_pb2.ExplainedModel()), "model.id"),
    ("Search", SEARCH(query="a", groups=["neuron.0", "mlp.0"]), "groups[1]"),
    ("Search", SEARCH(query="a", groups=["neuron.0.1"]), "groups[0]"),
    ("Search", SEARCH(query="a", groups=["neuron.x"]), "groups[0]"),
    ("Search", SEARCH(query="a", groups=[""]), "groups[0]"),
    ("Search", SEARCH(query="a", methods=[explanation_pb2.METHOD_UNSPECIFIED]), "methods[0]"),
    ("EmbedExplanations", EMBED(), "max_tokens"),
    ("EmbedExplanations", EMBED(max_tokens=-1), "max_tokens"),
    ("EmbedExplanations", EMBED(max_tokens=5, model=explanation_pb2.ExplainedModel()), "model.id"),
    ("ImportExplanations", IMPORT(), "dataset"),
]


@pytest.mark.parametrize(("rpc", "request_", "field"), REFUSED)
async def test_a_refusal_names_its_field(plain: Stack, rpc: str, request_: Any, field: str) -> None:
    call = getattr(plain.stub, rpc)(request_)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await (call if rpc == "Search" else call.read())
    assert refusal(refused.value)[:2] == ("INVALID_ARGUMENT", field)


async def test_without_an_endpoint_one_reads_how_to_have_one(plain: Stack) -> None:
    await write(plain, "neuron.0.1", "names")
    assert len(await found(plain, "names")) == 1
    with pytest.raises(grpc.aio.AioRpcError, match="TDB_EMBEDDING_URL") as refused:
        await plain.stub.Search(SEARCH(query="names", mode=MEANING))
    assert refusal(refused.value) == ("FAILED_PRECONDITION", "mode", "EMBEDDINGS_NOT_CONFIGURED")
    with pytest.raises(grpc.aio.AioRpcError, match="TDB_EMBEDDING_URL") as refused:
        [each async for each in plain.stub.EmbedExplanations(EMBED(max_tokens=5))]
    assert refusal(refused.value)[2] == "EMBEDDINGS_NOT_CONFIGURED"
    capabilities = await plain.stub.GetCapabilities(service_pb2.GetCapabilitiesRequest())
    assert not capabilities.has_embeddings
    assert (capabilities.embedding_provider, capabilities.embedding_model) == ("", "")


async def test_published_explanations_come_with_their_scores(plain: Stack) -> None:
    plain.dataset.explanations = [
        source(
            "neuron.0.1",
            " names of\r\nwomen ",
            model="gpt-4",
            method="oai_token-act-pair",
            author="somebody",
            scores={"ev_correlation": 0.5, "rsquared": -0.25},
        ),
        source("neuron.0.1", "towns"),
        source("latent.D.7", "numbers", scores={"recall_alt": 1.0}),
    ]
    summary = await imported(plain)
    assert (summary.read, summary.added, summary.known, summary.refused_count) == (3, 3, 0, 0)
    (one,) = await found(plain, "women", model=MODEL)
    explanation = one.explanation
    assert explanation.text == "names of\nwomen"
    assert explanation.model == MODEL
    assert explanation.provenance == explanation_pb2.Provenance(
        method=explanation_pb2.METHOD_IMPORTED,
        explainer_model="gpt-4",
        published_method="oai_token-act-pair",
        dataset="small",
        dataset_hash=DATASET_HASH,
        code_version=explanation.provenance.code_version,
        author="local",
    )
    scores = {each.measure_name: each for each in explanation.scores}
    assert {name: each.value for name, each in scores.items()} == {
        "ev_correlation": 0.5,
        "rsquared": -0.25,
    }
    for each in scores.values():
        assert each.measure == explanation_pb2.MEASURE_PUBLISHED
        assert each.scorer == explanation_pb2.SCORER_UNSPECIFIED
        assert not each.HasField("chance")
        assert not each.HasField("low")
    request = explanation_pb2.ListExplanationsRequest(model=MODEL, components=["neuron.0.1"])
    listed = (await plain.stub.ListExplanations(request)).explanations
    assert [each.text for each in listed] == ["names of\nwomen", "towns"]


async def test_the_same_import_twice_adds_nothing(plain: Stack) -> None:
    plain.dataset.explanations = [
        source(text="one", scores={"ev_correlation": 0.5}),
        source(text="one", model="gpt-4"),
        source("neuron.0.2", "one"),
    ]
    assert (await imported(plain)).added == 3
    before = await found(plain, "one")
    plain.dataset.hash = "ef" * 32
    plain.dataset.explanations.append(source("neuron.0.3", "one"))
    summary = await imported(plain)
    assert (summary.read, summary.added, summary.known) == (4, 1, 3)
    after = await found(plain, "one")
    assert len(after) == 4
    known = {each.explanation.id: each.explanation for each in after}
    assert all(known[each.explanation.id] == each.explanation for each in before)
    # What its publisher measures anew stands beside what was published before.
    plain.dataset.explanations[0].scores[0].value = 0.75
    assert (await imported(plain)).known == 4
    (scored,) = [each.explanation for each in await found(plain, "one") if each.explanation.scores]
    assert [each.value for each in scored.scores] == [0.75]


async def test_what_cannot_be_stored_is_said(plain: Stack) -> None:
    plain.dataset.explanations = [
        source(text="fine"),
        source("mlp.3", "of a sublayer"),
        source("neuron.0.2", "x" * 2001),
        source("neuron.0.3", "a\x00b"),
        source("neuron.0.4", "odd", scores={"ev_correlation": float("nan")}),
        *(source(f"neuron.1.{number}", " ") for number in range(importing.MOST_REFUSED)),
    ]
    summary = await imported(plain)
    assert (summary.read, summary.added, summary.known) == (105, 1, 0)
    assert summary.refused_count == 104
    assert len(summary.refused) == importing.MOST_REFUSED
    said = "\n".join(summary.refused[:4])
    for part in ("mlp.3: ", "neuron.0.2: an explanation has at most", "'ev_correlation'"):
        assert part in said


async def test_a_stream_that_breaks_is_gone_on_with(plain: Stack) -> None:
    plain.dataset.explanations = [source(f"neuron.0.{number}") for number in range(9)]
    plain.dataset.breaks_after.extend([2, 0, 1, 0])
    summary = await imported(plain)
    assert (summary.read, summary.added, summary.known) == (9, 9, 0)
    plain.dataset.breaks_after.extend([1, *[0] * 100])
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await imported(plain)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_dataset_that_is_not_there(plain: Stack) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await imported(plain, "other")
    assert refusal(refused.value)[:2] == ("NOT_FOUND", "dataset")


async def test_from_a_real_dataset_service(tmp_path: Path) -> None:
    told = [
        Explanation(
            "neuron.0.2", "names of women", "oai_token-act-pair", "gpt-4o", scores={"a": 1}
        ),
        Explanation("neuron.1.3", "towns", scores={"ev_correlation": 0.5, "rsquared": -0.25}),
    ]
    folder = tmp_path / "data" / "datasets" / "told"
    with DatasetWriter(folder, dataset_helpers.header()) as writer:
        records = dataset_helpers.random_records(2, dataset_helpers.COMPONENTS[:12])
        writer.write(groups.parse("neuron.0"), 0, records)
        writer.finish(dataset_helpers.VOCABULARY, explanations=explanations.write(folder, told))
    async with (
        building_helpers.serving_at(tmp_path / "data", 1) as port,
        stack.serving(tmp_path, TDB_DATASET_ADDRESS=f"127.0.0.1:{port}") as served,
    ):
        summary = await imported(served, "told")
        assert (summary.read, summary.added, summary.refused_count) == (2, 2, 0)
        assert (await imported(served, "told")).known == 2
        (one,) = await found(served, "towns")
        assert one.explanation.component == "neuron.1.3"
        scores = {each.measure_name: each.value for each in one.explanation.scores}
        assert scores == {"ev_correlation": 0.5, "rsquared": -0.25}
