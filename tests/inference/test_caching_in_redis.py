"""Answers kept in a real Redis, which several services share and which may go."""

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import grpc
import pytest
from tdb.inference.v1 import (
    service_pb2_grpc,
)

from services.common.settings import Settings
from services.inference.engine.model import Model
from services.inference.scheduler import Scheduler
from services.inference.server import build_server
from tests.common.cache.redis_server import patient, running
from tests.inference.cached import (
    ASKED,
    RUN_REQUEST,
    manifest_of,
    serving,
    twin,
    without_circumstances,
)

if TYPE_CHECKING:  # the stubs name it, the generated module does not
    from tdb.inference.v1.service_pb2_grpc import InferenceServiceAsyncStub as Stub

__all__ = ["twin"]  # fixtures


async def test_two_services_share_one_redis(model: Model, twin: Model) -> None:
    with running() as redis:
        async with (
            serving(model, patient(redis.address)) as one,
            serving(twin, patient(redis.address)) as other,
        ):
            for name in ASKED:
                first, again = await one.ask(name), await other.ask(name)
                assert other.pieces == 0
                assert manifest_of(again).cached
                assert without_circumstances(again) == without_circumstances(first)


async def test_redis_may_go_and_come(model: Model, caplog: pytest.LogCaptureFixture) -> None:
    """Killed, hung, flushed and garbled while it is used, and no answer is lost or wrong."""
    caplog.set_level(logging.WARNING)
    with running() as redis:
        cache = patient(redis.address)
        async with serving(model, cache) as service:
            right = without_circumstances(await service.ask("Run"))

            async def asked(do: Callable[[], None] = lambda: None) -> bool:
                """Whether all of five answers were kept ones."""
                asking = [asyncio.ensure_future(service.ask("Run")) for _ in range(5)]
                do()
                answers = await asyncio.gather(*asking)
                assert all(without_circumstances(answer) == right for answer in answers)
                return all(manifest_of(answer).cached for answer in answers)

            assert await asked()
            redis.command("FLUSHALL")
            assert not await asked()
            assert await asked()
            keys = redis.command("KEYS", "*").split()
            (key,) = [each.decode() for each in keys if each.startswith(b"tdb:")]
            redis.command("SETRANGE", key, "30", "damage")
            assert not await asked()
            assert cache.counters.damaged == 1
            assert await asked()
            await asked(redis.stop)
            assert not await asked()
            redis.start()
            breaker = cache._breaker
            breaker._opened_at = -1e9  # its pause is over
            await asked()
            assert await asked()
            assert service.answers.cache.state == "closed"


@pytest.mark.parametrize("broken", ["frozen", "dead"])
async def test_without_redis_all_is_as_before(model: Model, broken: str) -> None:
    with running() as redis:
        env = {"TDB_MODEL": "tiny=org/model", "TDB_REDIS_URL": redis.url}
        settings = Settings.from_env(env)
        redis.freeze() if broken == "frozen" else redis.stop()
        scheduler = Scheduler()
        try:
            async with build_server(settings, scheduler, {"tiny": model}, 0) as server:
                await server.set_serving()
                async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
                    stub: Stub = service_pb2_grpc.InferenceServiceStub(channel)
                    for _ in range(5):
                        answer = await stub.Run(RUN_REQUEST, timeout=60)
                        assert answer.next_tokens
                        assert not answer.manifest.cached
        finally:
            scheduler.close()
