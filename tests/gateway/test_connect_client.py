"""The official Connect client in Node, against the gateway under uvicorn, over a real gRPC service.

`make test` installs the client and makes its code (`connect_client/`); nothing is fetched here.
"""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from tdb.inference.v1 import model_pb2

from gateway.app import create_app
from services.common import errors
from tests.common.backend import Backend, settings
from tests.gateway import echo
from tests.gateway.echo import CLIENT, EchoResponse, ItemsResponse
from tests.gateway.helpers import listening

SCENARIO_TIMEOUT_S = 60
VENV = str(Path(__file__).resolve().parents[2] / ".venv" / "bin")


class Service:
    """Answers by the text that is asked for, and notes when a slow call was cancelled."""

    def __init__(self) -> None:
        self.cancelled = asyncio.Event()

    async def echo(self, request: Any, context: Any) -> Any:
        await self._behave(request.text)
        return EchoResponse(text=request.text, size=len(request.text))

    async def items(self, request: Any, context: Any) -> AsyncIterator[Any]:
        for index in range(request.count):
            yield ItemsResponse(index=index, text=request.text)
        await self._behave(request.text)

    async def _behave(self, text: str) -> None:
        if text == "refused":
            raise errors.InvalidArgument("no such head", field="run.interventions[0].target")
        if text == "busy":
            raise errors.ResourceExhausted("the queue is full", retry_after_s=2)
        if text == "slow":
            try:
                await asyncio.sleep(30)
            except asyncio.CancelledError:
                self.cancelled.set()
                raise


async def node(address: str, scenario: str) -> Any:
    """What the client saw in one scenario of `client.mjs`."""
    if not (CLIENT / "gen").is_dir():
        pytest.fail("the Connect client is not installed: run `make .make/connect-client`")
    process = await asyncio.create_subprocess_exec(
        "node",
        str(CLIENT / "client.mjs"),
        address,
        scenario,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PATH": os.pathsep.join([VENV, os.environ["PATH"]])},
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(), SCENARIO_TIMEOUT_S)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, err.decode()
    return json.loads(out)


async def list_one_model(request: Any, context: Any) -> Any:
    return model_pb2.ListModelsResponse(models=["tiny"])


@pytest.fixture
def service() -> Service:
    return Service()


@pytest_asyncio.fixture
async def address(service: Service, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[str]:
    echo.expose(monkeypatch, echo.DESCRIPTOR)
    inference = Backend()
    inference.answer = list_one_model
    async with echo.echo_server(service.items, service.echo, inference) as server:
        app = create_app(settings(), {"inference": f"127.0.0.1:{server.port}"})
        async with listening(app) as found:
            yield found


async def test_a_unary_call(address: str) -> None:
    assert await node(address, "unary") == {"text": "a b é", "size": "5", "isBigInt": True}


@pytest.mark.parametrize("scenario", ["refused", "streamRefused"])
async def test_a_refusal_is_decoded_with_its_field(address: str, scenario: str) -> None:
    error = (await node(address, scenario))["error"]
    assert (error["code"], error["message"]) == ("InvalidArgument", "no such head")
    assert error["fields"] == ["run.interventions[0].target"]
    assert error["retryAfter"] is None


async def test_a_full_queue_says_when_to_come_back(address: str) -> None:
    error = (await node(address, "busy"))["error"]
    assert error["code"] == "ResourceExhausted"
    assert error["retrySeconds"] == [2]
    assert error["retryAfter"] == "2"


async def test_a_stream_that_fails_on_the_way(address: str) -> None:
    seen = await node(address, "streamError")
    assert seen["messages"] == [[0, "busy"], [1, "busy"]]
    assert seen["error"]["code"] == "ResourceExhausted"
    assert seen["error"]["retrySeconds"] == [2]
    assert seen["error"]["retryAfter"] == "2"


async def test_a_stream_and_its_end(address: str) -> None:
    seen = await node(address, "stream")
    assert seen == {"messages": [[index, "x"] for index in range(5)], "error": None}


@pytest.mark.parametrize("scenario", ["timeout", "streamTimeout"])
async def test_a_deadline(address: str, scenario: str, service: Service) -> None:
    seen = await node(address, scenario)
    assert seen["error"]["code"] == "DeadlineExceeded"
    await asyncio.wait_for(service.cancelled.wait(), 10)


async def test_cancelling_a_stream_reaches_the_service(address: str, service: Service) -> None:
    seen = await node(address, "cancel")
    assert seen["messages"] == [[0, "slow"]]
    assert seen["error"]["code"] == "Canceled"
    await asyncio.wait_for(service.cancelled.wait(), 10)


async def test_only_the_slow_calls_were_cancelled(address: str, service: Service) -> None:
    """The control of the two above."""
    await node(address, "stream")
    assert not service.cancelled.is_set()


async def test_the_inference_service_s_own_messages(address: str) -> None:
    assert await node(address, "models") == {"names": ["tiny"]}
