"""The real inference service on a tiny model, and the dataset service that builds with it."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from services.common.server import ServiceServer
from services.inference.engine.model import Model
from services.inference.scheduler import Scheduler
from services.inference.server import build_server
from tests.common.backend import settings
from tests.dataset.building.helpers import corpus_lines
from tests.inference.conftest import model, model_folder, scheduler

__all__ = ["model", "model_folder", "scheduler"]


@pytest_asyncio.fixture
async def inference(model: Model, model_folder: Path) -> AsyncIterator[ServiceServer]:
    found = settings(TDB_MODEL=f"tiny={model_folder}", TDB_CACHE_MIB="0")
    worker = Scheduler()
    try:
        async with build_server(found, worker, {"tiny": model}, port=0) as server:
            await server.set_serving()
            yield server
    finally:
        worker.close()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder with a corpus `news.jsonl`."""
    corpora = tmp_path / "data" / "corpora"
    corpora.mkdir(parents=True)
    (corpora / "news.jsonl").write_text(corpus_lines())
    return tmp_path / "data"
