"""The dataset service over real gRPC: what it sends, where a stream goes on, what it refuses."""

import asyncio
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2
from tdb.dataset.v1 import dataset_pb2, read_pb2, record_pb2, service_pb2_grpc

from services.dataset import servicer
from services.dataset.library import Library
from services.dataset.reader import DatasetReader
from tests.dataset import helpers

RECORDS = helpers.random_records(2, helpers.COMPONENTS)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("datasets")
    helpers.write(folder / "small", RECORDS)
    return folder


def refusal(error: grpc.aio.AioRpcError) -> tuple[str, list[str], str]:
    """Code, field paths, reason."""
    trailers = dict(error.trailing_metadata() or ())
    status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    fields: list[str] = []
    reason = ""
    for detail in status.details:
        bad, info = error_details_pb2.BadRequest(), error_details_pb2.ErrorInfo()
        if detail.Unpack(bad):
            fields += [violation.field for violation in bad.field_violations]
        if detail.Unpack(info):
            reason = info.reason
    return error.code().name, fields, reason


async def collect(
    stub: Any, **request: Any
) -> tuple[list[record_pb2.ComponentRecord], list[read_pb2.RecordBatch], Any]:
    records: list[record_pb2.ComponentRecord] = []
    batches: list[read_pb2.RecordBatch] = []
    summary = None
    async for response in stub.StreamRecords(read_pb2.StreamRecordsRequest(**request)):
        assert summary is None, "the summary comes last"
        if response.WhichOneof("event") == "batch":
            batches.append(response.batch)
            records += response.batch.records
        else:
            summary = response.summary
    assert summary is not None
    return records, batches, summary


def ranged(first: str, last: str) -> read_pb2.Selection:
    return read_pb2.Selection(range=read_pb2.ComponentRange(first=first, last=last))


def single(component: str) -> read_pb2.Selection:
    return read_pb2.Selection(component=component)


async def test_what_is_there_is_listed(library: Path) -> None:
    async with helpers.connected(library) as stub:
        listed = await stub.ListDatasets(dataset_pb2.ListDatasetsRequest())
    (dataset,) = listed.datasets
    assert not listed.unreadable
    assert (dataset.name, dataset.records) == ("small", len(RECORDS))
    assert dataset.header == helpers.header()
    assert dataset.has_token_ids
    assert dataset.has_vocabulary
    files = [path for path in (library / "small").iterdir() if path.name != "manifest.json"]
    assert dataset.bytes == sum(path.stat().st_size for path in files)
    groups = [(each.name, each.records, each.first, each.last) for each in dataset.groups]
    assert groups == [
        ("neuron.0", 20, 0, 19),
        ("neuron.1", 6, 0, 19),
        ("neuron.10", 3, 0, 2),
        ("head.0", 4, 0, 3),
        ("latent.demo-mlp-2", 10, 0, 9),
    ]


async def test_each_record_comes_with_its_texts(library: Path) -> None:
    async with helpers.connected(library) as stub:
        for record in RECORDS:
            request = read_pb2.GetRecordRequest(dataset="small", component=record.component)
            response = await stub.GetRecord(request)
            assert response.record == helpers.with_texts(record)
            assert len(response.manifest_hash) == 64


async def test_a_stream_sends_everything_in_order(library: Path) -> None:
    async with helpers.connected(library) as stub:
        records, batches, summary = await collect(stub, dataset="small")
        assert records == RECORDS
        assert summary.records == len(RECORDS)
        assert summary.damaged == 0
        assert batches[-1].done == batches[-1].total == len(RECORDS)
        records, _, _ = await collect(stub, dataset="small", token_texts=True)
        assert records == [helpers.with_texts(record) for record in RECORDS]


