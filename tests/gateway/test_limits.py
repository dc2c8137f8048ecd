"""Limits of a user over HTTP: refused before work is done, with `Retry-After`."""

import asyncio
from typing import Any

import pytest
from tdb.inference.v1 import model_pb2

from gateway import messages
from tests.common.backend import SERVICE, Backend, connected, serving
from tests.common.test_interceptor import refusal
from tests.gateway.framings import CONNECT, EVENTS, FRAMINGS, body, read
from tests.gateway.helpers import NOWHERE, Gateway, gateway_to, running

ANN = {"authorization": "Bearer t0ken"}
BOB = {"authorization": "Bearer other"}
VARIABLES = {"TDB_TOKENS": "ann:t0ken,bob:other"}


async def test_over_the_rate_is_429_with_retry_after_and_nothing_is_parsed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend = Backend()
    async with gateway_to(backend, **VARIABLES, TDB_REQUESTS_PER_MINUTE="4") as gateway:
        assert (await gateway.call("ListModels", headers=ANN)).status_code == 200
        parsed: list[Any] = []
        monkeypatch.setattr(messages, "parse", lambda *given: parsed.append(given))
        answer = await gateway.call("ListModels", "x" * 3_000_000, headers=ANN)
        monkeypatch.undo()
        assert (await gateway.call("ListModels", headers=BOB)).status_code == 200
        assert (await gateway.client.get("/readyz")).status_code == 200
    assert answer.status_code == 429
    assert answer.json()["code"] == "resource_exhausted"
    assert 10 <= int(answer.headers["retry-after"]) <= 15
    assert parsed == []
    assert len(backend.requests) == 2


@FRAMINGS
async def test_a_stream_says_it_in_its_last_frame(headers: dict[str, str]) -> None:
    async with gateway_to(Backend(), **VARIABLES, TDB_REQUESTS_PER_MINUTE="4") as gateway:
        await gateway.call("ListModels", headers=ANN)
        answer = await gateway.client.post(
            f"/{SERVICE}/Generate", content=body(headers, {}), headers={**headers, **ANN}
        )
    assert headers in (CONNECT, EVENTS)
    assert answer.status_code == 200
    found, end = read(headers, answer.content)
    assert found == []
    assert end["error"]["code"] == "resource_exhausted"
    assert 10 <= int(end["metadata"]["retry-after"][0]) <= 15


async def test_the_page_and_programs_share_one_account() -> None:
    variables = {**VARIABLES, "TDB_REQUESTS_PER_MINUTE": "8"}
    backend = Backend()
    request = model_pb2.ListModelsRequest()
    token = [("authorization", ANN["authorization"])]
    async with (
        serving(backend, **variables) as server,
        running(f"127.0.0.1:{server.port}", NOWHERE, **variables) as (app, client),
        connected(server) as stub,
    ):
        gateway = Gateway(app, client)
        assert (await gateway.call("ListModels", headers=ANN)).status_code == 200
        await stub.ListModels(request, metadata=token)
        # The gateway alone has seen one of two: it is the service that refuses.
        answer = await gateway.call("ListModels", headers=ANN)
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) <= 8
        error = await refusal(stub.ListModels(request, metadata=token))
        assert error.code().name == "RESOURCE_EXHAUSTED"
    assert len(backend.requests) == 2


async def test_at_once() -> None:
    backend = Backend()
    entered, leave = asyncio.Semaphore(0), asyncio.Event()

    async def answer(request: Any, context: Any) -> Any:
        entered.release()
        await leave.wait()
        return model_pb2.ListModelsResponse()

    backend.answer = answer
    async with gateway_to(backend, **VARIABLES, TDB_CONCURRENT_REQUESTS="2") as gateway:
        first = [asyncio.ensure_future(gateway.call("ListModels", headers=ANN)) for _ in range(2)]
        for _ in first:
            await asyncio.wait_for(entered.acquire(), 5)
        third = await gateway.call("ListModels", headers=ANN)
        assert third.status_code == 429
        assert third.headers["retry-after"] == "1"
        leave.set()
        answers = await asyncio.gather(*first)
        assert [each.status_code for each in answers] == [200, 200]
        assert (await gateway.call("ListModels", headers=ANN)).status_code == 200
