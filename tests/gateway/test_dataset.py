"""The dataset service through the gateway: JSON, server-sent events, readiness."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.dataset import helpers
from tests.gateway.helpers import running_before, violations

SERVICE = "/tdb.dataset.v1.DatasetService"
RECORDS = helpers.random_records(2, helpers.COMPONENTS[:12])


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    helpers.write(tmp_path / "small", RECORDS)
    async with (
        helpers.serving(tmp_path) as server,
        running_before("dataset", server.port) as client,
    ):
        yield client


async def test_a_record_and_a_search_are_json(client: httpx.AsyncClient) -> None:
    answer = await client.post(
        f"{SERVICE}/GetRecord", json={"dataset": "small", "component": "neuron.0.3"}
    )
    assert answer.status_code == 200
    record: Any = answer.json()["record"]
    assert record["component"] == "neuron.0.3"
    assert record["top"][0]["activations"] == pytest.approx(list(RECORDS[3].top[0].activations))
    assert record["top"][0]["tokenTexts"] == [
        helpers.VOCABULARY[token] for token in RECORDS[3].top[0].token_ids
    ]
    answer = await client.post(
        f"{SERVICE}/Search",
        json={"dataset": "small", "orderBy": "STATISTIC_MAX", "limit": 2},
    )
    highest = max(RECORDS, key=lambda record: record.statistics.max)
    assert answer.json()["components"][0]["component"] == highest.component
    answer = await client.post(f"{SERVICE}/DeleteDataset", json={"dataset": "small"})
    assert int(answer.json()["bytes"]) > 0


async def test_a_stream_is_server_sent_events(client: httpx.AsyncClient) -> None:
    answer = await client.post(
        f"{SERVICE}/StreamRecords",
        json={"dataset": "small"},
        headers={"accept": "text/event-stream"},
    )
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line[:6] == "data: "]
    names = [each["component"] for event in events[:-2] for each in event["batch"]["records"]]
    assert names == [record.component for record in RECORDS]
    assert events[-2]["summary"]["records"] == len(RECORDS)
    assert events[-1] == {}


async def test_refusals_name_their_field(client: httpx.AsyncClient) -> None:
    answer = await client.post(
        f"{SERVICE}/GetRecord", json={"dataset": "small", "component": "neuron.0"}
    )
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_argument")
    assert violations(answer) == ["component"]
    answer = await client.post(f"{SERVICE}/GetRecord", json={"dataset": "other"})
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


async def test_readiness_speaks_for_it(tmp_path: Path) -> None:
    async with (
        helpers.serving(tmp_path) as server,
        running_before("dataset", server.port) as client,
    ):
        assert (await client.get("/readyz")).status_code == 200
        await server.set_not_serving()
        answer = await client.get("/readyz")
        assert answer.status_code == 503
        assert list(answer.json()["awaited"]) == ["dataset"]
