"""Answers shared in flight, over real gRPC."""

import asyncio
import contextlib
from typing import Any

import grpc
import pytest
from google.protobuf.json_format import ParseDict
from tdb.inference.v1 import (
    run_pb2,
)

from services.common.cache.memory import MemoryCache
from services.common.errors import ResourceExhausted
from services.inference.engine.model import Model
from tests.inference.cached import (
    PROMPT,
    RUN_REQUEST,
    Passes,
    manifest_of,
    passes,
    serving,
    until,
)

__all__ = ["passes"]  # fixtures


async def test_a_hundred_who_ask_at_once_cost_one_pass(model: Model, passes: Passes) -> None:
    for name in ("Run", "Attribute"):
        async with serving(model) as service:
            passes.count = 0
            with passes.held():
                asking = [asyncio.ensure_future(service.ask(name)) for _ in range(100)]
                await until(lambda: service.answers.flights.joined == 99)
            found = [answer for (answer,) in await asyncio.gather(*asking)]
            assert passes.count == 1
            assert service.pieces == 1
            assert len({answer.SerializeToString(deterministic=True) for answer in found}) == 1
            assert not manifest_of([found[0]]).cached
            # Nothing was kept, so the next one is computed: the count does count.
            await service.ask(name)
            assert passes.count == 2


async def test_streams_are_shared_from_their_beginning(model: Model, passes: Passes) -> None:
    async with serving(model) as service:
        with passes.held():
            early = asyncio.ensure_future(service.ask("Generate"))
            await passes.begun(1)
            late = asyncio.ensure_future(service.ask("Generate"))
            await until(lambda: service.answers.flights.joined == 1)
        first, second = await asyncio.gather(early, late)
        assert first == second
        assert passes.count == 5


async def test_who_leaves_leaves_the_others(model: Model, passes: Passes) -> None:
    async with serving(model) as service:
        with passes.held():
            calls = [service.stub.Run(RUN_REQUEST) for _ in range(3)]
            await until(lambda: service.answers.flights.joined == 2)
            calls[0].cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await calls[0]
        answers = await asyncio.gather(calls[1], calls[2])
        assert answers[0] == answers[1]
        assert passes.count == 1


async def test_the_first_ones_deadline_is_its_own(model: Model, passes: Passes) -> None:
    async with serving(model) as service:
        with passes.held():
            hurried = service.stub.Run(RUN_REQUEST, timeout=0.3)
            await passes.begun(1)
            patient = service.stub.Run(RUN_REQUEST, timeout=60)
            await until(lambda: service.answers.flights.joined == 1)
            with pytest.raises(grpc.aio.AioRpcError) as late:
                await hurried
            assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert (await patient).next_tokens
        assert passes.count == 1


async def test_when_all_have_left_the_work_ends(model: Model, passes: Passes) -> None:
    other = ParseDict({"run": {"prompt": PROMPT}}, run_pb2.RunRequest())
    async with serving(model, MemoryCache(2**26)) as service:
        with passes.held():
            blocking = asyncio.ensure_future(service.ask("Run", other))
            await passes.begun(1)
            calls = [service.stub.Run(RUN_REQUEST) for _ in range(3)]
            await until(lambda: service.answers.flights.joined == 2)
            for call in calls:
                call.cancel()
            await until(lambda: len(service.answers.flights) == 1)
        await blocking
        assert passes.count == 1, "what nobody waits for is not run"
        assert service.answers.cache.counters.stored == 1


async def test_an_error_reaches_all_and_is_not_kept(
    model: Model, passes: Passes, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(model, MemoryCache(2**26)) as service:
        with monkeypatch.context() as patched:

            def full(*_: Any, **__: Any) -> Any:
                passes()
                raise ResourceExhausted("no room", retry_after_s=1.0)

            patched.setattr(Model, "run", full)
            with passes.held():
                asking = [asyncio.ensure_future(service.ask("Run")) for _ in range(5)]
                await until(lambda: service.answers.flights.joined == 4)
            found = await asyncio.gather(*asking, return_exceptions=True)
        for each in found:
            assert isinstance(each, grpc.aio.AioRpcError)
            assert each.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert each.details() == "no room"
        assert not manifest_of(await service.ask("Run")).cached
        assert manifest_of(await service.ask("Run")).cached


async def test_a_cancelled_error_from_within_is_an_answer(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Let out, it would leave the client to wait for its own deadline."""

    async def cancelled(*_: Any) -> Any:
        raise asyncio.CancelledError

    async with serving(model) as service:
        monkeypatch.setattr("services.inference.servicer.InferenceServicer._run", cancelled)
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await service.stub.Run(RUN_REQUEST, timeout=60)
        assert failed.value.code() is grpc.StatusCode.INTERNAL
