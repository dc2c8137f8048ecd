"""The gateway below `/tdb/` of a proxy that knows its users, over real HTTP all the way."""

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway.app import create_app
from tests.common.backend import SERVICE, serving, settings
from tests.common.test_identity import Recorder
from tests.gateway.framings import EVENTS
from tests.gateway.helpers import listening

ROOT = Path(__file__).parents[2]
PREFIX = "/tdb"
NAME = "tdb.example"
INDEX = '<script src="./assets/index-abc.js"></script>'


def proxy(upstream: str, *, keeps_host: bool) -> Starlette:
    """Does what `location /tdb/ { proxy_pass http://upstream/; }` and a login do."""

    async def forward(request: Request) -> Response:
        headers = dict(request.headers)
        headers["x-forwarded-user"] = "eve"  # overwritten, whatever came
        headers["x-forwarded-for"] = "203.0.113.7"
        if not keeps_host:
            headers["x-forwarded-host"] = headers["host"]
            del headers["host"]
        path = request.url.path.removeprefix(PREFIX)
        async with httpx.AsyncClient(base_url=upstream, trust_env=False) as client:
            answer = await client.request(
                request.method, path, headers=headers, content=await request.body()
            )
        return Response(answer.content, answer.status_code, {"x-path": path, **_kept(answer)})

    return Starlette(routes=[Route(f"{PREFIX}/{{path:path}}", forward, methods=["GET", "POST"])])


def _kept(answer: httpx.Response) -> dict[str, str]:
    return {name: answer.headers[name] for name in ("content-type",) if name in answer.headers}


@pytest.fixture
def page(tmp_path: Path) -> Path:
    (tmp_path / "assets").mkdir()
    (tmp_path / "index.html").write_text(INDEX)
    (tmp_path / "assets" / "index-abc.js").write_text("// the page")
    return tmp_path


@asynccontextmanager
async def behind(
    page: Path, backend: Recorder, *, keeps_host: bool, **variables: str
) -> AsyncIterator[httpx.AsyncClient]:
    """A browser at `https://tdb.example/tdb/`, as far as what it sends shows."""
    async with serving(backend, **variables) as server:
        addresses = {"inference": f"127.0.0.1:{server.port}"}
        app = create_app(settings(**variables), addresses, page)
        async with (
            listening(app) as upstream,
            listening(proxy(upstream, keeps_host=keeps_host)) as outside,
            httpx.AsyncClient(base_url=outside, trust_env=False, headers={"host": NAME}) as browser,
        ):
            yield browser


@pytest.mark.parametrize("keeps_host", [True, False])
async def test_page_calls_and_streams_work_below_the_prefix(page: Path, keeps_host: bool) -> None:
    backend = Recorder()
    variables = {"TDB_TRUSTED_PROXIES": "127.0.0.1", "TDB_ALLOWED_HOSTS": NAME}
    origin = {"origin": f"https://{NAME}"}
    async with behind(page, backend, keeps_host=keeps_host, **variables) as browser:
        index = await browser.get(f"{PREFIX}/")
        assert index.text == INDEX
        script = await browser.get(f"{PREFIX}/assets/index-abc.js")
        assert script.text == "// the page"
        assert (await browser.get(f"{PREFIX}/readyz")).status_code == 200
        place = f"{PREFIX}/{SERVICE}/ListModels"
        assert (await browser.post(place, json={}, headers=origin)).status_code == 200
        forged = {**origin, "x-forwarded-user": "ann", "x-forwarded-for": "127.0.0.1"}
        assert (await browser.post(place, json={}, headers=forged)).status_code == 200
        stream = await browser.post(
            f"{PREFIX}/{SERVICE}/Generate", content=b"{}", headers={**origin, **EVENTS}
        )
        assert "event: end" in stream.text
        elsewhere = {"origin": "https://evil.example"}
        refused = await browser.post(place, json={}, headers=elsewhere)
        assert refused.json()["code"] == "permission_denied"
        stranger = await browser.get(f"{PREFIX}/", headers={"host": "evil.example"})
        assert stranger.status_code == 403
    assert backend.users == ["eve", "eve", "eve"]


async def test_a_proxy_that_nobody_named_is_told_what_to_set(page: Path) -> None:
    backend = Recorder()
    async with behind(page, backend, keeps_host=True, TDB_ALLOWED_HOSTS=NAME) as browser:
        answer = await browser.post(f"{PREFIX}/{SERVICE}/ListModels", json={})
    assert answer.status_code == 403
    assert "TDB_TRUSTED_PROXIES" in answer.json()["message"]
    assert backend.users == []


def test_the_process_takes_the_peer_from_the_connection_alone(tmp_path: Path) -> None:
    """uvicorn by itself would believe `x-forwarded-for` of whoever connects from loopback."""
    env = {
        "PATH": os.environ["PATH"],
        "TDB_DATA_DIR": str(tmp_path),
        "TDB_GATEWAY_PORT": "0",
        "TDB_TRUSTED_PROXIES": "10.0.0.5",
    }
    command = [sys.executable, "-m", "gateway"]
    with subprocess.Popen(command, env=env, cwd=ROOT, text=True, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        port = json.loads(process.stdout.readline())["port"]
        headers = {"x-forwarded-for": "10.0.0.5", "x-forwarded-user": "eve"}
        url = f"http://127.0.0.1:{port}/{SERVICE}/ListModels"
        with httpx.Client(trust_env=False) as client:
            answer = client.post(url, json={}, headers=headers)
        process.terminate()
        process.communicate(timeout=20)
    assert answer.status_code == 403
    assert "127.0.0.1 is none of them" in answer.json()["message"]
