"""Who is answered, and with which headers."""

import pytest

from tests.common.backend import SERVICE, Backend
from tests.gateway.helpers import gateway_to

CALL = f"/{SERVICE}/ListModels"


@pytest.mark.parametrize(
    ("host", "answered"),
    [
        ("localhost:8080", True),
        ("LOCALHOST", True),
        ("127.0.0.1:1234", True),
        ("[::1]:8080", True),
        ("gpu-box:8080", True),
        ("evil.example", False),
        ("localhost.evil.example", False),
        ("evil.example:8080", False),
        ("localhost@evil.example", False),
        ("[", False),
        ("", False),
    ],
)
async def test_only_known_hosts_are_answered(host: str, answered: bool) -> None:
    backend = Backend()
    async with gateway_to(backend, TDB_ALLOWED_HOSTS="Gpu-Box") as gateway:
        post = await gateway.client.post(CALL, json={}, headers={"host": host})
        page = await gateway.client.get("/", headers={"host": host})
        health = await gateway.client.get("/healthz", headers={"host": host})
    assert health.status_code == 200
    assert (post.status_code == 200) == answered
    assert (page.status_code == 403) == (not answered)
    assert len(backend.requests) == int(answered)
    if not answered:
        assert post.json()["code"] == "permission_denied"
        assert "TDB_ALLOWED_HOSTS" in post.json()["message"]


@pytest.mark.parametrize(
    ("origin", "answered"),
    [
        (None, True),
        ("http://localhost:8080", True),
        ("https://localhost:8080", True),
        ("http://localhost:9090", False),
        ("http://evil.example", False),
        ("null", False),
        ("", False),
    ],
)
async def test_pages_elsewhere_cannot_call(origin: str | None, answered: bool) -> None:
    backend = Backend()
    headers = {} if origin is None else {"origin": origin}
    async with gateway_to(backend) as gateway:
        response = await gateway.client.post(CALL, json={}, headers=headers)
    assert response.status_code == (200 if answered else 403)
    assert len(backend.requests) == int(answered)


async def test_calls_need_a_token_where_tokens_are_set() -> None:
    backend = Backend()
    async with gateway_to(backend, TDB_TOKENS="ann:t0ken") as gateway:
        for header in (None, "Bearer wrong", "t0ken"):
            headers = {} if header is None else {"authorization": header}
            response = await gateway.client.post(CALL, json={}, headers=headers)
            assert response.status_code == 401
            assert response.json()["code"] == "unauthenticated"
            assert response.headers["www-authenticate"] == "Bearer"
        assert backend.requests == []
        for path, status in (("/healthz", 200), ("/readyz", 200), ("/", 503)):
            assert (await gateway.client.get(path)).status_code == status
        right = {"authorization": "Bearer t0ken"}
        assert (await gateway.client.post(CALL, json={}, headers=right)).status_code == 200


async def test_what_the_service_could_not_be_told_is_refused_here() -> None:
    backend = Backend()
    async with gateway_to(backend) as gateway:
        for length, status in ((4096, 200), (4097, 400), (60_000, 400)):
            headers = {"authorization": "x" * length}
            assert (await gateway.client.post(CALL, json={}, headers=headers)).status_code == status
    assert len(backend.requests) == 1


async def test_every_answer_carries_the_headers() -> None:
    async with gateway_to(Backend()) as gateway:
        answers = [
            await gateway.client.get("/"),
            await gateway.client.get("/healthz"),
            await gateway.client.get("/assets/none.js"),
            await gateway.client.post(CALL, json={}),
            await gateway.client.post(CALL, json={"bogus": 1}),
            await gateway.client.post(CALL, json={}, headers={"host": "evil.example"}),
        ]
    assert [answer.status_code for answer in answers] == [503, 200, 404, 200, 400, 403]
    for answer in answers:
        policy = answer.headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "frame-ancestors 'none'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert len(answer.headers["x-request-id"]) == 32


async def test_there_is_no_cross_origin_sharing() -> None:
    async with gateway_to(Backend()) as gateway:
        headers = {"origin": "http://localhost:8080", "access-control-request-method": "POST"}
        answer = await gateway.client.options(CALL, headers=headers)
    assert answer.status_code == 405
    assert not any(name.startswith("access-control") for name in answer.headers)
