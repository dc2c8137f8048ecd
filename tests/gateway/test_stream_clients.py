"""Clients of a stream that leave, or that read slowly."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette

from gateway.app import create_app
from services.common import errors
from tests.common.backend import settings
from tests.gateway import echo
from tests.gateway.echo import ITEMS, ItemsResponse
from tests.gateway.framings import FRAMINGS, body, gateway, read
from tests.gateway.helpers import listening


@pytest.fixture(autouse=True)
def exposed(monkeypatch: pytest.MonkeyPatch) -> None:
    echo.expose(monkeypatch, echo.DESCRIPTOR)


async def drive(app: Starlette, headers: dict[str, str], receive: Any, send: Any) -> None:
    """One call straight into the ASGI app, by a client that the test plays."""
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {
        "type": "http",
        "method": "POST",
        "path": ITEMS,
        "raw_path": ITEMS.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", b"localhost"), *raw],
    }
    await asyncio.wait_for(app(scope, receive, send), 20)


@FRAMINGS
async def test_a_client_that_leaves_cancels_the_call(headers: dict[str, str]) -> None:
    got_one, cancelled = asyncio.Event(), asyncio.Event()

    async def items(request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            yield ItemsResponse()
            await asyncio.sleep(30)
        finally:  # cancelled while it sleeps, or closed at its yield
            cancelled.set()

    requested: list[bool] = []
    sent: list[Any] = []

    async def receive() -> Any:
        if not requested:
            requested.append(True)
            return {"type": "http.request", "body": body(headers, {}), "more_body": False}
        await got_one.wait()
        assert not cancelled.is_set()  # the control: as long as the client is there, it goes on
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)
        if message["type"] == "http.response.body":
            got_one.set()

    async with gateway(items) as (app, _):
        await drive(app, headers, receive, send)
        await asyncio.wait_for(cancelled.wait(), 5)
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]


@FRAMINGS
async def test_a_client_that_reads_slowly_holds_the_service_back(headers: dict[str, str]) -> None:
    total, size = 48, 1024 * 1024
    made = 0

    async def items(request: Any, context: Any) -> AsyncIterator[Any]:
        nonlocal made
        for index in range(total):
            made += 1
            yield ItemsResponse(index=index, data=b"x" * size)
        raise errors.ResourceExhausted("enough", retry_after_s=1)

    began, taking = asyncio.Event(), asyncio.Event()
    requested: list[bool] = []
    content: list[bytes] = []

    async def receive() -> Any:
        if not requested:
            requested.append(True)
            return {"type": "http.request", "body": body(headers, {}), "more_body": False}
        return await asyncio.Event().wait()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            content.append(message["body"])
            began.set()
            await taking.wait()

    async with gateway(items) as (app, _):
        driven = asyncio.create_task(drive(app, headers, receive, send))
        await asyncio.wait_for(began.wait(), 60)
        await asyncio.sleep(1.0)
        assert len(content) == 1
        assert made < total
        taking.set()
        await driven
    found, end = read(headers, b"".join(content))
    assert [each["index"] for each in found] == list(range(total))
    assert end["error"]["code"] == "resource_exhausted"


@FRAMINGS
async def test_over_a_real_connection_messages_come_at_once_and_closing_it_cancels(
    headers: dict[str, str],
) -> None:
    entered, cancelled = asyncio.Event(), asyncio.Event()

    async def items(request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            yield ItemsResponse(text="first")
            entered.set()
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async with echo.echo_server(items) as server:
        app = create_app(settings(), {"inference": f"127.0.0.1:{server.port}"})
        async with (
            listening(app) as address,
            httpx.AsyncClient(base_url=address, timeout=10) as client,
        ):
            content = body(headers, {})
            async with client.stream("POST", ITEMS, content=content, headers=headers) as response:
                pieces = response.aiter_raw()  # dropping it would close the connection
                assert b'"text":"first"' in await anext(pieces)
                await asyncio.wait_for(entered.wait(), 5)
                await asyncio.sleep(0.2)
                assert not cancelled.is_set()  # the control
            await asyncio.wait_for(cancelled.wait(), 5)
