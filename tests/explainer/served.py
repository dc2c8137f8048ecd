"""The explainer service in this process, over real gRPC."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from services.common.server import ServiceServer
from services.explainer.database import Database
from services.explainer.server import build_server
from services.explainer.servicer import ExplainerServicer
from services.explainer.upstream import Upstream
from tests.common.backend import settings

NOBODY = "127.0.0.1:1"
"""Where nothing listens."""


@asynccontextmanager
async def explainer(
    folder: Path, *, dataset: str = NOBODY, inference: str = NOBODY, **variables: str
) -> AsyncIterator[ServiceServer]:
    """The explanations in `folder` behind a server on a free port; the services it asks are at
    `host:port`."""
    addresses = {"TDB_DATASET_ADDRESS": dataset, "TDB_INFERENCE_ADDRESS": inference}
    found = settings(**addresses, **variables)
    upstream = Upstream(found)
    database = Database(folder / "explanations.sqlite3")
    try:
        servicer = ExplainerServicer(database, upstream, None)
        async with build_server(found, servicer, 0, on_stop=upstream.close) as server:
            await server.set_serving()
            yield server
    finally:
        database.close()
