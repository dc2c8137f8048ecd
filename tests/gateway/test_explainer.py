"""The explainer service through the gateway: JSON, server-sent events, readiness."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.explainer import stack, synthetic
from tests.gateway.helpers import running_before, violations

SERVICE = "/tdb.explainer.v1.ExplainerService"
MODEL = {"id": "demo", "weightsHash": stack.WEIGHTS}
EXPLAIN = {
    "dataset": "small",
    "component": "neuron.1.7",
    "method": "METHOD_TOKEN_PATTERN",
    "scoring": {"scorers": ["SCORER_DETECTION"], "items": 10},
}


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with (
        stack.serving(tmp_path, [synthetic.component()]) as served,
        running_before("explainer", served.port) as client,
    ):
        yield client


async def events(client: httpx.AsyncClient, method: str, body: Any) -> list[Any]:
    """The data of server-sent events."""
    answer = await client.post(
        f"{SERVICE}/{method}", json=body, headers={"accept": "text/event-stream"}
    )
    assert answer.headers["content-type"].startswith("text/event-stream")
    return [json.loads(line[6:]) for line in answer.text.splitlines() if line[:6] == "data: "]


async def test_texts_are_written_and_listed_as_json(client: httpx.AsyncClient) -> None:
    answer = await client.post(f"{SERVICE}/GetCapabilities", json={})
    assert answer.json()["methods"] == ["METHOD_TOKEN_PATTERN"]
    written = {"model": MODEL, "component": "neuron.1.7", "text": 'fires on " Mary"'}
    answer = await client.post(f"{SERVICE}/WriteExplanation", json=written)
    stored = answer.json()["explanation"]
    assert (answer.status_code, stored["text"]) == (200, 'fires on " Mary"')
    asked = {"model": MODEL, "components": ["neuron.1.7"]}
    answer = await client.post(f"{SERVICE}/ListExplanations", json=asked)
    assert answer.json()["explanations"] == [stored]


async def test_an_explanation_that_is_made_comes_as_events(client: httpx.AsyncClient) -> None:
    told = await events(client, "Explain", EXPLAIN)
    kinds = [next(iter(event)) for event in told[:-1]]
    assert kinds[0] == "progress"
    assert kinds[-1] == "summary"
    (explanation,) = [event["explanation"] for event in told if "explanation" in event]
    assert explanation["provenance"]["method"] == "METHOD_TOKEN_PATTERN"
    assert {event["score"]["scorer"] for event in told if "score" in event} == {"SCORER_DETECTION"}
    assert told[-1] == {}


async def test_refusals_name_their_field(client: httpx.AsyncClient) -> None:
    answer = await client.post(f"{SERVICE}/GetExplanation", json={"id": "x", "key": "sk-1"})
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_argument")
    assert violations(answer) == ["key"]
    answer = await client.post(f"{SERVICE}/GetExplanation", json={"id": "x"})
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
    assert (await client.post(f"{SERVICE}/Spend", json={})).status_code == 404
    told = await events(client, "Explain", {**EXPLAIN, "method": "METHOD_CONTRASTIVE"})
    assert told[-1]["error"]["code"] == "failed_precondition"
    assert "TDB_PROVIDER_URL" in told[-1]["error"]["message"]


async def test_readiness_speaks_for_it(tmp_path: Path) -> None:
    async with (
        stack.serving(tmp_path) as served,
        running_before("explainer", served.port) as client,
    ):
        assert (await client.get("/readyz")).status_code == 200
    async with running_before("explainer", served.port) as client:
        answer = await client.get("/readyz")
        assert answer.status_code == 503
        assert list(answer.json()["awaited"]) == ["explainer"]
