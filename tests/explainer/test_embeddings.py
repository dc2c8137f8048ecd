"""Every way in which an endpoint for embeddings answers, or does not."""

import asyncio
import json
import logging
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from services.common.errors import FailedPrecondition, Unavailable
from services.common.setting_values import Secret
from services.explainer.engine.budget import Budget, BudgetExceeded, Ledger
from services.explainer.engine.embeddings import token_bound
from services.explainer.engine.openai_calls import ATTEMPTS
from services.explainer.engine.openai_embeddings import OpenAIEmbeddings
from services.explainer.engine.provider_settings import Endpoint, ProviderMisconfigured
from tests.explainer.openai_server import (
    EMBEDDING_MODEL,
    KEY,
    Fault,
    OpenAIServer,
    by_words,
    failing,
    too_many,
)

TEXTS = ["names of people", "colours", "numbers and dates"]
MOST = token_bound(len(TEXTS), len("".join(TEXTS))).tokens


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with OpenAIServer() as running:
        yield running


@asynccontextmanager
async def embeddings(
    server: OpenAIServer, *, waits: list[float] | None = None, timeout_s: float = 30.0, **more: Any
) -> AsyncIterator[OpenAIEmbeddings]:
    async def sleep(seconds: float) -> None:
        if waits is not None:
            waits.append(seconds)

    given = {"model": EMBEDDING_MODEL, "key": KEY, **more}
    endpoint = Endpoint(
        server.url, given["model"], Secret(given["key"]), timeout_s, "TDB_EMBEDDING"
    )
    made = OpenAIEmbeddings(endpoint, sleep=sleep, jitter=random.Random(1))
    try:
        yield made
    finally:
        await made.close()


async def embed(server: OpenAIServer, ledger: Ledger, **more: Any) -> Any:
    async with embeddings(server, **more) as made:
        return await made.embed(TEXTS, ledger)


async def test_one_vector_per_text_of_length_one(server: OpenAIServer) -> None:
    server.embedding = lambda text: [5 * value for value in by_words(text)]
    found = await embed(server, ledger := Ledger())
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [by_words(text) for text in TEXTS], atol=1e-6)
    assert (ledger.calls, ledger.bounded_calls) == (1, 0)
    assert ledger.tokens == sum(len(text) // 4 + 1 for text in TEXTS)
    assert server.requests == [
        {"model": EMBEDDING_MODEL, "input": TEXTS, "encoding_format": "float"}
    ]


async def test_vectors_are_told_apart_by_their_index(server: OpenAIServer) -> None:
    data = [{"index": place, "embedding": [place, 1.0]} for place in (2, 0, 1)]
    server.faults.append(Fault(body=json.dumps({"data": data})))
    found = await embed(server, Ledger())
    np.testing.assert_allclose(found[:, 0] / found[:, 1], [0, 1, 2], atol=1e-6)


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        [[1.0]] * 2,
        [[1.0]] * 4,
        [[1.0, 0.0], [1.0], [1.0, 2.0]],
        [[0.0, 0.0]] * 3,
        [[1.0, None]] * 3,
        [["x"]] * 3,
        [{"x": 1}] * 3,
        [None] * 3,
        [[]] * 3,
    ],
)
async def test_what_is_no_embedding_is_none(server: OpenAIServer, data: Any) -> None:
    listed = data and [{"index": n, "embedding": each} for n, each in enumerate(data)]
    server.faults.extend([Fault(body=json.dumps({"data": listed}))] * ATTEMPTS)
    with pytest.raises(Unavailable, match="no embedding"):
        await embed(server, Ledger())


@pytest.mark.parametrize("body", ["", "<html>busy</html>", "[]", '"ok"', "null", "{}"])
async def test_other_bodies_are_none_either(server: OpenAIServer, body: str) -> None:
    server.faults.extend([Fault(body=body)] * ATTEMPTS)
    with pytest.raises(Unavailable, match="no embedding"):
        await embed(server, Ledger())


async def test_what_passes_is_tried_again(server: OpenAIServer) -> None:
    waits: list[float] = []
    server.faults.extend([too_many("3"), failing(503), Fault(hang_up=True)])
    found = await embed(server, ledger := Ledger(), waits=waits)
    assert len(found) == 3
    assert waits[0] >= 3
    assert (ledger.calls, ledger.bounded_calls, ledger.retries) == (2, 1, 3)


async def test_an_endpoint_that_stays_down_says_so(server: OpenAIServer) -> None:
    server.faults.extend([failing()] * ATTEMPTS)
    with pytest.raises(Unavailable, match="answered 500") as refused:
        await embed(server, ledger := Ledger())
    assert refused.value.reason == "EMBEDDINGS_UNAVAILABLE"
    assert (len(server.requests), ledger.tokens) == (ATTEMPTS, 0)
    with OpenAIServer() as gone:
        pass
    with pytest.raises(Unavailable, match="cannot be reached"):
        await embed(gone, Ledger())


async def test_a_slow_endpoint_may_have_been_paid(server: OpenAIServer) -> None:
    server.faults.extend([Fault(delay_s=30)] * ATTEMPTS)
    with pytest.raises(Unavailable, match=r"no answer in 0\.05 s"):
        await embed(server, ledger := Ledger(), timeout_s=0.05)
    assert ledger.tokens == ATTEMPTS * MOST


async def test_no_usage_counts_as_the_most_it_can_be(server: OpenAIServer) -> None:
    server.faults.append(Fault(no_usage=True))
    await embed(server, ledger := Ledger())
    assert (ledger.tokens, ledger.bounded_calls) == (MOST, 1)


async def test_the_budget_is_never_passed(server: OpenAIServer) -> None:
    with pytest.raises(BudgetExceeded):
        await embed(server, Ledger(Budget(max_tokens=MOST - 1)))
    assert server.requests == []
    await embed(server, Ledger(Budget(max_tokens=MOST)))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"key": "sk-wrong"}, "TDB_EMBEDDING_KEY is set"),
        ({"key": ""}, "TDB_EMBEDDING_KEY is not set"),
        ({"model": "other"}, "no model other there: see TDB_EMBEDDING_MODEL"),
    ],
)
async def test_a_wrong_key_or_model_is_said(
    server: OpenAIServer, given: dict[str, str], says: str
) -> None:
    with pytest.raises(ProviderMisconfigured, match=says) as refused:
        await embed(server, Ledger(), **given)
    assert "sk-" not in str(refused.value)
    assert len(server.requests) == 1


async def test_texts_that_it_does_not_take_are_not_sent_again(server: OpenAIServer) -> None:
    server.faults.append(Fault(400, {"message": f"too long: {TEXTS[0]}"}))
    with pytest.raises(FailedPrecondition, match="does not take them") as refused:
        await embed(server, Ledger())
    assert TEXTS[0] not in str(refused.value)
    assert len(server.requests) == 1


async def test_the_key_is_nowhere_but_in_its_header(
    server: OpenAIServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_ORG_ID", "org-private")
    caplog.set_level(logging.DEBUG)
    async with embeddings(server) as made:
        await made.embed(TEXTS, Ledger())
        assert KEY not in repr(vars(made))
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    assert "openai-organization" not in server.headers[0]
    assert KEY not in caplog.text + repr(server.requests)


async def test_a_call_that_is_cancelled_may_have_been_paid(server: OpenAIServer) -> None:
    server.faults.append(Fault(delay_s=30))
    ledger = Ledger()
    async with embeddings(server) as made:
        call = asyncio.ensure_future(made.embed(TEXTS, ledger))
        await asyncio.to_thread(server.first.wait)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    assert ledger.tokens == MOST