async def test_ranges_and_lists_are_sent_as_asked(library: Path) -> None:
    by_name = {record.component: record for record in RECORDS}
    wanted = [
        (single("latent.demo-mlp-2.3"), ["latent.demo-mlp-2.3"]),
        (ranged("neuron.1.1", "neuron.1.8"), [f"neuron.1.{n}" for n in (1, 2, 7, 8)]),
        (ranged("neuron.1.3", "neuron.1.6"), None),
        (ranged("neuron.0.18", "neuron.10.0"), [
            "neuron.0.18", "neuron.0.19", *(f"neuron.1.{n}" for n in (0, 1, 2, 7, 8, 19)),
            "neuron.10.0",
        ]),
        (ranged("head.0.1", "head.0.1"), ["head.0.1"]),
        (single("neuron.0.0"), ["neuron.0.0"]),
        (single("neuron.0.0"), ["neuron.0.0"]),
    ]  # fmt: skip
    async with helpers.connected(library) as stub:
        for selection, names in wanted:
            if names is None:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await collect(stub, dataset="small", selections=[selection])
                assert refusal(caught.value)[:2] == ("NOT_FOUND", ["selections[0].range"])
                continue
            records, _, _ = await collect(stub, dataset="small", selections=[selection])
            assert records == [by_name[name] for name in names]
        selections = [selection for selection, names in wanted if names]
        records, _, _ = await collect(stub, dataset="small", selections=selections)
        assert records == [by_name[name] for _, names in wanted for name in names or ()]


async def test_a_stream_goes_on_from_any_cursor_without_loss_or_repetition(
    library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.dataset.reader.DatasetReader.batch_records", 3)
    selections = [
        ranged("neuron.0.3", "neuron.10.1"),
        single("head.0.2"),
        ranged("head.0.0", "head.0.3"),
    ]
    async with helpers.connected(library) as stub:
        for request in ({}, {"selections": selections}):
            whole, batches, _ = await collect(stub, dataset="small", **request)
            assert len(batches) > 5
            seen = 0
            for batch in batches:
                seen += len(batch.records)
                assert batch.done == seen
                rest, _, summary = await collect(
                    stub, dataset="small", cursor=batch.cursor, **request
                )
                assert whole[:seen] + rest == whole
                assert summary.records == len(rest)
        # The form is not part of what a cursor belongs to.
        rest, _, _ = await collect(
            stub, dataset="small", cursor=batches[0].cursor, selections=selections, token_texts=True
        )
        assert rest == [helpers.with_texts(record) for record in whole[3:]]


async def test_batches_are_bounded_in_bytes(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    largest = max(record.ByteSize() for record in RECORDS)
    monkeypatch.setattr("services.dataset.batches.MOST_BYTES", 2 * largest)
    async with helpers.connected(library) as stub:
        records, batches, _ = await collect(stub, dataset="small")
        assert records == RECORDS
        assert len(batches) > 5
        for batch in batches:
            assert sum(record.ByteSize() for record in batch.records) < 3 * largest
        monkeypatch.setattr("services.dataset.batches.MOST_BYTES", 1)
        records, batches, _ = await collect(stub, dataset="small")
        assert records == RECORDS
        assert len(batches) == len(RECORDS)


LARGE = 100
"""Records of 140 kB: four of them are a batch."""
AHEAD = 24
"""Records that may be read before they are taken: two batches on their way, two in the making, and
room. However slow or fast anybody is, there are never more."""


@asynccontextmanager
async def slow_reader(folder: Path, read: list[int]) -> AsyncIterator[Any]:
    """A stream of LARGE records whose client takes only what it asks for: nothing in between grows
    with the speed of the machine. `read` gets the places that the service reads."""
    (record,) = helpers.random_records(3, ["neuron.0.0"], tokens=1024, examples=20)
    records = []
    for index in range(LARGE):
        records.append(record_pb2.ComponentRecord())
        records[-1].CopyFrom(record)
        records[-1].component = f"neuron.0.{index}"
    helpers.write(folder / "wide", records, part_size=40)
    original = DatasetReader.read_many

    def counted(self: Any, place: int, count: int, most_bytes: int) -> Any:
        for number, item in enumerate(original(self, place, count, most_bytes)):
            read.append(place + number)
            yield item

    options = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65_536))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(DatasetReader, "read_many", counted)
        async with (
            helpers.serving(folder) as server,
            grpc.aio.insecure_channel(f"127.0.0.1:{server.port}", options) as channel,
        ):
            stub = service_pb2_grpc.DatasetServiceStub(channel)
            yield stub.StreamRecords(read_pb2.StreamRecordsRequest(dataset="wide"))


