"""What the gateway logs, and what leaves it when its own code fails."""

import json
import logging
from typing import Any

import pytest

from services.common.logs import JsonLines
from tests.common.backend import SERVICE, Backend
from tests.gateway.helpers import gateway_to

SECRET = "a secret prompt"


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    formatter = JsonLines(log_prompts=False)
    records = [record for record in caplog.records if record.name == "tdb.gateway"]
    return [json.loads(formatter.format(record)) for record in records]


async def test_one_line_per_request_without_its_text(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "tdb"):
        async with gateway_to(Backend()) as gateway:
            await gateway.call("Run", {"run": {"prompt": {"text": SECRET}}})
            await gateway.call("Run", {"run": {"prompt": {"txt": SECRET}}})
            await gateway.client.get("/place", params={"prompt": SECRET})
            await gateway.client.get("/healthz")
            await gateway.client.get("/readyz")
    logged = lines(caplog)
    assert [(line["path"], line["status"]) for line in logged] == [
        (f"/{SERVICE}/Run", 200),
        (f"/{SERVICE}/Run", 400),
        ("/place", 503),
    ]
    assert SECRET not in str(logged)
    assert len({line["request_id"] for line in logged}) == 3


@pytest.mark.parametrize("where", ["gateway.messages.write", "gateway.security._host_name"])
async def test_a_bug_of_the_gateway_is_internal_and_says_nothing(
    where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise ValueError(SECRET)

    async with gateway_to(Backend()) as gateway:
        monkeypatch.setattr(where, broken)
        response = await gateway.call("ListModels")
    assert response.status_code == 500
    assert response.json()["code"] == "internal"
    assert SECRET not in response.text
    error = next(line for line in lines(caplog) if line["level"] == "error")
    assert error["error_id"] in response.json()["message"]
    assert error["exception"]["type"] == "ValueError"
    assert SECRET not in str(error)
