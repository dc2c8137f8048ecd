"""A dataset of any size in bounded memory: the service is a process whose memory is watched."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import psutil
import pytest
from tdb.dataset.v1 import dataset_pb2, read_pb2, record_pb2, search_pb2, service_pb2_grpc

from services.common.addresses import Kind
from services.dataset.groups import Group
from services.dataset.store import DatasetWriter
from tests.dataset import helpers

ROOT = Path(__file__).parents[2]
SHARD = 4096
BOUND_MIB = 100
"""What a service may grow by, whatever it reads."""


@contextmanager
def service(data: Path) -> Iterator[tuple[service_pb2_grpc.DatasetServiceStub, psutil.Process]]:
    env = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'client'}",
        "TDB_DATASET_PORT": "0",
        "TDB_DATA_DIR": str(data),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "services.dataset"],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        port = json.loads(process.stdout.readline())["port"]
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield service_pb2_grpc.DatasetServiceStub(channel), psutil.Process(process.pid)
    finally:
        process.terminate()
        process.communicate()


def build(folder: Path, count: int) -> None:
    group = Group(Kind.LATENT, dictionary="d")
    record = record_pb2.ComponentRecord()
    record.top.add(token_ids=[1, 2, 3, 4], activations=[0.5, 2.0, 0.0, 0.25])

    def made(indices: range) -> Iterator[record_pb2.ComponentRecord]:
        for index in indices:
            record.component = group.component(index)
            record.top[0].token_ids[1] = index % 1000
            record.statistics.max = index
            yield record

    with DatasetWriter(folder, helpers.header()) as writer:
        for part, start in enumerate(range(0, count, SHARD)):
            writer.write(group, part, made(range(start, min(start + SHARD, count))))
        writer.finish()


def check(data: Path, count: int) -> None:
    writer = psutil.Process()
    before = writer.memory_info().rss
    build(data / "datasets" / "many", count)
    assert writer.memory_info().rss - before < BOUND_MIB * 2**20, "writing"
    with service(data) as (stub, process):
        (listed,) = stub.ListDatasets(dataset_pb2.ListDatasetsRequest()).datasets
        assert listed.records == count
        start = process.memory_info().rss
        highest = start
        seen = 0
        for response in stub.StreamRecords(read_pb2.StreamRecordsRequest(dataset="many")):
            for record in response.batch.records:
                assert record.component == f"latent.d.{seen}"
                seen += 1
            highest = max(highest, process.memory_info().rss)
        assert seen == count
        for index in range(0, count, max(1, count // 500)):
            request = read_pb2.GetRecordRequest(dataset="many", component=f"latent.d.{index}")
            assert stub.GetRecord(request).record.statistics.max == index
        found = stub.Search(
            search_pb2.SearchRequest(
                dataset="many",
                ranges=[search_pb2.StatisticRange(statistic=search_pb2.STATISTIC_MAX, at_least=7)],
                order_by=search_pb2.STATISTIC_MAX,
                limit=3,
            )
        )
        assert found.candidates == count - 7
        assert [each.component for each in found.components] == [
            f"latent.d.{count - 1 - number}" for number in range(3)
        ]
        highest = max(highest, process.memory_info().rss)
        assert highest - start < BOUND_MIB * 2**20, "serving"


def test_twenty_thousand_records(tmp_path: Path) -> None:
    check(tmp_path, 20_000)


@pytest.mark.long
def test_a_million_records(tmp_path: Path) -> None:
    check(tmp_path, 1_000_000)
