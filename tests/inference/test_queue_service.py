"""The queue as callers see it over real gRPC: places in streams and manifests, GetQueue, a lost
device."""

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from google.protobuf.json_format import ParseDict
from tdb.inference.v1 import generate_pb2, queue_pb2, run_pb2, service_pb2_grpc

from services.common.settings import Settings
from services.inference.engine.cancellation import CancelToken
from services.inference.engine.model import Model
from services.inference.scheduler import Scheduler
from services.inference.server import build_server
from services.inference.task import Task
from tests.inference.test_refusals import OBJECTIVE, RUN
from tests.inference.test_service import attribute
from tests.inference.test_verify_service import request as verify_request

if TYPE_CHECKING:  # the stubs name it, the generated module does not
    from tdb.inference.v1.service_pb2_grpc import InferenceServiceAsyncStub as Stub


class Busy:
    """A device that is held until told otherwise."""

    def __init__(self) -> None:
        self._began, self.released = threading.Event(), threading.Event()

    def __call__(self, cancel: CancelToken) -> None:
        self._began.set()
        assert self.released.wait(10)

    async def begun(self) -> None:
        await asyncio.to_thread(self._began.wait, 10)


@pytest_asyncio.fixture
async def busy(scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Busy]:
    monkeypatch.setattr("services.inference.scheduler.PLACES_EVERY_S", 0.02)
    busy = Busy()
    running = asyncio.ensure_future(scheduler.submit(busy, Task("Load")))
    await busy.begun()
    yield busy
    busy.released.set()
    await running


async def queued(stub: "Stub", count: int) -> list[queue_pb2.QueueEntry]:
    """What GetQueue says, once so many pieces of work are there."""
    while True:
        entries = (await stub.GetQueue(queue_pb2.GetQueueRequest())).entries
        if len(entries) >= count:
            return list(entries)
        await asyncio.sleep(0.01)


async def test_get_queue_says_who_waits_for_what(stub: "Stub", busy: Busy) -> None:
    sweep = stub.Verify(verify_request({"topK": 3}))
    reading = asyncio.ensure_future(sweep.read())
    await queued(stub, 2)
    click = asyncio.ensure_future(
        stub.Attribute(attribute(), metadata=(("x-request-id", "click-1"),))
    )
    running, first, second = await queued(stub, 3)
    assert (running.kind, running.running, running.user, running.method) == ("Load", True, "", "")
    assert first.method == "tdb.inference.v1.InferenceService/Attribute"
    assert (first.user, first.request_id, first.running) == ("local", "click-1", False)
    assert (first.queue.priority, first.queue.position) == (queue_pb2.PRIORITY_INTERACTIVE, 1)
    assert second.method == "tdb.inference.v1.InferenceService/Verify"
    assert (second.queue.priority, second.queue.position) == (queue_pb2.PRIORITY_BULK, 2)
    assert second.waited_ms >= first.waited_ms > 0
    busy.released.set()
    await click
    await reading
    sweep.cancel()


async def test_an_empty_queue_is_empty(stub: "Stub") -> None:
    await stub.Attribute(attribute())
    assert not (await stub.GetQueue(queue_pb2.GetQueueRequest())).entries


STREAMS = {
    "Verify": verify_request({"topK": 3}),
    "Generate": ParseDict({"run": RUN, "maxNewTokens": 2}, generate_pb2.GenerateRequest()),
    "StreamActivations": ParseDict(
        {"run": RUN, "points": ["resid_post.0"]}, run_pb2.StreamActivationsRequest()
    ),
}


@pytest.mark.parametrize("method", STREAMS)
async def test_a_stream_that_waits_says_where_it_stands(
    stub: "Stub", busy: Busy, method: str
) -> None:
    stream = getattr(stub, method)(STREAMS[method])
    places, last = [], None
    async for response in stream:
        last = response
        if response.WhichOneof("event") == "progress" and response.progress.HasField("queue"):
            places.append(response.progress.queue)
            busy.released.set()
    assert len(places) == 1
    assert places[0].position == 1
    bulk = method == "Verify"
    assert (places[0].priority == queue_pb2.PRIORITY_BULK) is bulk
    assert last is not None
    timings = last.summary.manifest.timings
    assert timings.queue.position == 1
    assert timings.queue_ms > 0


async def test_manifests_say_how_the_device_was_shared(stub: "Stub") -> None:
    timings = (await stub.Attribute(attribute())).manifest.timings
    assert (timings.queue.priority, timings.queue.position) == (queue_pb2.PRIORITY_INTERACTIVE, 0)
    assert timings.shared_by == 1


async def test_one_users_sweep_leaves_anothers_clicks_alone(
    model: Model, model_folder: Path, scheduler: Scheduler, tmp_path: Path
) -> None:
    """With tokens, users are told apart; of 30 nodes in a running sweep few come before a click."""
    settings = Settings.from_env(
        {
            "TDB_MODEL": f"tiny={model_folder}",
            "TDB_DATA_DIR": str(tmp_path),
            "TDB_TOKENS": "ada:one,bob:two",
        }
    )
    table: dict[str, Any] = {"run": RUN, "objective": OBJECTIVE, "topK": 30}
    async with (
        build_server(settings, scheduler, {"tiny": model}, port=0) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        stub: Stub = service_pb2_grpc.InferenceServiceStub(channel)
        ada, bob = ((("authorization", f"Bearer {token}"),) for token in ("one", "two"))
        sweeps = [stub.Verify(verify_request(table), metadata=ada) for _ in range(8)]
        ends = [asyncio.ensure_future(_drained(sweep)) for sweep in sweeps]
        click = await stub.Attribute(attribute(), metadata=bob)
        # Eight sweeps are under way; no more than the slice that ran went first.
        assert click.manifest.timings.queue.position <= 1
        assert sum(end.done() for end in ends) < 8
        await asyncio.gather(*ends)


async def _drained(call: Any) -> int:
    return sum([1 async for _ in call])


LOSING = """
import sys
from services.inference.engine.model import Model
from services.inference.server import main

def lose(*_, **__):
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

Model.run = lose
Model.run_many = lose
sys.exit(main())
"""


@pytest.fixture
def losing(model_folder: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """The service as a process whose device is lost at the first Run."""
    environment = {
        "TDB_MODEL": f"tiny={model_folder}",
        "TDB_INFERENCE_PORT": "0",
        "TDB_DATA_DIR": str(tmp_path),
    }
    process = subprocess.Popen(
        [sys.executable, "-c", LOSING],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    yield process
    process.kill()
    process.communicate()


async def test_a_lost_device_ends_the_process(losing: subprocess.Popen[str]) -> None:
    assert losing.stdout
    port = json.loads(await asyncio.to_thread(losing.stdout.readline))["port"]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub: Stub = service_pb2_grpc.InferenceServiceStub(channel)
        request = ParseDict({"run": RUN}, run_pb2.RunRequest())
        message = "loading"
        while "loading" in message:
            await asyncio.sleep(0.05)
            with pytest.raises(grpc.aio.AioRpcError) as refusal:
                await stub.Run(request, wait_for_ready=True)
            assert refusal.value.code() is grpc.StatusCode.UNAVAILABLE
            message = refusal.value.details() or ""
        assert "device failed" in message
    _, errors = await asyncio.to_thread(losing.communicate, None, 20)
    assert losing.returncode == 1
    assert errors.splitlines()[-1].startswith("the device failed")
