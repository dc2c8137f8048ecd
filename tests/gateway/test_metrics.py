"""How requests ended, as the gateway's log and metrics have it."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry
from starlette.types import Message, Receive, Scope, Send

from gateway.access import Access
from gateway.metrics import OTHER, PAGE, GatewayMetrics
from services.common import errors
from services.common.logs import JsonLines
from services.common.tracing import Untraced
from tests.gateway import echo
from tests.gateway.echo import ECHO, ITEMS, ItemsResponse
from tests.gateway.framings import EVENTS, FRAMINGS, body
from tests.gateway.helpers import NOWHERE, listening, running


@pytest.fixture(autouse=True)
def exposed(monkeypatch: pytest.MonkeyPatch) -> None:
    echo.expose(monkeypatch, echo.DESCRIPTOR)


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def ended(registry: CollectorRegistry, route: str, code: str) -> float | None:
    labels = {"route": route, "code": code}
    return registry.get_sample_value("tdb_gateway_requests_total", labels)


def open_streams(registry: CollectorRegistry) -> float | None:
    return registry.get_sample_value("tdb_gateway_open_streams", {"route": ITEMS})


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    formatter = JsonLines(log_prompts=False)
    records = [record for record in caplog.records if record.message == "request"]
    return [json.loads(formatter.format(record)) for record in records]


@FRAMINGS
async def test_a_stream_that_failed_after_its_200_is_logged_and_counted_as_that(
    headers: dict[str, str], registry: CollectorRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[float | None] = []

    async def items(request: Any, context: Any) -> AsyncIterator[Any]:
        seen.append(open_streams(registry))
        yield ItemsResponse()
        if request.text == "refuse":
            raise errors.ResourceExhausted("the queue is full", retry_after_s=1)

    with caplog.at_level(logging.INFO, "tdb.gateway"):
        async with (
            echo.echo_server(items) as server,
            running(f"127.0.0.1:{server.port}", NOWHERE, registry) as (_, client),
        ):
            for text in ("", "refuse"):
                asked = body(headers, {"text": text})
                response = await client.post(ITEMS, content=asked, headers=headers)
                assert response.status_code == 200
    assert [(line["status"], line["code"]) for line in lines(caplog)] == [
        (200, "ok"),
        (200, "resource_exhausted"),
    ]
    assert ended(registry, ITEMS, "ok") == 1
    assert ended(registry, ITEMS, "resource_exhausted") == 1
    assert seen == [1, 1]
    assert open_streams(registry) == 0
    sent = registry.get_sample_value("tdb_gateway_response_bytes_total", {"route": ITEMS})
    assert sent is not None
    assert sent > len(response.content)


async def test_a_stream_whose_client_left_is_canceled_and_closed(
    registry: CollectorRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    async def items(request: Any, context: Any) -> AsyncIterator[Any]:
        yield ItemsResponse()
        await asyncio.sleep(30)

    with caplog.at_level(logging.INFO, "tdb.gateway"):
        async with (
            echo.echo_server(items) as server,
            running(f"127.0.0.1:{server.port}", NOWHERE, registry) as (app, _),
            listening(app) as address,
            httpx.AsyncClient(base_url=address) as client,
        ):
            async with client.stream("POST", ITEMS, content=b"{}", headers=EVENTS) as response:
                await anext(response.aiter_bytes())
                assert open_streams(registry) == 1
            while open_streams(registry):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    assert [(line["status"], line["code"]) for line in lines(caplog)] == [(200, "canceled")]
    assert ended(registry, ITEMS, "canceled") == 1


async def test_a_request_that_is_cut_off_is_canceled_whatever_was_sent(
    registry: CollectorRegistry,
) -> None:
    async def cut_off(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise asyncio.CancelledError

    async def ignore(message: Message) -> None: ...

    async def nothing() -> Message:
        return {"type": "http.disconnect"}

    access = Access(cut_off, GatewayMetrics(registry), Untraced())
    scope = {"type": "http", "method": "POST", "path": ITEMS, "headers": []}
    with pytest.raises(asyncio.CancelledError):
        await access(scope, nothing, ignore)
    assert ended(registry, ITEMS, "canceled") == 1
    assert open_streams(registry) == 0


async def test_the_line_of_a_call_names_its_user(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "tdb.gateway"):
        async with running("127.0.0.1:1", TDB_TOKENS="ann:t0ken") as (_, client):
            for token in ("t0ken", "wrong"):
                headers = {"authorization": f"Bearer {token}"}
                await client.post(ECHO, json={}, headers=headers)
    assert [(line["user"], line["code"]) for line in lines(caplog)] == [
        ("ann", "unavailable"),
        ("", "unauthenticated"),
    ]


async def test_an_error_names_the_request_as_header_log_and_service_do(
    registry: CollectorRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    async def refuse(request: Any, context: Any) -> Any:
        raise errors.NotFound("no such thing")

    with caplog.at_level(logging.INFO, "tdb"):
        async with (
            echo.echo_server(unary=refuse) as server,
            running(f"127.0.0.1:{server.port}", NOWHERE, registry) as (_, client),
        ):
            theirs = await client.post(ECHO, json={})
            ours = await client.post(ECHO, json={"nonsense": 1})
        unreachable = await _to_nobody(registry)
    for response in (theirs, ours, unreachable):
        infos = [
            detail["debug"]["requestId"]
            for detail in response.json()["details"]
            if detail["type"] == "google.rpc.RequestInfo"
        ]
        assert infos == [response.headers["x-request-id"]]
    logged = [line["request_id"] for line in lines(caplog)]
    assert logged[0] == theirs.headers["x-request-id"]
    service = next(record for record in caplog.records if record.name == "tdb.calls")
    assert service.fields["request_id"] == logged[0]  # type: ignore[attr-defined]
    assert [line["code"] for line in lines(caplog)] == [
        "not_found",
        "invalid_argument",
        "unavailable",
    ]


async def _to_nobody(registry: CollectorRegistry) -> httpx.Response:
    async with running("127.0.0.1:1", NOWHERE, CollectorRegistry()) as (_, client):
        return await client.post(ECHO, json={})


@pytest.mark.parametrize(
    ("method", "path", "route"),
    [
        ("POST", ITEMS, ITEMS),
        ("GET", "/readyz", "/readyz"),
        ("GET", "/", PAGE),
        ("GET", "/any/place?x", PAGE),
        ("POST", "/any/place", OTHER),
        ("BREW", "/tdb.test.v1.EchoService/None", OTHER),
    ],
)
def test_few_routes_whatever_is_asked_for(
    registry: CollectorRegistry, method: str, path: str, route: str
) -> None:
    assert GatewayMetrics(registry).route(method, path) == route


async def test_what_is_no_call_has_the_code_of_its_status(registry: CollectorRegistry) -> None:
    async with running("127.0.0.1:1", NOWHERE, registry, TDB_TOKENS="ann:t0ken") as (_, client):
        await client.get("/healthz")
        await client.get("/")
        await client.post("/nothing/here", json={})
        await client.post(ECHO, json={})
    assert ended(registry, "/healthz", "ok") == 1
    assert ended(registry, PAGE, "unavailable") == 1
    assert ended(registry, OTHER, "unauthenticated") == 1
    assert ended(registry, ECHO, "unauthenticated") == 1
    assert registry.get_sample_value("tdb_gateway_requests_in_flight") == 0
