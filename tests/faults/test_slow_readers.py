"""Clients that open a stream and do not read: others are served, and what waits for them stays
small."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import grpc
import psutil
import pytest
import pytest_asyncio
import torch
from google.protobuf.json_format import ParseDict
from tdb.inference.v1 import attribute_pb2, run_pb2, service_pb2_grpc
from transformers import GPT2Config, GPT2LMHeadModel

from gateway.app import create_app
from services.common.server import ServiceServer
from services.common.settings import ModelSource, Settings
from services.inference import stream_activations
from services.inference.engine.model import Model
from services.inference.scheduler import Scheduler
from services.inference.server import build_server, load_model
from tests.faults.watching import SlowDevice, until
from tests.gateway.helpers import NOWHERE, listening

TOKENS, LAYERS, HEADS = 256, 8, 4
POINTS = [f"{name}.{layer}" for layer in range(LAYERS) for name in ("attn_scores", "attn_probs")]
POINT_BYTES = 4 * HEADS * TOKENS**2
READERS = 6
RUN = {"prompt": {"tokenIds": {"ids": [number % 60 for number in range(TOKENS)]}}}
STREAM = {"run": RUN, "points": POINTS}
TABLE = {
    "run": {"prompt": {"tokenIds": {"ids": [1, 2, 3]}}},
    "objective": {"logitDiff": {"targets": [{"id": 4}], "distractors": [{"id": 5}]}},
    "topK": 3,
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A model whose attention patterns do not fit into the buffers on the way: 1 MiB each."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=LAYERS, n_head=HEADS, n_embd=16, vocab_size=64, n_positions=TOKENS, bos_token_id=0
    )
    config.eos_token_id = 0
    GPT2LMHeadModel(config).save_pretrained(folder)
    return load_model(ModelSource("wide", str(folder)), None)


@pytest.fixture
def device() -> SlowDevice:
    return SlowDevice()


@pytest_asyncio.fixture
async def scheduler(device: SlowDevice) -> AsyncIterator[Scheduler]:
    scheduler = Scheduler(observer=device)
    yield scheduler
    await asyncio.to_thread(scheduler.close)


@pytest_asyncio.fixture
async def server(wide: Model, scheduler: Scheduler, tmp_path: Path) -> AsyncIterator[ServiceServer]:
    settings = Settings.from_env(
        {
            "TDB_MODEL": "wide=/",
            "TDB_DATA_DIR": str(tmp_path),
            "TDB_DRAIN_SECONDS": "1",
            "TDB_CACHE_MIB": "0",
        }
    )
    async with build_server(settings, scheduler, {"wide": wide}, port=0) as server:
        await server.set_serving()
        yield server


def resident() -> int:
    return int(psutil.Process().memory_info().rss)


async def settled(device: SlowDevice, scheduler: Scheduler) -> int:
    """How much work began, once no more begins."""
    begun = -1
    while begun != len(device.begun) or scheduler.snapshot():
        begun = len(device.begun)
        await asyncio.sleep(0.3)
    return begun


async def others_are_served(server: ServiceServer) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = service_pb2_grpc.InferenceServiceStub(channel)
        for _ in range(5):
            table = await stub.Attribute(ParseDict(TABLE, attribute_pb2.AttributeRequest()))
            assert len(table.rows) == 3


async def test_over_grpc(server: ServiceServer, scheduler: Scheduler, device: SlowDevice) -> None:
    request = ParseDict(STREAM, run_pb2.StreamActivationsRequest())
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = service_pb2_grpc.InferenceServiceStub(channel)
        sent = 0
        async for each in stub.StreamActivations(request):
            sent += len(each.chunk)
        assert sent == len(POINTS) * POINT_BYTES
    all_pieces = len(device.begun)
    # A connection that was read from quickly has larger windows: the slow ones get their own.
    async with grpc.aio.insecure_channel(
        f"127.0.0.1:{server.port}", [("grpc.use_local_subchannel_pool", 1)]
    ) as channel:
        stub = service_pb2_grpc.InferenceServiceStub(channel)
        before = resident()
        device.begun.clear()
        slow = [stub.StreamActivations(request) for _ in range(READERS)]
        readers = [aiter(call) for call in slow]
        for reader in readers:
            await anext(reader)
        await until("all of them run", lambda: len(device.begun) >= READERS)
        begun = await settled(device, scheduler)
        assert begun < READERS * all_pieces * 3 / 4
        assert resident() - before < 2 * READERS * len(POINTS) * POINT_BYTES
        await others_are_served(server)
        rest = [each async for each in readers[0]]  # one of them reads on after all
        assert rest[-1].WhichOneof("event") == "summary"
        for call in slow[1:]:
            call.cancel()
        await until("the queue is empty", lambda: not scheduler.snapshot())
    await others_are_served(server)


async def test_over_http(
    server: ServiceServer, scheduler: Scheduler, device: SlowDevice, tmp_path: Path
) -> None:
    settings = Settings.from_env({"TDB_DATA_DIR": str(tmp_path)})
    app = create_app(settings, {"inference": f"127.0.0.1:{server.port}"}, NOWHERE)
    body = json.dumps(STREAM).encode()
    head = (
        "POST /tdb.inference.v1.InferenceService/StreamActivations HTTP/1.1\r\n"
        "host: localhost\r\ncontent-type: application/json\r\naccept: text/event-stream\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    ).encode()
    async with listening(app) as url:
        port = urlsplit(url).port
        before = resident()
        sockets = [socket.create_connection(("127.0.0.1", port)) for _ in range(READERS)]
        for each in sockets:
            each.sendall(head + body)
        await until("all of them run", lambda: len(device.begun) >= READERS)
        begun = await settled(device, scheduler)
        assert begun < READERS * (len(POINTS) + 1) * 3 / 4
        assert resident() - before < 2 * READERS * len(POINTS) * POINT_BYTES
        await others_are_served(server)
        for each in sockets:
            each.close()
        await until("the queue is empty", lambda: not scheduler.snapshot())
    await others_are_served(server)


async def test_what_open_streams_keep_is_bounded(
    server: ServiceServer, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = len(POINTS) * POINT_BYTES
    monkeypatch.setattr(stream_activations, "MAX_HELD_BYTES", 2 * one)
    request = ParseDict(STREAM, run_pb2.StreamActivationsRequest())
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = service_pb2_grpc.InferenceServiceStub(channel)
        slow = [stub.StreamActivations(request) for _ in range(2)]
        for call in slow:
            await call.read()
        with pytest.raises(grpc.aio.AioRpcError, match="try again once they are read") as refused:
            await stub.StreamActivations(request).read()
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        trailers = dict(refused.value.trailing_metadata() or ())
        assert trailers["grpc-retry-pushback-ms"] == "5000"
        slow[0].cancel()
        while True:  # gone at the server a moment later
            call = stub.StreamActivations(request)
            try:
                await call.read()
                break
            except grpc.aio.AioRpcError:
                await asyncio.sleep(0.02)
        slow[1].cancel()
        call.cancel()
        await until("the queue is empty", lambda: not scheduler.snapshot())
