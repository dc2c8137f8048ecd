"""Replicas that load, drain, restart and die under calls, and what a client of theirs sees.

`tdb.channel` is the documented way to reach them: with it, nothing. What its parts are for is shown
by leaving them out.
"""

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import pytest
from tdb import channel
from tdb.inference.v1 import generate_pb2, model_pb2, service_pb2_grpc

from services.common import errors
from services.common.server import ServiceServer
from tests.common.backend import SERVICE, Backend, StreamingBackend, serving, settings
from tests.common.replica import TOKENS
from tests.gateway.helpers import running

if TYPE_CHECKING:  # the stubs name it, the generated module does not
    from tdb.inference.v1.service_pb2_grpc import InferenceServiceAsyncStub as Stub

ROOT = Path(__file__).parents[2]
DRAIN_S = 5


class Process:
    """`replica.py`: with everything loaded, so that `listen` has only to open the port."""

    def __init__(self, port: int = 0) -> None:
        clean = {key: value for key, value in os.environ.items() if not key.startswith("TDB_")}
        self.port = port
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests/common/replica.py")],
            env={
                **clean,
                "PYTHONPATH": f"{ROOT}:{ROOT / 'client'}",
                "TDB_INFERENCE_PORT": str(port),
                "TDB_DRAIN_SECONDS": str(DRAIN_S),
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    def listen(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.close()
        self.port = int(json.loads(self.process.stdout.readline())["port"])

    @property
    def pid(self) -> str:
        return str(self.process.pid)

    def end(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        code = self.process.wait(timeout=DRAIN_S + 15)
        if self.process.stdout is not None:
            self.process.stdout.close()
        return code


@pytest.fixture
def start() -> Iterator[Callable[..., Process]]:
    """Starts processes; what still runs at the end is killed."""
    started: list[Process] = []

    def one(port: int = 0) -> Process:
        started.append(Process(port))
        return started[-1]

    yield one
    for each in started:
        if each.process.poll() is None:
            each.end(signal.SIGKILL)


@pytest.fixture
def pair(start: Callable[..., Process]) -> tuple[Process, Process]:
    replicas = (start(), start())
    for each in replicas:
        each.listen()
    return replicas


def address(*ports: int) -> str:
    return "ipv4:" + ",".join(f"127.0.0.1:{port}" for port in ports)


def without_retries() -> list[tuple[str, str | int]]:
    """The same channel less its retry policy, which gRPC would do on its own as well."""
    config = channel.service_config()
    del config["methodConfig"]
    return [
        *channel.CONNECTION,
        ("grpc.service_config", json.dumps(config)),
        ("grpc.enable_retries", 0),
    ]


@asynccontextmanager
async def stub_to(*ports: int, options: Any = None) -> AsyncIterator["Stub"]:
    chosen = channel.options() if options is None else options
    async with grpc.aio.insecure_channel(address(*ports), chosen) as opened:
        yield service_pb2_grpc.InferenceServiceStub(opened)


async def who(stub: "Stub", seconds: float = 0.0) -> str:
    """The process that answered a call which takes that long."""
    answer = await stub.GetModel(model_pb2.GetModelRequest(model=str(seconds)), timeout=30)
    return answer.engine_version


async def tokens(stub: "Stub", seconds: float) -> list[int]:
    """The processes that sent each token of a stream."""
    call = stub.Generate(generate_pb2.GenerateRequest(model=str(seconds)), timeout=30)
    return [each.token.position async for each in call]


def test_the_documented_policy_is_the_one_in_use() -> None:
    text = (ROOT / "docs/operations.md").read_text()
    documented = re.search(r"```json\n(\{\s*\"loadBalancingConfig.*?)```", text, re.S)
    assert documented is not None
    assert json.loads(documented[1]) == channel.service_config()


async def test_calls_go_round_and_a_killed_replica_is_not_seen(
    pair: tuple[Process, Process],
) -> None:
    killed, left = pair
    async with stub_to(killed.port, left.port) as stub:
        await asyncio.gather(*(who(stub) for _ in range(4)))
        shares = Counter([await who(stub) for _ in range(20)])
        assert set(shares) == {killed.pid, left.pid}
        assert min(shares.values()) >= 8

        in_flight = [asyncio.ensure_future(who(stub, 0.5)) for _ in range(10)]
        await asyncio.sleep(0.2)
        killed.end(signal.SIGKILL)
        after = [await who(stub) for _ in range(40)]
        assert Counter(after) == {left.pid: 40}
        assert Counter(await asyncio.gather(*in_flight)) == {left.pid: 10}


async def test_without_the_retry_policy_a_killed_replica_is_seen(
    pair: tuple[Process, Process],
) -> None:
    killed, left = pair
    async with stub_to(killed.port, left.port, options=without_retries()) as stub:
        shares: set[str] = set()
        while len(shares) < 2:  # until both are connected
            shares.add(await who(stub))
        in_flight = [asyncio.ensure_future(who(stub, 0.5)) for _ in range(10)]
        await asyncio.sleep(0.2)
        killed.end(signal.SIGKILL)
        found = await asyncio.gather(*in_flight, return_exceptions=True)
    lost = [each for each in found if isinstance(each, grpc.aio.AioRpcError)]
    assert len(lost) == 5
    assert {each.code() for each in lost} == {grpc.StatusCode.UNAVAILABLE}


async def test_a_service_that_is_restarted_finishes_what_runs_and_is_not_missed(
    start: Callable[..., Process],
) -> None:
    """SIGTERM with calls in flight, one new while it drains, one while it is away."""
    first = start()
    first.listen()
    second = start(first.port)
    async with stub_to(first.port) as stub, stub_to(first.port, options=without_retries()) as bare:
        await who(bare)
        running_calls = [
            asyncio.ensure_future(who(stub, 1.0)),
            asyncio.ensure_future(who(bare, 1.0)),
        ]
        streams = [asyncio.ensure_future(tokens(each, 0.3)) for each in (stub, bare)]
        await asyncio.sleep(0.3)
        ending = asyncio.ensure_future(asyncio.to_thread(first.end, signal.SIGTERM))
        await asyncio.sleep(0.3)
        assert first.process.poll() is None, "it drains"
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await who(bare)
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE

        assert await asyncio.gather(*running_calls) == [first.pid] * 2
        assert await asyncio.gather(*streams) == [[int(first.pid)] * TOKENS] * 2
        assert await ending == 0

        meanwhile = asyncio.ensure_future(who(stub))
        await asyncio.sleep(0.2)
        assert not meanwhile.done()
        await asyncio.to_thread(second.listen)
        assert await meanwhile == second.pid
    assert second.end(signal.SIGTERM) == 0


@asynccontextmanager
async def two(
    one: Backend, other: Backend, **variables: str
) -> AsyncIterator[tuple[ServiceServer, ServiceServer]]:
    """The first is SERVING, the second listens and loads."""
    async with contextlib.AsyncExitStack() as stack:
        servers = []
        for backend in (one, other):
            server = ServiceServer(
                "inference",
                settings(**variables),
                port=0,
                add_servicers=lambda server, backend=backend: (  # type: ignore[misc]
                    service_pb2_grpc.add_InferenceServiceServicer_to_server(backend, server)
                ),
                service_names=[SERVICE],
            )
            servers.append(await stack.enter_async_context(server))
        await servers[0].set_serving()
        yield servers[0], servers[1]


async def list_models(stub: "Stub") -> None:
    await stub.ListModels(model_pb2.ListModelsRequest(), timeout=10)


async def test_a_replica_that_loads_or_drains_gets_no_calls() -> None:
    one, other = Backend(), Backend()
    async with two(one, other) as (first, second), stub_to(first.port, second.port) as stub:
        for _ in range(10):
            await list_models(stub)
        assert (len(one.requests), len(other.requests)) == (10, 0)
        await second.set_serving()
        while not other.requests:
            await list_models(stub)
        one.requests.clear()
        await first.drain()
        for _ in range(10):
            await list_models(stub)
        assert one.requests == []


async def hammered(stub: "Stub", stop: asyncio.Event) -> Counter[str]:
    """How calls end that come without a pause."""
    codes: Counter[str] = Counter()
    while not stop.is_set():
        try:
            await list_models(stub)
            codes["OK"] += 1
        except grpc.aio.AioRpcError as error:
            codes[error.code().name] += 1
            await asyncio.sleep(0.01)
    return codes


async def test_many_callers_do_not_see_a_replica_drain() -> None:
    one, other = Backend(), Backend()
    async with two(one, other) as (first, second), stub_to(first.port, second.port) as stub:
        await second.set_serving()
        stop = asyncio.Event()
        callers = [asyncio.ensure_future(hammered(stub, stop)) for _ in range(16)]
        await asyncio.sleep(0.2)
        await first.drain()
        await asyncio.sleep(0.1)
        stop.set()
        assert set().union(*await asyncio.gather(*callers)) == {"OK"}
    assert one.requests


async def test_new_work_is_refused_as_unavailable_while_a_call_runs() -> None:
    """gRPC's own graceful stop would answer them with CANCELLED, or not connect at all."""
    backend = Backend()
    entered, released = asyncio.Event(), asyncio.Event()

    async def until_released(request: Any, context: Any) -> Any:
        entered.set()
        await released.wait()
        return model_pb2.ListModelsResponse()

    backend.answer = until_released
    async with (
        serving(backend, TDB_DRAIN_SECONDS="20") as server,
        stub_to(server.port, options=channel.CONNECTION) as old,
        stub_to(server.port, options=channel.CONNECTION) as new,
    ):
        call = old.ListModels(model_pb2.ListModelsRequest())
        await entered.wait()
        draining = asyncio.ensure_future(server.drain())
        await asyncio.sleep(0)
        for stub in (old, new, old, new):  # a connection of before, and one made now
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await list_models(stub)
            assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
            assert "stopping" in str(refused.value.details())
        assert not draining.done()
        released.set()
        await call
        await draining
    assert len(backend.requests) == 1


async def test_the_gateway_is_ready_when_one_replica_is() -> None:
    one, other = Backend(), Backend()
    async with (
        two(one, other) as (first, second),
        running(address(first.port, second.port)) as (_, client),
    ):
        assert (await client.get("/readyz")).status_code == 200
        for _ in range(4):
            answer = await client.post(f"/{SERVICE}/ListModels", json={})
            assert answer.status_code == 200
        assert (len(one.requests), len(other.requests)) == (4, 0)
        await first.set_not_serving()
        answer = await client.get("/readyz")
        assert answer.status_code == 503
        assert answer.json()["awaited"] == {"inference": "it is loading, or stopping"}


async def test_a_full_service_is_asked_again_when_it_says_so_but_not_by_the_gateway() -> None:
    backend = Backend()

    async def full_twice(request: Any, context: Any) -> Any:
        if len(backend.requests) < 3:
            raise errors.ResourceExhausted("the queue is full", retry_after_s=0.01)
        return model_pb2.ListModelsResponse()

    backend.answer = full_twice
    async with serving(backend) as server:
        async with stub_to(server.port) as stub:
            await list_models(stub)
        assert len(backend.requests) == 3
        backend.requests.clear()
        async with running(f"127.0.0.1:{server.port}") as (_, client):
            answer = await client.post(f"/{SERVICE}/ListModels", json={})
        assert answer.status_code == 429
        assert answer.headers["retry-after"] == "1"
        assert len(backend.requests) == 1


@pytest.mark.parametrize(("brought", "asked"), [(0, 3), (1, 1)])
async def test_a_stream_is_tried_again_only_while_it_has_brought_nothing(
    brought: int, asked: int
) -> None:
    """Otherwise what came would come twice."""
    times = 0

    async def items(request: Any, context: Any) -> AsyncIterator[Any]:
        nonlocal times
        times += 1
        for _ in range(brought):
            yield model_pb2.GetModelRequest(model="item")
        if times < 3:
            raise errors.Unavailable("stopping", retry_after_s=0.01)

    async with (
        serving(Backend(), StreamingBackend(items)) as server,
        grpc.aio.insecure_channel(address(server.port), channel.options()) as opened,
    ):
        call = opened.unary_stream(
            StreamingBackend.METHOD,
            request_serializer=model_pb2.GetModelRequest.SerializeToString,
            response_deserializer=model_pb2.GetModelRequest.FromString,
        )(model_pb2.GetModelRequest(), timeout=10)
        found: list[Any] = []
        if asked == 1:
            with pytest.raises(grpc.aio.AioRpcError):
                found.extend([each async for each in call])
        else:
            found.extend([each async for each in call])
    assert times == asked


@pytest.mark.parametrize("age", ["0", "1"])
async def test_a_connection_is_made_anew_at_its_age_without_ending_what_runs(age: str) -> None:
    backend = Backend()
    peers: list[str] = []

    async def answer(request: Any, context: Any) -> Any:
        peers.append(context.peer())
        await asyncio.sleep(float(request.model or 0))
        return model_pb2.GetModelResponse()

    backend.answer = answer
    async with (
        serving(backend, TDB_MAX_CONNECTION_AGE_SECONDS=age) as server,
        stub_to(server.port, options=without_retries()) as stub,
    ):
        for seconds in ("1.6", "0"):
            await stub.GetModel(model_pb2.GetModelRequest(model=seconds), timeout=10)
    assert (peers[0] == peers[1]) == (age == "0")
