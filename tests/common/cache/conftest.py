"""One real Redis for a file's tests, emptied before each."""

from collections.abc import Iterator

import pytest

from tests.common.cache.redis_server import RedisServer, running


@pytest.fixture(scope="module")
def _server() -> Iterator[RedisServer]:
    with running() as server:
        yield server


@pytest.fixture
def redis_server(_server: RedisServer) -> RedisServer:
    _server.command("FLUSHALL")
    return _server
