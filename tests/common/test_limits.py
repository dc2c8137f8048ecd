"""What one user may ask: the accounts by themselves, and a service that keeps them over gRPC."""

import asyncio
import json
import logging
from contextlib import ExitStack
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tdb.inference.v1 import generate_pb2, model_pb2, service_pb2_grpc

from services.common import interceptor
from services.common.errors import ResourceExhausted
from services.common.limits import UserLimits
from tests.common.backend import Backend, channel_to, connected, serving
from tests.common.test_interceptor import details, refusal, trailers

LIST = model_pb2.ListModelsRequest()
TOKENS = "ann:t0ken,bob:other"
ANN = [("authorization", "Bearer t0ken")]
BOB = [("authorization", "Bearer other")]


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def refused(limits: UserLimits, user: str = "ann") -> ResourceExhausted | None:
    """The refusal of one request that ends at once; None where it is let in."""
    try:
        with limits.admit(user):
            return None
    except ResourceExhausted as error:
        return error


def test_a_quarter_of_a_minute_at_once_and_then_one_by_one() -> None:
    clock = Clock()
    limits = UserLimits(60, 0, clock=clock)
    assert [refused(limits) for _ in range(15)] == [None] * 15
    error = refused(limits)
    assert error is not None
    assert (error.reason, error.metadata) == ("TOO_MANY_REQUESTS", {"limit": "60"})
    assert error.retry_after_s == pytest.approx(1)
    assert refused(limits, "bob") is None
    clock.now += 1
    assert refused(limits) is None
    assert refused(limits) is not None
    clock.now += 3600  # a long silence saves no more than the burst
    assert [refused(limits) is None for _ in range(16)] == [True] * 15 + [False]


def test_over_a_minute_no_more_than_rate_and_burst_are_let_in() -> None:
    clock = Clock()
    limits = UserLimits(120, 0, clock=clock)
    let_in = 0
    for _ in range(6000):
        let_in += refused(limits) is None
        clock.now += 0.01
    assert 149 <= let_in <= 150  # 30 at once, and 120 in the minute


def test_those_who_wait_as_told_are_let_in_one_by_one() -> None:
    clock = Clock()
    limits = UserLimits(600, 0, clock=clock)
    for _ in range(150):
        assert refused(limits) is None
    waits = []
    for _ in range(20):
        error = refused(limits)
        assert error is not None
        waits.append(error.retry_after_s or 0)
    assert waits == pytest.approx([0.1 * (index + 1) for index in range(20)])
    start = clock.now
    for wait in waits:
        clock.now = start + wait + 0.001  # a client that came back together with the others would
        assert refused(limits) is None  # be refused here


def test_nobody_is_sent_away_for_more_than_a_minute() -> None:
    clock = Clock()
    limits = UserLimits(60, 0, clock=clock)
    waits = [error.retry_after_s or 0 for _ in range(1000) if (error := refused(limits))]
    assert len(waits) == 985
    assert 59 < max(waits) <= 60
    assert min(waits) > 0
    clock.now += 120
    assert refused(limits) is None


def test_at_once_is_counted_while_requests_are_served() -> None:
    limits = UserLimits(0, 2)
    with ExitStack() as running:
        for _ in range(2):
            running.enter_context(limits.admit("ann"))
        errors = [refused(limits) for _ in range(5)]
        assert [error and error.reason for error in errors] == ["TOO_MANY_AT_ONCE"] * 5
        assert [error and error.retry_after_s for error in errors] == [1, 1, 2, 2, 3]
        assert refused(limits, "bob") is None
    assert refused(limits) is None
    with pytest.raises(ZeroDivisionError), limits.admit("ann"):
        _ = 1 / 0
    assert refused(limits) is None


def test_all_of_them_together_are_bounded_too() -> None:
    limits = UserLimits(0, 0, in_all=2)
    with limits.admit("ann"), limits.admit("bob"):
        error = refused(limits, "eve")
        assert error is not None
        assert error.reason == "SERVER_BUSY"
    assert refused(limits, "eve") is None


def test_users_who_have_gone_are_forgotten() -> None:
    clock = Clock()
    limits = UserLimits(6000, 64, clock=clock)
    with limits.admit("stays"):
        most = 0
        for number in range(50_000):
            assert refused(limits, f"user-{number}") is None
            clock.now += 0.005
            most = max(most, len(limits))
        assert most <= 2048
        assert limits._accounts["stays"].running == 1
    # The control: users of one moment are all kept, or each would begin anew with every request.
    crowd = UserLimits(6000, 64, clock=clock)
    for number in range(5000):
        assert refused(crowd, f"user-{number}") is None
    assert len(crowd) == 5000


