"""Users named by a proxy, from its header through the gateway into the service's call."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest

from gateway.app import create_app
from tests.common.backend import SERVICE, serving, settings
from tests.common.test_identity import Recorder
from tests.gateway.helpers import NOWHERE, listening

CALL = f"/{SERVICE}/ListModels"
PROXIED = {"TDB_TRUSTED_PROXIES": "10.0.0.5"}
USER = {"x-forwarded-user": "eve"}


@asynccontextmanager
async def reached_from(
    peer: str, backend: Recorder, **variables: str
) -> AsyncIterator[httpx.AsyncClient]:
    """A client whose connections come from the address `peer`."""
    async with serving(backend, **variables) as server:
        addresses = {"inference": f"127.0.0.1:{server.port}"}
        app = create_app(settings(**variables), addresses, NOWHERE)
        transport = httpx.ASGITransport(app=app, client=(peer, 4711))
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://localhost:8080") as client,
        ):
            yield client


async def test_a_trusted_proxy_names_the_user_over_real_http() -> None:
    backend = Recorder()
    variables = {"TDB_TRUSTED_PROXIES": "127.0.0.1"}
    async with serving(backend, **variables) as server:
        app = create_app(settings(**variables), {"inference": f"127.0.0.1:{server.port}"}, NOWHERE)
        async with (
            listening(app) as url,
            httpx.AsyncClient(base_url=url, trust_env=False) as client,
        ):
            assert (await client.post(CALL, json={}, headers=USER)).status_code == 200
            stranger = await client.post(CALL, json={})
    assert stranger.status_code == 403
    assert "x-forwarded-user" in stranger.json()["message"]
    assert backend.users == ["eve"]


@pytest.mark.parametrize("peer", ["127.0.0.1", "10.0.0.6", "::1"])
async def test_the_header_is_refused_from_anybody_else(peer: str) -> None:
    backend = Recorder()
    headers = {**USER, "x-forwarded-for": "10.0.0.5", "x-real-ip": "10.0.0.5"}
    async with reached_from(peer, backend, **PROXIED) as client:
        answer = await client.post(CALL, json={}, headers=headers)
        assert (await client.get("/healthz", headers=headers)).status_code == 200
    assert answer.status_code == 403
    assert "TDB_TRUSTED_PROXIES" in answer.json()["message"]
    assert backend.users == []


async def test_where_no_proxy_is_trusted_its_header_is_not_quietly_ignored() -> None:
    backend = Recorder()
    async with reached_from("127.0.0.1", backend) as client:
        assert (await client.post(CALL, json={}, headers=USER)).status_code == 403
        assert (await client.post(CALL, json={})).status_code == 200
    assert backend.users == ["local"]


async def test_the_proxy_and_tokens_together() -> None:
    backend = Recorder()
    variables = {**PROXIED, "TDB_TOKENS": "ann:t0ken"}
    token = {"authorization": "Bearer t0ken"}
    async with reached_from("10.0.0.5", backend, **variables) as client:
        for headers, status in (
            (USER, 200),
            ({**USER, "authorization": "Basic of-the-proxy"}, 200),
            ({**USER, **token}, 403),
            (token, 200),
            ({}, 401),
        ):
            assert (await client.post(CALL, json={}, headers=headers)).status_code == status
    async with reached_from("127.0.0.1", backend, **variables) as client:
        assert (await client.post(CALL, json={}, headers=token)).status_code == 200
        assert (await client.post(CALL, json={}, headers={**USER, **token})).status_code == 403
    assert backend.users == ["eve", "eve", "ann", "ann"]


@pytest.mark.parametrize("values", [["eve", "ann"], ["eve,ann"], [""], ["é"]])
async def test_a_header_that_names_no_single_user_is_refused(values: list[str]) -> None:
    backend = Recorder()
    async with reached_from("10.0.0.5", backend, **PROXIED) as client:
        headers = [("x-forwarded-user", value.encode()) for value in values]
        answer = await client.post(
            CALL, json={}, headers=[(name.encode(), value) for name, value in headers]
        )
    assert answer.status_code == 403
    assert backend.users == []


async def test_what_the_gateway_tells_services_cannot_be_told_to_it() -> None:
    backend = Recorder()
    for peer in ("10.0.0.5", "127.0.0.1"):
        async with reached_from(peer, backend, **PROXIED) as client:
            headers = {**USER, "x-tdb-user": "ann"}
            assert (await client.post(CALL, json={}, headers=headers)).status_code == 403
    assert backend.users == []


async def test_the_header_s_name_is_a_setting() -> None:
    backend = Recorder()
    variables = {**PROXIED, "TDB_USER_HEADER": "Remote-User"}
    async with reached_from("10.0.0.5", backend, **variables) as client:
        answer = await client.post(CALL, json={}, headers={"remote-user": "eve"})
        assert answer.status_code == 200
        assert (await client.post(CALL, json={}, headers=USER)).status_code == 403
    assert backend.users == ["eve"]


@pytest.mark.parametrize(
    ("peer", "host", "forwarded", "origin", "answered"),
    [
        # A proxy that hands the browser's Host on, with and without the scheme's own port.
        ("10.0.0.5", "tdb.example", None, "https://tdb.example", True),
        ("10.0.0.5", "tdb.example:443", None, "https://tdb.example", True),
        ("10.0.0.5", "tdb.example", None, "https://evil.example", False),
        ("10.0.0.5", "tdb.example", None, "https://tdb.example:8443", False),
        # One that talks to us under our own name and says what it was asked for.
        ("10.0.0.5", "127.0.0.1:8080", "tdb.example", "https://tdb.example", True),
        ("10.0.0.5", "127.0.0.1:8080", "tdb.example", "https://evil.example", False),
        ("10.0.0.5", "127.0.0.1:8080", "evil.example", "https://evil.example", False),
        ("10.0.0.5", "127.0.0.1:8080", None, "https://tdb.example", False),
        # Nobody else's word counts.
        ("127.0.0.1", "127.0.0.1:8080", "tdb.example", "https://tdb.example", False),
    ],
)
async def test_host_and_origin_behind_a_proxy(
    peer: str, host: str, forwarded: str | None, origin: str, answered: bool
) -> None:
    backend = Recorder()
    variables = {
        **PROXIED,
        "TDB_TOKENS": "ann:t0ken",
        "TDB_ALLOWED_HOSTS": "tdb.example",
    }
    headers = {"host": host, "origin": origin, "authorization": "Bearer t0ken"}
    if forwarded is not None:
        headers["x-forwarded-host"] = forwarded
    async with reached_from(peer, backend, **variables) as client:
        answer = await client.post(CALL, json={}, headers=headers)
    assert answer.status_code == (200 if answered else 403)
    assert len(backend.users) == int(answered)
