"""Asking for a stream over HTTP, and reading what comes, in both framings."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette

from tests.gateway import echo
from tests.gateway.echo import Items
from tests.gateway.helpers import running

CONNECT = {"content-type": "application/connect+json", "connect-protocol-version": "1"}
EVENTS = {"content-type": "application/json", "accept": "text/event-stream"}
FRAMINGS = pytest.mark.parametrize("headers", [CONNECT, EVENTS], ids=["connect", "events"])


@asynccontextmanager
async def gateway(items: Items = echo.count) -> AsyncIterator[tuple[Starlette, httpx.AsyncClient]]:
    async with (
        echo.echo_server(items) as server,
        running(f"127.0.0.1:{server.port}") as (app, client),
    ):
        yield app, client


def envelope(data: bytes, flags: int = 0) -> bytes:
    return bytes([flags]) + len(data).to_bytes(4, "big") + data


def body(headers: dict[str, str], tree: Any) -> bytes:
    data = json.dumps(tree).encode()
    return envelope(data) if headers is CONNECT else data


def read(headers: dict[str, str], content: bytes) -> tuple[list[Any], Any]:
    """(messages, what the last frame holds) of an answer; everything must be used up."""
    if headers is EVENTS:
        *blocks, rest = content.decode().split("\n\n")
        assert rest == ""
        blocks = [block for block in blocks if not block.startswith(":")]
        name, data = blocks.pop().split("\n")
        assert name == "event: end"
        assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
        found = [json.loads(block.removeprefix("data: ")) for block in blocks]
        return found, json.loads(data.removeprefix("data: "))
    found = []
    while True:
        flags, length = content[0], int.from_bytes(content[1:5], "big")
        tree = json.loads(content[5 : 5 + length])
        content = content[5 + length :]
        if flags == 2:
            assert content == b""
            return found, tree
        assert flags == 0
        found.append(tree)
