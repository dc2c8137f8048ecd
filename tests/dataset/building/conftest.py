"""The real inference service on a tiny model, and the dataset service that builds with it."""

import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from services.common.server import ServiceServer
from services.dataset.building.inference import Inference, Stop
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


class Gate:
    """Where builds wait on their way, so that a test can do something there at any speed."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self._open.set()
        self._left = 0

    def close(self, segments: int) -> None:
        """So many more are harvested, then builds wait."""
        self._left = segments
        self._open.clear()

    def open(self) -> None:
        self._open.set()

    def passing(self, stop: Stop) -> None:
        """Raises Cancelled where the build is stopped meanwhile."""
        self._left -= 1
        while self._left < 0 and not self._open.wait(0.02):
            stop.check()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made, real = Gate(), Inference.harvest

    def harvest(self: Any, *what: Any) -> Any:
        made.passing(self._stop)
        return real(self, *what)

    monkeypatch.setattr(Inference, "harvest", harvest)
    yield made
    made.open()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder with a corpus `news.jsonl`."""
    corpora = tmp_path / "data" / "corpora"
    corpora.mkdir(parents=True)
    (corpora / "news.jsonl").write_text(corpus_lines())
    return tmp_path / "data"