async def test_a_user_over_the_rate_is_told_when_to_come_back_and_others_go_on() -> None:
    variables = {"TDB_TOKENS": TOKENS, "TDB_REQUESTS_PER_MINUTE": "4"}
    async with serving(Backend(), **variables) as server, connected(server) as stub:
        await stub.ListModels(LIST, metadata=ANN)
        error = await refusal(stub.ListModels(LIST, metadata=ANN))
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "4 requests per minute" in str(error.details())
        wait_ms = int(trailers(error)["grpc-retry-pushback-ms"])
        assert 10_000 < wait_ms <= 15_000
        assert abs(details(error)["RetryInfo"].retry_delay.ToMilliseconds() - wait_ms) <= 1
        assert details(error)["ErrorInfo"].reason == "TOO_MANY_REQUESTS"
        await stub.ListModels(LIST, metadata=BOB)
        async with channel_to(server) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            for _ in range(20):
                await health.Check(health_pb2.HealthCheckRequest(), metadata=ANN)


async def test_calls_at_once_are_limited_and_streams_count() -> None:
    backend = Backend()
    entered, leave = asyncio.Semaphore(0), asyncio.Event()

    async def answer(request: Any, context: Any) -> Any:
        entered.release()
        await leave.wait()
        return model_pb2.ListModelsResponse()

    backend.answer = answer
    variables = {"TDB_TOKENS": TOKENS, "TDB_CONCURRENT_REQUESTS": "2"}
    async with serving(backend, **variables) as server, connected(server) as stub:
        calls: list[Any] = [
            stub.ListModels(LIST, metadata=ANN),
            stub.Generate(generate_pb2.GenerateRequest(), metadata=ANN),
        ]
        reading = asyncio.ensure_future(calls[1].read())
        for _ in range(2):
            await asyncio.wait_for(entered.acquire(), 5)
        error = await refusal(stub.ListModels(LIST, metadata=ANN))
        assert details(error)["ErrorInfo"].reason == "TOO_MANY_AT_ONCE"
        assert trailers(error)["grpc-retry-pushback-ms"] == "1000"
        other = stub.ListModels(LIST, metadata=BOB)
        await asyncio.wait_for(entered.acquire(), 5)
        calls[1].cancel()  # a client that leaves gives its place back
        with pytest.raises(asyncio.CancelledError):
            await reading
        leave.set()
        await asyncio.gather(calls[0], other, stub.ListModels(LIST, metadata=ANN))


async def test_a_full_server_still_says_how_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interceptor, "MAX_CONCURRENT_CALLS", 3)
    backend = Backend()
    leave = asyncio.Event()

    async def answer(request: Any, context: Any) -> Any:
        await leave.wait()
        return model_pb2.ListModelsResponse()

    backend.answer = answer
    async with serving(backend) as server, connected(server) as stub:
        calls = [asyncio.ensure_future(stub.ListModels(LIST)) for _ in range(20)]
        pending = set(calls)
        while len(pending) > 3:
            _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        async with channel_to(server) as channel:
            health = await health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=5
            )
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        leave.set()
        ends = await asyncio.gather(*calls, return_exceptions=True)
    refusals = [end for end in ends if isinstance(end, grpc.aio.AioRpcError)]
    assert len(refusals) == 17
    assert {details(error)["ErrorInfo"].reason for error in refusals} == {"SERVER_BUSY"}
    assert all("grpc-retry-pushback-ms" in trailers(error) for error in refusals)


async def test_retries_that_follow_the_pushback_do_not_hammer(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """64 calls at once, 60 of which fit: the four others come back one by one, once each."""
    policy = {
        "methodConfig": [
            {
                "name": [{}],
                "retryPolicy": {
                    "maxAttempts": 4,
                    "initialBackoff": "0.01s",
                    "maxBackoff": "0.01s",
                    "backoffMultiplier": 1,
                    "retryableStatusCodes": ["RESOURCE_EXHAUSTED"],
                },
            }
        ]
    }
    options = (("grpc.service_config", json.dumps(policy)),)
    variables = {"TDB_TOKENS": TOKENS, "TDB_REQUESTS_PER_MINUTE": "240"}
    backend = Backend()
    with caplog.at_level(logging.INFO, "tdb"):
        async with (
            serving(backend, **variables) as server,
            grpc.aio.insecure_channel(f"127.0.0.1:{server.port}", options=options) as channel,
        ):
            stub: Any = service_pb2_grpc.InferenceServiceStub(channel)
            await asyncio.gather(*(stub.ListModels(LIST, metadata=ANN) for _ in range(64)))
    codes = [record.fields["code"] for record in caplog.records if hasattr(record, "fields")]
    assert codes.count("OK") == len(backend.requests) == 64
    assert codes.count("RESOURCE_EXHAUSTED") <= 4


async def test_where_everybody_is_one_user_there_is_no_limit_unless_one_is_set() -> None:
    async with serving(Backend()) as server, connected(server) as stub:
        await asyncio.gather(*(stub.ListModels(LIST) for _ in range(200)))
    async with (
        serving(Backend(), TDB_REQUESTS_PER_MINUTE="4") as server,
        connected(server) as stub,
    ):
        await stub.ListModels(LIST)
        error = await refusal(stub.ListModels(LIST))
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
