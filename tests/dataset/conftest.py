"""Most tests need no disk that survives a power cut."""

import os

import pytest


@pytest.fixture(autouse=True)
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests write thousands of small files; waiting for the disk each time takes minutes."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
