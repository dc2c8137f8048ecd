"""A dataset service that is killed again and again while it builds.

Each goes on by itself with what the last left, and what comes out is the same to the byte.
"""

import asyncio
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import grpc.aio
import pytest
from tdb.dataset.v1 import dataset_pb2, service_pb2_grpc

from services.common.server import ServiceServer
from tests.dataset.building import helpers

ROOT = Path(__file__).parents[3]
REQUEST = helpers.request(tokens=900, segmentTokens=60, groups=["neuron", "head.0"])


class Process:
    """`python -m services.dataset`, listening."""

    def __init__(self, data: Path, inference_port: int) -> None:
        env = {name: value for name, value in os.environ.items() if not name.startswith("TDB_")}
        env |= {
            "PYTHONPATH": f"{ROOT}:{ROOT / 'client'}",
            "TDB_DATA_DIR": str(data),
            "TDB_DATASET_PORT": "0",
            "TDB_INFERENCE_PORT": str(inference_port),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "services.dataset"],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self.port = 0

    async def listening(self) -> None:
        assert self._process.stdout is not None
        line = await asyncio.to_thread(self._process.stdout.readline)
        self.port = json.loads(line)["port"]

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


async def begin(port: int) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = service_pb2_grpc.DatasetServiceStub(channel)
        await anext(aiter(stub.BuildDataset(REQUEST, wait_for_ready=True)))


async def is_finished(port: int) -> bool:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = service_pb2_grpc.DatasetServiceStub(channel)
        listed = await stub.ListDatasets(dataset_pb2.ListDatasetsRequest(), wait_for_ready=True)
        for each in listed.builds:
            assert each.state != dataset_pb2.BUILD_STATE_FAILED, each.message
        return bool(listed.datasets)


def segments(folder: Path) -> int:
    """How many are whole."""
    try:
        checkpoint = json.loads((folder / "building" / "checkpoint.json").read_bytes())
    except FileNotFoundError:
        return 0
    return int(checkpoint["segments"])


async def has_got_on(folder: Path, by: int) -> None:
    """Until so many more segments are whole, or everything is."""
    start, end = segments(folder), time.monotonic() + 60
    while segments(folder) < start + by and not (folder / "manifest.json").exists():
        assert time.monotonic() < end, "the build does not get on"
        await asyncio.sleep(0.01)


async def kill_and_resume(data: Path, inference: ServiceServer, kills: int) -> None:
    wanted = await helpers.built_by(data, inference, REQUEST)
    broken = data.parent / "broken"
    (broken / "corpora").mkdir(parents=True)
    corpus, copy = (each / "corpora" / "news.jsonl" for each in (data, broken))
    copy.write_bytes(corpus.read_bytes())
    left = broken / "datasets" / "built"
    moments = random.Random(3)
    killed, stages = 0, set()
    while killed < kills:
        process = Process(broken, inference.port)
        try:
            await process.listening()
            if not left.exists():
                await begin(process.port)
            await has_got_on(left, moments.randint(0, 4))
            await asyncio.sleep(moments.uniform(0, 0.15))
        finally:
            process.kill()
        killed += 1
        if (left / "manifest.json").exists():
            check(left, wanted)
            stages.add("manifest")
            shutil.rmtree(left)
        else:
            stages.add(str(segments(left)))
    assert len(stages) > 1, f"it was always killed at the same place: {stages}"
    process = Process(broken, inference.port)
    try:
        await process.listening()
        if not left.exists():
            await begin(process.port)
        end = time.monotonic() + 120
        while not await is_finished(process.port):
            assert time.monotonic() < end, "the build does not end"
            await asyncio.sleep(0.05)
    finally:
        process.kill()
    check(left, wanted)


def check(folder: Path, wanted: dict[str, bytes]) -> None:
    """Every file is as an uninterrupted build leaves it."""
    for name, content in wanted.items():
        assert (folder / name).read_bytes() == content, f"{name} is another"


async def test_a_few_kills(data: Path, inference: ServiceServer) -> None:
    await kill_and_resume(data, inference, 3)


@pytest.mark.long
async def test_twenty_kills(data: Path, inference: ServiceServer) -> None:
    await kill_and_resume(data, inference, 20)
