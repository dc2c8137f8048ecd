"""Server streams over HTTP, in both framings, from a real gRPC service."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from grpc_health.v1 import health_pb2

from gateway import streams
from gateway.requests import MAX_BODY_BYTES
from gateway.transcoder import DEFAULT_STREAM_TIMEOUT_S, OFF_LOOP_BYTES
from services.common import calls, errors
from tests.gateway import echo
from tests.gateway.echo import ITEMS, Items, ItemsResponse
from tests.gateway.framings import CONNECT, EVENTS, FRAMINGS, body, envelope, gateway, read
from tests.gateway.helpers import running

SECRET = "a secret detail"


@pytest.fixture(autouse=True)
def exposed(monkeypatch: pytest.MonkeyPatch) -> None:
    health = health_pb2.DESCRIPTOR.services_by_name["Health"]
    echo.expose(monkeypatch, echo.DESCRIPTOR, health)


def raising(error: Exception, after: int = 0) -> Items:
    async def items(request: Any, context: Any) -> AsyncIterator[Any]:
        for index in range(after):
            yield ItemsResponse(index=index)
        raise error

    return items


async def ask(
    client: httpx.AsyncClient, headers: dict[str, str], tree: Any, path: str = ITEMS, **more: str
) -> httpx.Response:
    sent = {**headers, **{name.replace("_", "-"): value for name, value in more.items()}}
    return await client.post(path, content=body(headers, tree), headers=sent)


@FRAMINGS
async def test_messages_and_then_the_end(headers: dict[str, str]) -> None:
    async with gateway() as (_, client):
        tree = {"text": "é\n\u2028", "count": 3}
        response = await ask(client, headers, tree, x_request_id="click-1")
        none = await ask(client, headers, {})
    assert response.status_code == 200
    kind = "text/event-stream" if headers is EVENTS else "application/connect+json"
    assert response.headers["content-type"] == kind
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["x-request-id"] == "click-1"
    found, end = read(headers, response.content)
    assert [each["index"] for each in found] == [0, 1, 2]
    assert found[0]["text"] == tree["text"]
    assert end == {}
    assert read(headers, none.content) == ([], {})


async def test_the_bytes_of_both_framings() -> None:
    async with gateway() as (_, client):
        connect = await ask(client, CONNECT, {"count": 1})
        events = await ask(client, EVENTS, {"count": 1})
    data = b'{"index":0,"text":"","data":""}'
    assert connect.content == b"\x00\x00\x00\x00\x1f" + data + b"\x02\x00\x00\x00\x02{}"
    assert events.content == b"data: " + data + b"\n\nevent: end\ndata: {}\n\n"


@FRAMINGS
@pytest.mark.parametrize("after", [0, 2])
async def test_a_refusal_of_the_service_ends_the_stream(
    headers: dict[str, str], after: int
) -> None:
    refusal = errors.InvalidArgument("no such head", field="run.interventions[0].target")
    async with gateway(raising(refusal, after)) as (_, client):
        response = await ask(client, headers, {})
    assert response.status_code == 200
    found, end = read(headers, response.content)
    assert len(found) == after
    assert end["error"]["code"] == "invalid_argument"
    assert end["error"]["message"] == "no such head"
    bad = next(each for each in end["error"]["details"] if each["type"] == "google.rpc.BadRequest")
    assert bad["debug"]["fieldViolations"][0]["field"] == "run.interventions[0].target"
    assert "metadata" not in end


@FRAMINGS
async def test_when_to_come_back_is_in_the_metadata(headers: dict[str, str]) -> None:
    full = errors.ResourceExhausted("the queue is full", retry_after_s=1.2)
    async with gateway(raising(full, 1)) as (_, client):
        response = await ask(client, headers, {})
    _, end = read(headers, response.content)
    assert end["error"]["code"] == "resource_exhausted"
    assert end["metadata"] == {"retry-after": ["2"]}


@FRAMINGS
async def test_a_stream_that_the_service_cancels(headers: dict[str, str]) -> None:
    async with gateway(raising(errors.Cancelled("the job was cancelled"), 1)) as (_, client):
        response = await ask(client, headers, {})
    found, end = read(headers, response.content)
    assert len(found) == 1
    assert (end["error"]["code"], end["error"]["message"]) == ("canceled", "the job was cancelled")


@FRAMINGS
async def test_bugs_on_either_side_say_nothing_but_their_id(
    headers: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with gateway(raising(ValueError(SECRET), 1)) as (_, client):
        theirs = await ask(client, headers, {})

    def broken(*_: object) -> bytes:
        raise ValueError(SECRET)

    async with gateway() as (_, client):
        monkeypatch.setattr("gateway.messages.write", broken)
        ours = await ask(client, headers, {"count": 2})
    for response, sent in ((theirs, 1), (ours, 0)):
        found, end = read(headers, response.content)
        assert len(found) == sent
        assert end["error"]["code"] == "internal"
        assert "internal error" in end["error"]["message"]
        assert SECRET not in response.text


@FRAMINGS
async def test_a_service_that_is_away(headers: dict[str, str]) -> None:
    async with running("127.0.0.1:1") as (_, client):
        response = await ask(client, headers, {})
    _, end = read(headers, response.content)
    assert end["error"]["code"] == "unavailable"
    assert "127.0.0.1" not in response.text


@FRAMINGS
async def test_what_never_reaches_the_service_is_said_in_the_stream(
    headers: dict[str, str],
) -> None:
    async with gateway() as (_, client):
        unknown = await ask(client, headers, {"bogus": 1})
        deadline = await ask(client, headers, {}, connect_timeout_ms="soon")
        large = await ask(client, headers, {"text": "x" * MAX_BODY_BYTES})
        good = await ask(client, headers, {"count": 1}, connect_timeout_ms="5000")
    for response, says in (
        (unknown, "has no field 'bogus'"),
        (deadline, "connect-timeout-ms"),
        (large, str(MAX_BODY_BYTES)),
    ):
        found, end = read(headers, response.content)
        assert found == []
        assert end["error"]["code"] == "invalid_argument"
        assert says in end["error"]["message"]
    assert read(headers, good.content)[1] == {}


@pytest.mark.parametrize(
    ("sent", "says"),
    [
        (b"", "must be one envelope"),
        (b"\0\0\0", "must be one envelope"),
        (envelope(b"{}", flags=1), "compressed"),
        (envelope(b"{}", flags=2), "flags 2"),
        (envelope(b"{}")[:-1], "says 2 bytes and 1 follow"),
        (envelope(b"{}") + envelope(b"{}"), "exactly one envelope"),
        (b"\0\xff\xff\xff\xff{}", "says 4294967295 bytes"),
        (envelope(b"{"), "the body is not JSON"),
    ],
)
async def test_an_envelope_that_is_none(sent: bytes, says: str) -> None:
    async with gateway() as (_, client):
        response = await client.post(ITEMS, content=sent, headers=CONNECT)
    _, end = read(CONNECT, response.content)
    assert end["error"]["code"] == "invalid_argument"
    assert says in end["error"]["message"]


@pytest.mark.parametrize(
    ("path", "kind", "accept", "status"),
    [
        (ITEMS, "application/json", "text/html, Text/Event-Stream;q=1", 200),
        (ITEMS, "application/json", "*/*", 415),
        (ITEMS, "application/json", "text/event-streams", 415),
        (ITEMS, "application/connect+proto", "*/*", 415),
        (ITEMS, "text/plain", "text/event-stream", 415),
        (echo.ECHO, "application/json", "text/event-stream", 200),
        (echo.ECHO, "application/connect+json", "*/*", 415),
    ],
)
async def test_which_requests_are_taken(path: str, kind: str, accept: str, status: int) -> None:
    async with gateway() as (_, client):
        headers = {"content-type": kind, "accept": accept}
        response = await client.post(path, content=b"{}", headers=headers)
    assert response.status_code == status
    if status == 415:
        assert response.json()["code"] == "invalid_argument"
        assert "application/json" in response.json()["message"]


@FRAMINGS
async def test_compressed_requests_are_refused(headers: dict[str, str]) -> None:
    name = "connect-content-encoding" if headers is CONNECT else "content-encoding"
    async with gateway() as (_, client):
        response = await client.post(ITEMS, content=b"x", headers={**headers, name: "gzip"})
    assert read(headers, response.content)[1]["error"]["code"] == "unimplemented"


@FRAMINGS
async def test_deadlines_and_the_request_id_are_passed_on(headers: dict[str, str]) -> None:
    remaining: list[float] = []
    ids: list[str] = []

    async def items(request: Any, context: Any) -> AsyncIterator[Any]:
        remaining.append(context.time_remaining())
        call = calls.current()
        assert call is not None
        ids.append(call.request_id)
        yield ItemsResponse()
        if request.text == "slow":
            await asyncio.sleep(30)

    async with gateway(items) as (_, client):
        await ask(client, headers, {}, x_request_id="click-3")
        await ask(client, headers, {}, connect_timeout_ms="5000")
        late = await ask(client, headers, {"text": "slow"}, connect_timeout_ms="1000")
    assert ids[0] == "click-3"
    assert DEFAULT_STREAM_TIMEOUT_S - 60 < remaining[0] <= DEFAULT_STREAM_TIMEOUT_S + 60
    assert 2 < remaining[1] <= 6
    found, end = read(headers, late.content)
    assert len(found) == 1
    assert end["error"]["code"] == "deadline_exceeded"
    assert end["error"]["message"] == "no answer within the deadline of 1 s"


@FRAMINGS
async def test_silence_has_heartbeats_where_the_framing_has_them(
    headers: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def items(request: Any, context: Any) -> AsyncIterator[Any]:
        yield ItemsResponse()
        await asyncio.sleep(0.5)
        yield ItemsResponse()

    assert streams.HEARTBEAT_S == 15
    monkeypatch.setattr(streams, "HEARTBEAT_S", 0.1)
    async with gateway(items) as (_, client):
        response = await ask(client, headers, {})
    assert (b"\n\n: keep-alive\n\n" in response.content) == (headers is EVENTS)
    found, end = read(headers, response.content)
    assert (len(found), end) == (2, {})


@FRAMINGS
async def test_large_messages_leave_the_event_loop_free(
    headers: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[str] = []
    to_thread = asyncio.to_thread

    async def noting(work: Any, *arguments: Any) -> Any:
        moved.append(work.__name__)
        return await to_thread(work, *arguments)

    async def items(request: Any, context: Any) -> AsyncIterator[Any]:
        for size in (1, OFF_LOOP_BYTES, 1):
            yield ItemsResponse(data=b"x" * size)

    monkeypatch.setattr("gateway.transcoder.asyncio.to_thread", noting)
    async with gateway(items) as (_, client):
        response = await ask(client, headers, {})
        assert moved == ["write"]
        await ask(client, headers, {"text": "x" * OFF_LOOP_BYTES})
    assert moved == ["write", "parse", "_parse", "write"]  # "_parse": in the service
    found, _ = read(headers, response.content)
    assert len(found[1]["data"]) > OFF_LOOP_BYTES
    assert len(found) == 3


@FRAMINGS
async def test_health_watch_of_a_real_service(headers: dict[str, str]) -> None:
    async with gateway() as (_, client):
        response = await ask(
            client, headers, {}, "/grpc.health.v1.Health/Watch", connect_timeout_ms="4000"
        )
    found, end = read(headers, response.content)
    assert found == [{"status": "SERVING"}]
    assert end["error"]["code"] == "deadline_exceeded"