async def comes_to_rest(read: list[int]) -> None:
    """Until nothing was read for a while. On a slow machine that may be too early, which makes the
    tests weaker there and never wrong."""
    before = -1
    while before != len(read):
        before = len(read)
        await asyncio.sleep(0.3)


async def test_a_slow_reader_holds_back_the_service(tmp_path: Path) -> None:
    read: list[int] = []
    taken = 0
    async with slow_reader(tmp_path, read) as call:
        for _ in range(3):
            response = await call.read()
            taken += len(response.batch.records)
            await comes_to_rest(read)
            assert taken <= len(read) <= taken + AHEAD
        call.cancel()
    # The service has ended, so nothing is read any more.
    assert read == [*range(len(read))]
    assert len(read) <= taken + AHEAD


async def test_a_service_that_reads_everything_first_would_be_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def all_at_once(*of: Any) -> Any:
        return iter(list(batches_of(*of)))

    batches_of = servicer._batches
    monkeypatch.setattr(servicer, "_batches", all_at_once)
    read: list[int] = []
    async with slow_reader(tmp_path, read) as call:
        response = await call.read()
        assert len(read) == LARGE > len(response.batch.records) + AHEAD
        call.cancel()


async def test_damage_is_reported_and_the_rest_is_sent(tmp_path: Path) -> None:
    helpers.write(tmp_path / "hurt", RECORDS)
    path = tmp_path / "hurt" / "neuron.0.00001.records"
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(content)
    (tmp_path / "hurt" / "head.0.00000.index").unlink()
    broken = ["neuron.0.7", *(f"head.0.{index}" for index in range(4))]
    async with helpers.connected(tmp_path) as stub:
        records, batches, summary = await collect(stub, dataset="hurt")
        assert records == [record for record in RECORDS if record.component not in broken]
        damaged = [each for batch in batches for each in batch.damaged]
        assert [each.component for each in damaged] == broken
        assert [each.file for each in damaged] == [path.name, *["head.0.00000.index"] * 4]
        assert "does not match its checksum" in damaged[0].reason
        assert "is missing" in damaged[1].reason
        assert summary.damaged == len(broken)
        for component in broken:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.GetRecord(read_pb2.GetRecordRequest(dataset="hurt", component=component))
            code, _, reason = refusal(caught.value)
            assert (code, reason) == ("FAILED_PRECONDITION", "DAMAGED")
            assert component in str(caught.value.details())
        (tmp_path / "hurt" / "manifest.json").write_text("{}")
        listed = await stub.ListDatasets(dataset_pb2.ListDatasetsRequest())
        assert not listed.datasets
        assert [each.name for each in listed.unreadable] == ["hurt"]
        assert "manifest.json is damaged" in listed.unreadable[0].reason


async def test_what_is_no_record_is_damage_whatever_its_checksum_says(tmp_path: Path) -> None:
    helpers.write(tmp_path / "hurt", RECORDS)
    path = tmp_path / "hurt" / "neuron.0.00000.index"
    index = bytearray(path.read_bytes())
    offsets = np.frombuffer(index, "<u8", 8, 48)
    data = bytearray(path.with_suffix(".records").read_bytes())
    start, stop = int(offsets[2]), int(offsets[3])
    fake = zlib.compress(
        b"\x0a\x0aneuron.0.2\x12\xff\xff\xff" + RECORDS[2].SerializeToString()[:90]
    )
    data[start:stop] = fake.ljust(stop - start, b"\0")[: stop - start]
    path.with_suffix(".records").write_bytes(data)
    checksums = 48 + 8 * 8
    index[checksums + 8 : checksums + 12] = zlib.crc32(data[start:stop]).to_bytes(4, "little")
    index[-4:] = zlib.crc32(index[:-4]).to_bytes(4, "little")
    path.write_bytes(index)
    rest = [record for record in RECORDS if record.component != "neuron.0.2"]
    async with helpers.connected(tmp_path) as stub:
        for texts in (False, True):
            records, batches, _ = await collect(stub, dataset="hurt", token_texts=texts)
            wanted = [helpers.with_texts(record) for record in rest] if texts else rest
            assert records == wanted
            (damaged,) = batches[0].damaged
            assert (damaged.component, damaged.file) == ("neuron.0.2", "neuron.0.00000.records")
            assert "what is no record" in damaged.reason
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetRecord(read_pb2.GetRecordRequest(dataset="hurt", component="neuron.0.2"))
        assert refusal(caught.value)[2] == "DAMAGED"


