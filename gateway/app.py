"""The gateway's parts, put together: one origin for the API, health and the page."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import Mount, Route

from gateway import backends, health
from gateway.access import Access
from gateway.metrics import GatewayMetrics
from gateway.pages import FOLDER, Pages
from gateway.security import Security
from gateway.transcoder import Transcoder
from services.common.metrics import new_registry
from services.common.settings import Settings
from services.common.tls import ClientTls
from services.common.tracing import Tracing, Untraced


def create_app(
    settings: Settings,
    addresses: Mapping[str, str] | None = None,
    page: Path = FOLDER,
    registry: CollectorRegistry | None = None,
    tracing: Tracing | None = None,
) -> Starlette:
    """The ASGI application. `addresses` says where the services are, by default the settings do;
    `registry` takes its metrics, `tracing` its spans."""
    addresses = addresses if addresses is not None else backends.targets(settings)
    secured = ClientTls.of(settings)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        # Channels belong to the running loop, so the routes that use them are made here as well.
        connected = backends.connect(addresses, secured)
        app.router.routes[:] = [
            *health.routes(connected),
            Route("/{service}/{method}", Transcoder(connected, settings), methods=["POST"]),
            Mount("/", Pages(page)),
        ]
        try:
            yield
        finally:
            for backend in connected:
                await backend.close()

    return Starlette(
        lifespan=lifespan,
        middleware=[
            Middleware(
                Access,
                metrics=GatewayMetrics(registry or new_registry()),
                tracing=tracing or Untraced(),
            ),
            Middleware(Security, settings=settings),
        ],
    )
