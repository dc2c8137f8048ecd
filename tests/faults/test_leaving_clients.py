"""Clients that vanish in the middle of a stream: the device stops working for nobody, and nothing
of them is left. Deadlines too short for anything."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import grpc
import httpx
import pytest
from google.protobuf import message_factory
from google.protobuf.json_format import ParseDict
from tdb.inference.v1 import service_pb2

from gateway.backends import methods as exposed
from services.common.server import ServiceServer
from services.inference import output_tokens
from services.inference.scheduler import Scheduler
from tests.faults.watching import Cut, Held, SlowDevice, until

SERVICE = service_pb2.DESCRIPTOR.services_by_name["InferenceService"]
RUN = {"prompt": {"tokenIds": {"ids": [5, 17, 4, 25, 60, 8]}}}
TABLE = {
    "run": RUN,
    "objective": {"logitDiff": {"targets": [{"id": 5}], "distractors": [{"id": 9}]}},
    "topK": 30,
}
POINTS = ["embed", "resid_mid.0", "resid_post.0", "q.0", "k.0", "v.0", "z.0", "mlp_act.0"] + [
    f"{name}.1" for name in ("q", "k", "v", "z", "mlp_act", "attn_out", "mlp_out")
]
REQUESTS: dict[str, dict[str, Any]] = {method.name: {} for method in SERVICE.methods} | {
    "Tokenize": {"prompt": RUN["prompt"]},
    "Run": {"run": RUN},
    "Attribute": TABLE,
    "Verify": {"table": TABLE},
    "DescribeComponent": {"component": "neuron.1.3"},
    "Generate": {"run": RUN, "maxNewTokens": 20, "pastEnd": True},
    "StreamActivations": {"run": RUN, "points": POINTS},
    "Harvest": {
        "groups": ["neuron.0", "head.1"],
        "sequences": [{"index": length, "ids": [5] * length} for length in range(1, 21)],
    },
    "StreamOutputTokens": {"group": "neuron.0"},
}
STREAMS = [method.name for method in SERVICE.methods if method.server_streaming]
EXPOSED = {method.name for method in exposed(SERVICE)}
PIECES = 15
"""Pieces of work on the device that each of the streams takes, at least."""


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_tokens, "AT_ONCE", 2)


def message(rpc: str) -> Any:
    request = message_factory.GetMessageClass(SERVICE.methods_by_name[rpc].input_type)
    return ParseDict(REQUESTS[rpc], request())


def grpc_call(channel: grpc.aio.Channel, rpc: str, **more: Any) -> Any:
    method = SERVICE.methods_by_name[rpc]
    response = message_factory.GetMessageClass(method.output_type)
    kind = channel.unary_stream if method.server_streaming else channel.unary_unary
    made: Any = kind(
        f"/{SERVICE.full_name}/{rpc}",
        request_serializer=lambda request: request.SerializeToString(),
        response_deserializer=response.FromString,
    )
    return made(message(rpc), **more)


@asynccontextmanager
async def over_grpc(server: ServiceServer, gateway: str, rpc: str) -> AsyncIterator[None]:
    """A stream that is being read; whoever leaves the block cancels it."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        call = grpc_call(channel, rpc)
        reading = asyncio.ensure_future(drained(call))
        yield
        call.cancel()
        with contextlib.suppress(asyncio.CancelledError, grpc.aio.AioRpcError):
            await reading


@asynccontextmanager
async def cut_off(server: ServiceServer, gateway: str, rpc: str) -> AsyncIterator[None]:
    """The same, but the connection breaks without a word."""
    async with Cut(server.port).listening() as proxy:
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{proxy.port}")
        reading = asyncio.ensure_future(drained(grpc_call(channel, rpc)))
        yield
        proxy.cut()
        with pytest.raises(grpc.aio.AioRpcError) as broken:
            await reading
        assert broken.value.code() is grpc.StatusCode.UNAVAILABLE
        await channel.close()


@asynccontextmanager
async def over_http(server: ServiceServer, gateway: str, rpc: str) -> AsyncIterator[None]:
    """The same as server-sent events; the client's socket is closed."""
    async with httpx.AsyncClient() as client:
        headers = {"accept": "text/event-stream"}
        url = f"{gateway}/{SERVICE.full_name}/{rpc}"
        async with client.stream("POST", url, json=REQUESTS[rpc], headers=headers) as response:
            reading = asyncio.ensure_future(drained(response.aiter_bytes()))
            yield
            reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reading


async def drained(messages: Any) -> None:
    async for _ in messages:
        pass


Client = Callable[[ServiceServer, str, str], AbstractAsyncContextManager[None]]


@pytest.mark.parametrize(
    ("rpc", "client"),
    [
        (rpc, client)
        for rpc in STREAMS
        for client in (over_grpc, cut_off, over_http)
        if client is not over_http or rpc in EXPOSED
    ],
)
async def test_nobody_s_work_is_done(
    server: ServiceServer,
    gateway: str,
    scheduler: Scheduler,
    device: SlowDevice,
    rpc: str,
    client: Client,
) -> None:
    device.seconds = 0.03
    before = None
    for _ in range(3):
        begun = len(device.begun)
        async with client(server, gateway, rpc):
            await until("work", lambda: len(device.begun) >= begun + 3)  # noqa: B023
        await until("the queue is empty", lambda: not scheduler.snapshot())
        done = len(device.begun)
        assert done < begun + PIECES
        await asyncio.sleep(0.1)
        assert len(device.begun) == done
        before = before or Held.now()  # once everything is warm
    assert before
    await until("as much is held as before", lambda: not Held.now().exceeds(before))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        assert (await grpc_call(channel, "Attribute")).rows


async def test_the_streams_are_longer_than_they_are_let(
    server: ServiceServer, device: SlowDevice
) -> None:
    """Who stays gets it all: the test above counts something."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        for rpc in STREAMS:
            device.begun.clear()
            await drained(grpc_call(channel, rpc))
            assert len(device.begun) >= PIECES


@pytest.mark.parametrize("rpc", REQUESTS)
async def test_a_millisecond_is_too_short_and_costs_nothing(
    server: ServiceServer, gateway: str, scheduler: Scheduler, device: SlowDevice, rpc: str
) -> None:
    in_time = {"OK", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"}
    device.seconds = 0.02
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        assert await end_of(grpc_call(channel, rpc)) == "OK"
        ends = [await end_of(grpc_call(channel, rpc, timeout=0.001)) for _ in range(10)]
        assert set(ends) <= in_time
        if device.begun:  # what needs no device may be in time
            assert "OK" not in ends
        async with httpx.AsyncClient() as client:
            for _ in range(5 if rpc in EXPOSED else 0):
                response = await client.post(
                    f"{gateway}/{SERVICE.full_name}/{rpc}",
                    json=REQUESTS[rpc],
                    headers={"accept": "text/event-stream", "connect-timeout-ms": "1"},
                )
                assert code_of(response) in {each.lower() for each in in_time}
        await until("the queue is empty", lambda: not scheduler.snapshot())
        assert await end_of(grpc_call(channel, rpc)) == "OK"


async def end_of(call: Any) -> str:
    try:
        if hasattr(call, "read"):
            await drained(call)
        else:
            await call
    except grpc.aio.AioRpcError as error:
        return str(error.code().name)
    return "OK"


def code_of(response: httpx.Response) -> str:
    """How a call ended: its body's code, or that of a stream's last event."""
    if "event: end" in response.text:
        last = json.loads(response.text.rpartition("data: ")[2])
        return str(last["error"]["code"]) if "error" in last else "ok"
    return "ok" if response.status_code == 200 else str(response.json()["code"])
