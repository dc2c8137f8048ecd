"""The gateway in this process over a real gRPC service."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette

from gateway.app import create_app
from services.common.tracing import Tracing
from tests.common.backend import SERVICE, Backend, serving, settings

NOWHERE = Path("/nonexistent/page")


@asynccontextmanager
async def running(
    address: str,
    page: Path = NOWHERE,
    registry: CollectorRegistry | None = None,
    tracing: Tracing | None = None,
    /,
    **variables: str,
) -> AsyncIterator[tuple[Starlette, httpx.AsyncClient]]:
    """The app with its lifespan, and a client that speaks to it as a browser on this machine."""
    app = create_app(settings(**variables), {"inference": address}, page, registry, tracing)
    async with _client_of(app) as client:
        yield app, client


@asynccontextmanager
async def running_before(service: str, port: int) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a gateway that has this service alone, on this machine."""
    async with _client_of(
        create_app(settings(), {service: f"127.0.0.1:{port}"}, NOWHERE)
    ) as client:
        yield client


@asynccontextmanager
async def _client_of(app: Starlette) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://localhost:8080") as client,
    ):
        yield client


class _Server(uvicorn.Server):
    """uvicorn that leaves the test's signals alone."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def listening(app: Any) -> AsyncIterator[str]:
    """`app` on a free port; its address."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        config = uvicorn.Config(
            app, log_config=None, ws="none", proxy_headers=False, timeout_graceful_shutdown=2
        )
        server = _Server(config)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            await serving


class Gateway:
    """A client with the few calls that the tests make."""

    def __init__(self, app: Starlette, client: httpx.AsyncClient) -> None:
        self.app = app
        self.client = client

    async def call(
        self, method: str, body: Any = None, *, headers: Mapping[str, str] | None = None
    ) -> httpx.Response:
        """POSTs `body`: text and bytes as they are, anything else as JSON."""
        url = f"/{SERVICE}/{method}"
        if isinstance(body, str | bytes):
            json_headers = {"content-type": "application/json", **(headers or {})}
            return await self.client.post(url, content=body, headers=json_headers)
        return await self.client.post(url, json=body or {}, headers=dict(headers or {}))


@asynccontextmanager
async def gateway_to(backend: Backend, **variables: str) -> AsyncIterator[Gateway]:
    """The gateway over `backend`; both read the same settings."""
    async with (
        serving(backend, **variables) as server,
        running(f"127.0.0.1:{server.port}", NOWHERE, **variables) as (app, client),
    ):
        yield Gateway(app, client)


def violations(response: httpx.Response) -> list[str]:
    """The field paths that a refusal names."""
    return [
        violation["field"]
        for detail in response.json()["details"]
        if detail["type"] == "google.rpc.BadRequest"
        for violation in detail["debug"]["fieldViolations"]
    ]
