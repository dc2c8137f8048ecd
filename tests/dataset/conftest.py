"""Most tests need no disk that survives a power cut; some need a blob server."""

import os
from collections.abc import Iterator

import pytest

from tests.dataset import azurite_server
from tests.dataset.azurite_server import Azurite


@pytest.fixture(autouse=True)
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests write thousands of small files; waiting for the disk each time takes minutes."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="session")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Azurite]:
    with azurite_server.serving(tmp_path_factory.mktemp("azurite")) as server:
        yield server
