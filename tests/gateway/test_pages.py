"""The page and the two health paths."""

from pathlib import Path

import pytest

from gateway.pages import NOT_BUILT
from tests.common.backend import Backend, serving
from tests.gateway.helpers import running


@pytest.fixture
def page(tmp_path: Path) -> Path:
    (tmp_path / "assets").mkdir()
    (tmp_path / "index.html").write_text("<title>the page</title>")
    (tmp_path / "icon.svg").write_text("<svg/>")
    (tmp_path / "assets" / "index-abc.js").write_text("1")
    return tmp_path


async def test_files_are_cached_by_what_they_are(page: Path) -> None:
    async with running("127.0.0.1:1", page) as (_, client):
        for path, kind, cache in (
            ("/", "text/html", "no-cache"),
            ("/index.html", "text/html", "no-cache"),
            ("/icon.svg", "image/svg+xml", "no-cache"),
            ("/assets/index-abc.js", "text/javascript", "immutable"),
        ):
            answer = await client.get(path)
            assert answer.status_code == 200
            assert answer.headers["content-type"].startswith(kind)
            assert cache in answer.headers["cache-control"]
        etag = (await client.get("/")).headers["etag"]
        assert (await client.get("/", headers={"if-none-match": etag})).status_code == 304


async def test_other_paths_are_places_in_the_page(page: Path) -> None:
    async with running("127.0.0.1:1", page) as (_, client):
        for path in ("/component/head.2.3", "/model/gpt2", "/anything"):
            answer = await client.get(path)
            assert (answer.status_code, answer.text) == (200, "<title>the page</title>")
        assert (await client.get("/assets/gone.js")).status_code == 404
        assert (await client.post("/anything")).status_code == 405
        assert "root:" not in (await client.get("/..%2f..%2f..%2fetc/passwd")).text


async def test_a_page_that_was_not_built_says_what_to_do() -> None:
    async with running("127.0.0.1:1") as (_, client):
        for path in ("/", "/index.html", "/some/place"):
            answer = await client.get(path)
            assert (answer.status_code, answer.text) == (503, NOT_BUILT)
        assert "make setup" in NOT_BUILT


async def test_health_of_the_gateway_and_readiness_of_all() -> None:
    async with serving(Backend()) as server, running(f"127.0.0.1:{server.port}") as (_, client):
        assert (await client.get("/readyz")).json() == {"status": "ready", "awaited": {}}
        await server.set_not_serving()
        answer = await client.get("/readyz")
        assert answer.status_code == 503
        assert "loading" in answer.json()["awaited"]["inference"]
        assert (await client.get("/healthz")).status_code == 200
        await server.set_serving()
        assert (await client.get("/readyz")).status_code == 200
        await server.drain()
        answer = await client.get("/readyz")
        assert answer.json()["awaited"] == {"inference": "it cannot be reached"}
