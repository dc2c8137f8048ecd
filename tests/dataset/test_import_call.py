"""ImportDataset: from allowed places only, resumable, with its progress."""

import asyncio
import gzip
import json
import shutil
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.json_format import ParseDict
from tdb.dataset.v1 import import_pb2, read_pb2

from services.dataset.importers import importing, openai_records
from tests.dataset import helpers, openai_writer, range_server
from tests.dataset.openai_writer import NeuronId, NeuronRecord
from tests.dataset.range_server import Server
from tests.dataset.test_neuronpedia_export import explanation, feature, sequence, write
from tests.dataset.test_openai_remote import NEURON
from tests.dataset.test_service import refusal


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder with two records in `imports` and one in an allowed place outside."""
    data = tmp_path / "data"
    openai_writer.write(data / "imports" / "neurons", NEURON)
    openai_writer.write(data / "imports" / "neurons", NeuronRecord(NeuronId(6, 0)))
    openai_writer.write(tmp_path / "allowed" / "deep", NEURON)
    openai_writer.write(tmp_path / "secret", NEURON)
    (data / "datasets").mkdir()
    return data


@pytest.fixture
def bucket(tmp_path: Path) -> Iterator[Server]:
    folder = tmp_path / "bucket" / "m" / "10-res-jb"
    write(folder / "features" / "batch-0.jsonl.gz", [feature(0)])
    write(folder / "features" / "batch-1.jsonl.gz", [feature(1)])
    write(folder / "activations" / "batch-0.jsonl.gz", [sequence(0, [1.0]), sequence(1, [2.0])])
    write(folder / "explanations" / "batch-0.jsonl.gz", [explanation(1, "one")])
    with range_server.serving(tmp_path / "bucket") as server:
        yield server


@pytest.fixture
async def stub(data: Path, tmp_path: Path, bucket: Server) -> AsyncIterator[Any]:
    places = f"ours={tmp_path / 'allowed'},far={bucket.url}"
    async with helpers.connected(
        data / "datasets", TDB_DATA_DIR=str(data), TDB_IMPORT_SOURCES=places
    ) as stub:
        yield stub


NEURONS = {"openai": {"components": "neuron", "model": "gpt2"}}


async def run(stub: Any, **fields: Any) -> list[import_pb2.ImportDatasetResponse]:
    request = ParseDict({"dataset": "d", **fields}, import_pb2.ImportDatasetRequest())
    return [response async for response in stub.ImportDataset(request)]


async def refused(stub: Any, **fields: Any) -> tuple[str, list[str], str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await run(stub, **fields)
    return refusal(caught.value)


async def test_a_folder_becomes_a_dataset(stub: Any) -> None:
    *progress, last = await run(stub, path="neurons", **NEURONS)
    assert last.dataset.name == "d"
    assert last.dataset.records == 2
    steps = [(each.progress.group, each.progress.done, each.progress.total) for each in progress]
    assert steps == [("neuron.5", 1, 1), ("neuron.6", 1, 1)]
    request = read_pb2.GetRecordRequest(dataset="d", component="neuron.5.131")
    assert (await stub.GetRecord(request)).record.statistics.max == 4
    assert (await refused(stub, path="neurons", **NEURONS))[0] == "FAILED_PRECONDITION"
    await run(stub, dataset="other", place="ours", path="deep", **NEURONS)


@pytest.mark.parametrize(
    ("fields", "code", "field"),
    [
        ({**NEURONS, "path": "../datasets"}, "INVALID_ARGUMENT", "path"),
        ({**NEURONS, "path": "neurons/../../.."}, "INVALID_ARGUMENT", "path"),
        ({**NEURONS, "path": "/etc"}, "INVALID_ARGUMENT", "path"),
        ({**NEURONS, "path": "a\\b"}, "INVALID_ARGUMENT", "path"),
        ({**NEURONS, "path": "nowhere"}, "NOT_FOUND", "path"),
        ({**NEURONS, "path": "link"}, "NOT_FOUND", "path"),
        ({**NEURONS, "path": "neurons/5/131.json"}, "NOT_FOUND", "path"),
        ({**NEURONS, "place": "http://169.254.169.254"}, "INVALID_ARGUMENT", "place"),
        ({**NEURONS, "place": "/etc"}, "INVALID_ARGUMENT", "place"),
        ({**NEURONS, "place": "far"}, "FAILED_PRECONDITION", "place"),
        ({"neuronpedia": {}, "place": "far", "path": "http://h"}, "INVALID_ARGUMENT", "path"),
        ({"neuronpedia": {}, "place": "far", "path": "../x"}, "INVALID_ARGUMENT", "path"),
        ({"neuronpedia": {}, "place": "far", "path": "nowhere"}, "NOT_FOUND", "path"),
        ({**NEURONS, "dataset": "../x"}, "INVALID_ARGUMENT", "dataset"),
        ({}, "INVALID_ARGUMENT", "format"),
        ({"openai": {"model": "m"}}, "INVALID_ARGUMENT", "openai.components"),
        ({"openai": {"components": "neuron"}}, "INVALID_ARGUMENT", "openai.model"),
        (
            {"openai": {"components": "latent", "model": "m"}},
            "INVALID_ARGUMENT",
            "openai.dictionary",
        ),
    ],
)
async def test_nothing_else_can_be_reached(
    stub: Any, data: Path, tmp_path: Path, fields: dict[str, Any], code: str, field: str
) -> None:
    (data / "imports" / "link").symlink_to(tmp_path / "secret")
    assert (await refused(stub, **fields))[:2] == (code, [field])
    assert list((data / "datasets").iterdir()) == []


async def test_an_export_is_fetched_and_imported(stub: Any, bucket: Server, data: Path) -> None:
    *progress, last = await run(stub, place="far", path="m/10-res-jb", neuronpedia={})
    assert [each.progress.phase for each in progress] == ["fetching"] * 4 + ["writing"]
    assert last.dataset.groups[0].name == "latent.10-res-jb"
    assert last.dataset.records == 2
    line = (data / "datasets" / "d" / "explanations.jsonl").read_text()
    assert json.loads(line)["text"] == "one"
    assert list((data / "imports" / ".fetched").iterdir()) == []


async def test_what_was_fetched_before_a_failure_is_not_fetched_again(
    stub: Any, bucket: Server, data: Path
) -> None:
    bucket.status = lambda name: 503 if "activations" in name else None
    code, _, _ = await refused(stub, place="far", path="m/10-res-jb", neuronpedia={})
    assert code == "UNAVAILABLE"
    bucket.status = lambda name: 302 if "activations" in name else None
    code, _, _ = await refused(stub, place="far", path="m/10-res-jb", neuronpedia={})
    assert code == "FAILED_PRECONDITION"
    bucket.status = lambda name: None
    bucket.asked.clear()
    await run(stub, place="far", path="m/10-res-jb", neuronpedia={})
    names = [each.name for each in bucket.asked]
    assert "m/10-res-jb/features/batch-0.jsonl.gz" not in names
    assert "m/10-res-jb/activations/batch-0.jsonl.gz" in names


async def test_a_wrong_file_is_named_and_the_import_can_go_on(stub: Any, data: Path) -> None:
    path = data / "imports" / "neurons" / "6" / "0.json"
    content = path.read_bytes()
    path.write_bytes(gzip.compress(content))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await run(stub, path="neurons", **NEURONS)
    assert "6/0.json" in (caught.value.details() or "")


async def test_a_caller_that_leaves_stops_the_import_which_then_goes_on(
    stub: Any, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[int] = []
    first = threading.Event()
    left = threading.Event()
    original = openai_records.parse

    def slow(content: bytes, group: Any, index: int) -> Any:
        parsed.append(index)
        if len(parsed) == 2:
            first.set()
            left.wait(10)
        return original(content, group, index)

    monkeypatch.setattr(openai_records, "parse", slow)
    request = ParseDict(
        {"dataset": "d", "path": "neurons", **NEURONS}, import_pb2.ImportDatasetRequest()
    )
    call = stub.ImportDataset(request)
    reading = asyncio.ensure_future(call.read())
    await asyncio.to_thread(first.wait, 10)
    await reading
    busy = await refused(stub, dataset="other", path="neurons", **NEURONS)
    assert busy[0] == "RESOURCE_EXHAUSTED"
    call.cancel()
    await asyncio.sleep(0.2)
    left.set()
    for _ in range(200):
        if (await refused_or_done(stub)) == "OK":
            break
        await asyncio.sleep(0.05)
    assert parsed == [131, 0, 0], "the first shard is not read again"


async def refused_or_done(stub: Any) -> str:
    try:
        *_, last = await run(stub, path="neurons", **NEURONS)
    except grpc.aio.AioRpcError as error:
        return str(error.code().name)
    assert last.dataset.records == 2
    return "OK"


async def test_a_full_disk_is_said_before_work_starts(
    stub: Any, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(data)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    assert (await refused(stub, path="neurons", **NEURONS))[2] == "DISK_FULL"
    code, _, reason = await refused(stub, place="far", path="m/10-res-jb", neuronpedia={})
    assert (code, reason) == ("FAILED_PRECONDITION", "DISK_FULL")
    assert importing.ROOM_LEFT_BYTES > 0


async def test_the_cap_on_all_datasets_is_held_before_work_starts(data: Path) -> None:
    (data / "datasets" / "other").mkdir()
    (data / "datasets" / "other" / "x.records").write_bytes(bytes(2**20 - 10))
    variables = {"TDB_DATA_DIR": str(data), "TDB_DATASETS_MIB": "1"}
    async with helpers.connected(data / "datasets", **variables) as stub:
        assert (await refused(stub, path="neurons", **NEURONS))[2] == "STORE_FULL"
        assert not (data / "datasets" / "d").exists()
        shutil.rmtree(data / "datasets" / "other")
        assert await refused_or_done(stub) == "OK"
