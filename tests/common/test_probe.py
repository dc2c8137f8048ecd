"""The health check of images and units, as the command that they run."""

import asyncio
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from services.common import probe
from services.common.server import ServiceServer
from tests.common.backend import Backend, serving, settings
from tests.gateway.helpers import listening

ROOT = Path(__file__).parents[2]


def loading() -> ServiceServer:
    return ServiceServer(
        "inference", settings(), port=0, add_servicers=lambda server: None, service_names=[]
    )


async def run(*arguments: str) -> tuple[int, str]:
    """The exit code and what it said, without holding up the server it asks."""
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "services.common.probe", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.stdout == ""
    return done.returncode, done.stderr


async def test_a_service_that_serves_loads_and_is_not_there() -> None:
    async with serving(Backend(), TDB_TOKENS="ann:t0ken") as server:
        target = f"127.0.0.1:{server.port}"
        assert await run(target) == (0, "")
    code, text = await run(target)
    assert code == 1
    assert text.startswith(f"{target} cannot be asked: UNAVAILABLE")
    async with loading() as server:
        target = f"127.0.0.1:{server.port}"
        assert await run(target) == (
            1,
            f"{target} is NOT_SERVING: it is loading its model, or stopping\n",
        )


async def test_a_page_that_answers_and_one_that_does_not() -> None:
    statuses = {"/healthz": 200, "/readyz": 503}

    async def app(scope: dict[str, object], receive: object, send: object) -> None:
        assert callable(send)
        status = statuses[str(scope["path"])]
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b"waiting for inference"})

    async with listening(app) as url:
        assert await run(f"{url}/healthz") == (0, "")
        assert await run(f"{url}/readyz") == (
            1,
            f"{url}/readyz answered 503: waiting for inference\n",
        )
    code, text = await run(f"{url}/healthz")
    assert (code, text.startswith(f"{url}/healthz cannot be asked")) == (1, True)


@pytest.mark.parametrize("arguments", [[], ["a:1", "b:2"]])
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert probe.main(arguments) == 2
    assert "usage" in capsys.readouterr().err


def test_what_accepts_and_says_nothing_is_given_up() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = silent.getsockname()[1]
        assert probe.http_problem(f"http://127.0.0.1:{port}/", 0.2).startswith("does not answer")
        assert probe.grpc_problem(f"127.0.0.1:{port}", timeout_s=0.2).startswith("does not answer")