async def test_without_a_dataset_the_way_to_one_is_named(tmp_path: Path) -> None:
    async with helpers.connected(tmp_path) as stub:
        listed = await stub.ListDatasets(dataset_pb2.ListDatasetsRequest())
        assert listed == dataset_pb2.ListDatasetsResponse()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetRecord(read_pb2.GetRecordRequest(dataset="any", component="neuron.0.0"))
        assert refusal(caught.value)[:2] == ("NOT_FOUND", ["dataset"])
        assert "tdb dataset import" in str(caught.value.details())


async def test_a_dataset_written_meanwhile_is_served_and_a_deleted_one_is_gone(
    tmp_path: Path,
) -> None:
    async with helpers.connected(tmp_path) as stub:
        request = read_pb2.GetRecordRequest(dataset="new", component="neuron.0.0")
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.GetRecord(request)
        helpers.write(tmp_path / "new", RECORDS[:10])
        assert (await stub.GetRecord(request)).record == helpers.with_texts(RECORDS[0])
        size = sum(path.stat().st_size for path in (tmp_path / "new").iterdir())
        deleted = await stub.DeleteDataset(dataset_pb2.DeleteDatasetRequest(dataset="new"))
        assert deleted.bytes == size
        assert helpers.bytes_of(tmp_path) == {}
        for call in (
            stub.GetRecord(request),
            stub.DeleteDataset(dataset_pb2.DeleteDatasetRequest(dataset="new")),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert refusal(caught.value)[:2] == ("NOT_FOUND", ["dataset"])
        other = helpers.random_records(9, [f"neuron.0.{index}" for index in range(5)])
        helpers.write(tmp_path / "new", other)
        assert (await stub.GetRecord(request)).record == helpers.with_texts(other[0])


def test_what_cannot_be_opened_does_not_keep_a_service_from_starting(tmp_path: Path) -> None:
    for name in ("good", "bad", "worse"):
        helpers.write(tmp_path / name, RECORDS[:10])
    (tmp_path / "bad" / "manifest.json").write_text("{}")
    (tmp_path / "worse" / "vocabulary").unlink()
    assert Library(tmp_path).warm_up() == 1


async def test_a_cursor_of_a_dataset_that_was_replaced_is_refused(tmp_path: Path) -> None:
    helpers.write(tmp_path / "one", RECORDS[:10])
    async with helpers.connected(tmp_path) as stub:
        _, batches, _ = await collect(stub, dataset="one")
        await stub.DeleteDataset(dataset_pb2.DeleteDatasetRequest(dataset="one"))
        helpers.write(tmp_path / "one", RECORDS[:12])
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(stub, dataset="one", cursor=batches[0].cursor)
        assert refusal(caught.value) == ("FAILED_PRECONDITION", ["cursor"], "DATASET_CHANGED")


PAIRS = read_pb2.PAIR_FORM_KEY_MAX

GET: list[tuple[dict[str, Any], str, list[str]]] = [
    ({"component": "neuron.0.0"}, "INVALID_ARGUMENT", ["dataset"]),
    ({"dataset": "../small", "component": "neuron.0.0"}, "INVALID_ARGUMENT", ["dataset"]),
    ({"dataset": ".hidden", "component": "neuron.0.0"}, "INVALID_ARGUMENT", ["dataset"]),
    ({"dataset": "a" * 101, "component": "neuron.0.0"}, "INVALID_ARGUMENT", ["dataset"]),
    ({"dataset": "other", "component": "neuron.0.0"}, "NOT_FOUND", ["dataset"]),
    ({"dataset": "small"}, "INVALID_ARGUMENT", ["component"]),
    ({"dataset": "small", "component": "neuron.0"}, "INVALID_ARGUMENT", ["component"]),
    ({"dataset": "small", "component": "neuron.0.01"}, "INVALID_ARGUMENT", ["component"]),
    ({"dataset": "small", "component": "neuron.0.0~1"}, "INVALID_ARGUMENT", ["component"]),
    ({"dataset": "small", "component": "mlp.0"}, "INVALID_ARGUMENT", ["component"]),
    ({"dataset": "small", "component": "head.0.0.q"}, "INVALID_ARGUMENT", ["component"]),
    ({"dataset": "small", "component": "neuron.0.20"}, "NOT_FOUND", ["component"]),
    ({"dataset": "small", "component": "neuron.1.3"}, "NOT_FOUND", ["component"]),
    ({"dataset": "small", "component": "latent.demo.3"}, "NOT_FOUND", ["component"]),
    (
        {
            "dataset": "small",
            "component": "neuron.0.0",
            "view": read_pb2.View(pair_form=PAIRS),
        },
        "INVALID_ARGUMENT",
        ["view.pair_form"],
    ),
]


@pytest.mark.parametrize(("request_", "code", "fields"), GET)
async def test_what_get_record_refuses(
    library: Path, request_: dict[str, Any], code: str, fields: list[str]
) -> None:
    async with helpers.connected(library) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetRecord(read_pb2.GetRecordRequest(**request_))
        assert refusal(caught.value)[:2] == (code, fields)


STREAM: list[tuple[dict[str, Any], str, list[str]]] = [
    ({"dataset": ""}, "INVALID_ARGUMENT", ["dataset"]),
    ({"selections": [read_pb2.Selection()]}, "INVALID_ARGUMENT", ["selections[0].components"]),
    ({"selections": [single("x")]}, "INVALID_ARGUMENT", ["selections[0].component"]),
    (
        {"selections": [single("neuron.0.0"), single("neuron.9.0")]},
        "NOT_FOUND",
        ["selections[1].component"],
    ),
    (
        {"selections": [ranged("neuron.0.5", "neuron.0.4")]},
        "INVALID_ARGUMENT",
        ["selections[0].range.last"],
    ),
    (
        {"selections": [ranged("neuron.0.5", "head.0.4")]},
        "INVALID_ARGUMENT",
        ["selections[0].range.last"],
    ),
    (
        {"selections": [ranged("latent.a.5", "latent.b.6")]},
        "INVALID_ARGUMENT",
        ["selections[0].range.last"],
    ),
    ({"selections": [ranged("", "x")]}, "INVALID_ARGUMENT", ["selections[0].range.first"]),
    ({"selections": [ranged("head.4.0", "head.9.9")]}, "NOT_FOUND", ["selections[0].range"]),
    ({"cursor": "x"}, "INVALID_ARGUMENT", ["cursor"]),
    ({"cursor": "é"}, "INVALID_ARGUMENT", ["cursor"]),
    ({"cursor": "A" * 40}, "INVALID_ARGUMENT", ["cursor"]),
    (
        {"selections": [ranged("head.0.0", "head.0.3"), single("neuron.0.0")],
         "view": read_pb2.View(pair_form=PAIRS)},
        "INVALID_ARGUMENT",
        ["view.pair_form"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("request_", "code", "fields"), STREAM)
async def test_what_stream_records_refuses(
    library: Path, request_: dict[str, Any], code: str, fields: list[str]
) -> None:
    async with helpers.connected(library) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(stub, **{"dataset": "small", **request_})
        assert refusal(caught.value)[:2] == (code, fields)


async def test_a_cursor_of_another_question_is_refused(library: Path) -> None:
    async with helpers.connected(library) as stub:
        _, batches, _ = await collect(stub, dataset="small", selections=[single("neuron.0.0")])
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(stub, dataset="small", cursor=batches[0].cursor)
        assert refusal(caught.value)[:2] == ("INVALID_ARGUMENT", ["cursor"])
