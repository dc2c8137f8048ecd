"""The explainer service through the gateway: JSON, refusals in a stream, readiness."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from gateway.app import create_app
from services.common.server import ServiceServer
from tests.common.backend import settings
from tests.explainer import served
from tests.gateway.helpers import NOWHERE, violations

SERVICE = "/tdb.explainer.v1.ExplainerService"


@asynccontextmanager
async def gateway_to(server: ServiceServer) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(settings(), {"explainer": f"127.0.0.1:{server.port}"}, NOWHERE)
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://localhost:8080") as client,
    ):
        yield client


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with served.explainer(tmp_path) as server, gateway_to(server) as client:
        yield client


async def test_capabilities_are_json(client: httpx.AsyncClient) -> None:
    answer = await client.post(f"{SERVICE}/GetCapabilities", json={})
    assert answer.status_code == 200
    assert answer.json()["methods"] == ["METHOD_TOKEN_PATTERN"]
    assert answer.json()["provider"] == ""


async def test_unknown_fields_and_methods_are_refused(client: httpx.AsyncClient) -> None:
    answer = await client.post(f"{SERVICE}/GetExplanation", json={"id": "x", "key": "sk-1"})
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_argument")
    assert violations(answer) == ["key"]
    assert (await client.post(f"{SERVICE}/Spend", json={})).status_code == 404


async def test_readiness_speaks_for_it(tmp_path: Path) -> None:
    async with served.explainer(tmp_path) as server, gateway_to(server) as client:
        assert (await client.get("/readyz")).status_code == 200
        await server.set_not_serving()
        answer = await client.get("/readyz")
        assert answer.status_code == 503
        assert list(answer.json()["awaited"]) == ["explainer"]


async def test_a_refused_stream_is_an_event(client: httpx.AsyncClient) -> None:
    answer = await client.post(
        f"{SERVICE}/Explain", json={}, headers={"accept": "text/event-stream"}
    )
    data = [json.loads(line[6:]) for line in answer.text.splitlines() if line[:6] == "data: "]
    assert data[-1]["error"]["code"] == "unimplemented"
