"""Datasets behind a URL: few requests, a bounded cache, every way in which the other side fails."""

import asyncio
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import grpc.aio
import pytest
from tdb.dataset.v1 import dataset_pb2, read_pb2, search_pb2

from services.common.errors import (
    FailedPrecondition,
    NotFound,
    ResourceExhausted,
    TdbError,
    Unavailable,
)
from services.common.settings import SettingsError
from services.dataset import http_files, library, object_files, remote, remote_files
from services.dataset.block_cache import BlockCache
from services.dataset.damage import Damaged
from services.dataset.http_files import HttpFiles
from services.dataset.library import Library
from services.dataset.object_files import ObjectFiles
from services.dataset.reader import DatasetReader
from services.dataset.remote import RemoteStorage
from services.dataset.remote_files import RemoteFiles
from services.dataset.server import open_library
from tests.common.backend import settings
from tests.dataset import helpers, object_stores, range_server
from tests.dataset.range_server import Server
from tests.dataset.test_service import collect, refusal
from tests.faults.watching import until

RECORDS = helpers.random_records(4, helpers.COMPONENTS, tokens=32)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written") / "far"
    helpers.write(folder, RECORDS)
    return folder


@pytest.fixture
def server(written: Path) -> Iterator[Server]:
    with range_server.serving(written) as state:
        yield state


@pytest.fixture
def cache(tmp_path: Path) -> BlockCache:
    (tmp_path / "cache").mkdir()
    return BlockCache(tmp_path / "cache", 10**7)


Below = Callable[[Server], RemoteFiles]
"""What is below `data` on a server."""


@pytest.fixture(params=["https", "az", "s3"])
def below(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Below:
    """The ways to read files from elsewhere, all of which behave alike."""

    def found(server: Server) -> RemoteFiles:
        if request.param == "https":
            return HttpFiles(server.url)
        object_stores.use(monkeypatch, f"http://127.0.0.1:{server.port}")
        return ObjectFiles(f"{request.param}://data")

    return found


@pytest.fixture
def far(server: Server, below: Below, cache: BlockCache) -> Iterator[RemoteStorage]:
    storage = RemoteStorage("far", below(server), cache)
    yield storage
    storage.close()


def test_everything_is_as_it_was_written(far: RemoteStorage, server: Server) -> None:
    reader = DatasetReader(far)
    assert reader.name == "far"
    for place, record in enumerate(RECORDS):
        assert reader.read(place) == record
    asked = len(server.asked)
    for place, record in enumerate(RECORDS):
        assert reader.read(place) == record
        copy = reader.read(place)
        reader.fill_texts(copy)
        assert copy == helpers.with_texts(record)
    assert [each.name for each in server.asked[asked:]] == ["vocabulary"]


def test_one_record_is_one_request(far: RemoteStorage, server: Server) -> None:
    reader = DatasetReader(far)
    reader.read(3)
    assert [each.name for each in server.asked] == [
        "manifest.json",
        "neuron.0.00000.index",
        "neuron.0.00000.records",
    ]
    assert server.asked[-1].range is not None


def test_a_read_over_several_blocks_is_one_request(
    far: RemoteStorage, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "BLOCK_BYTES", 100)
    reader = DatasetReader(far)
    assert reader.read(3) == RECORDS[3]
    (first,) = ranges(server)
    # What lies between blocks that are there is fetched, and no more.
    assert reader.read(4) == RECORDS[4]
    _, second = ranges(server)
    assert second[0] == first[1] + 1
    assert [reader.read(place) for place in range(len(RECORDS))] == RECORDS


def ranges(server: Server) -> list[tuple[int, int]]:
    """The parts of records that were asked for."""
    return [each.range for each in server.asked if each.range and each.name.endswith(".records")]


def test_what_was_read_is_kept_for_the_next_process(
    far: RemoteStorage, server: Server, below: Below, tmp_path: Path
) -> None:
    reader = DatasetReader(far)
    reader.read(3)
    server.asked.clear()
    again = RemoteStorage("far", below(server), BlockCache(tmp_path / "cache", 10**7))
    assert DatasetReader(again).read(3) == RECORDS[3]
    assert [each.name for each in server.asked] == ["manifest.json"]
    again.close()


def test_the_query_is_sent_and_never_shown(
    server: Server, cache: BlockCache, written: Path
) -> None:
    storage = RemoteStorage("far", HttpFiles(f"{server.url}?sig=s3cret"), cache)
    reader = DatasetReader(storage)
    assert reader.read(0) == RECORDS[0]
    assert {each.query for each in server.asked} == {"sig=s3cret"}
    server.status = lambda name: 403
    with pytest.raises(FailedPrecondition) as caught:
        storage.manifest()
    assert "status 403" in str(caught.value)
    assert "s3cret" not in str(caught.value)
    storage.close()


@pytest.mark.parametrize(
    ("status", "kind", "says"),
    [
        (404, NotFound, "the dataset 'far' is not there"),
        (403, FailedPrecondition, "status 403|credentials are refused"),
        (400, FailedPrecondition, "status 400"),
        (500, Unavailable, "status 500"),
        (429, Unavailable, "status 429"),
    ],
)
def test_what_the_other_side_answers_is_said(
    far: RemoteStorage, server: Server, status: int, kind: type[TdbError], says: str
) -> None:
    server.status = lambda name: status
    with pytest.raises(kind, match=says):
        far.manifest()


def test_a_redirect_is_not_followed(server: Server) -> None:
    server.status = lambda name: 302
    with pytest.raises(FailedPrecondition, match="a redirect"):
        HttpFiles(server.url).get("manifest.json", 10**6)


def test_what_is_missing_or_wrong_there_is_damage(far: RemoteStorage, server: Server) -> None:
    reader = DatasetReader(far)
    server.status = lambda name: 404 if name.startswith("head.0") else None
    heads = [place for place, each in enumerate(RECORDS) if each.component.startswith("head")]
    with pytest.raises(Damaged, match=r"head\.0\.00000\.index is missing"):
        reader.read(heads[0])
    server.status = lambda name: None
    server.change = lambda name, content: content[:-1] + b"x" if "index" in name else content
    with pytest.raises(Damaged, match="does not match the manifest's checksum"):
        reader.read(heads[0])
    server.change = lambda name, content: content
    assert reader.read(heads[0]) == RECORDS[heads[0]]


def test_what_was_garbled_on_the_way_is_asked_for_again(far: RemoteStorage, server: Server) -> None:
    reader = DatasetReader(far)
    garbled: list[str] = []

    def once(name: str, content: bytes) -> bytes:
        if name.endswith(".records") and name not in garbled:
            garbled.append(name)
            return bytes(len(content))
        return content

    server.change = once
    assert [reader.read(place) for place in range(len(RECORDS))] == RECORDS
    assert garbled
    server.change = lambda name, content: bytes(len(content))
    far._cache._most_bytes = 0
    far._cache._shrink()
    with pytest.raises(Damaged, match="does not match its checksum"):
        reader.read(0)


def test_a_file_that_is_shorter_there_is_damage(far: RemoteStorage, server: Server) -> None:
    reader = DatasetReader(far)
    server.change = lambda name, content: content[:50] if name.endswith(".records") else content
    with pytest.raises(Damaged, match="is shorter than its index says"):
        reader.read(3)
    server.change = lambda name, content: content
    assert reader.read(3) == RECORDS[3]


def test_a_server_without_ranges_is_refused(
    far: RemoteStorage, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "BLOCK_BYTES", 100)
    server.ranges = False
    says = r"cannot be read in parts|larger than it should be|cannot be read: ValueError"
    with pytest.raises(FailedPrecondition, match=says):
        DatasetReader(far).read(0)


def test_a_side_that_is_slow_cut_off_or_away_is_unavailable(
    far: RemoteStorage, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_files, "TIMEOUT_S", 0.1)
    monkeypatch.setattr(object_files, "PART_TIMEOUT_S", 5.0)
    reader = DatasetReader(far)
    far.close()
    server.delay_s = 0.5
    with pytest.raises(Unavailable, match="timed out") as caught:
        reader.read(0)
    assert caught.value.retry_after_s
    server.delay_s = 0
    server.cut = True
    with pytest.raises(Unavailable, match="cannot be read"):
        reader.read(0)
    server.cut = False
    assert reader.read(0) == RECORDS[0]
    monkeypatch.setattr(http_files, "TIMEOUT_S", 10.0)
    monkeypatch.setattr(http_files, "WHOLE_TIMEOUT_S", 1e-9)
    with pytest.raises(Unavailable, match=r"not all of it within|timed out"):
        far.manifest()


def test_nobody_listening_is_unavailable(below: Below, cache: BlockCache) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    storage = RemoteStorage("far", below(Server(Path(), port)), cache)
    with pytest.raises(
        Unavailable, match=r"Connection refused|ServiceRequestError|ConnectionError"
    ):
        storage.manifest()
    storage.close()


def test_connections_are_kept_and_one_that_died_is_replaced(
    server: Server, cache: BlockCache
) -> None:
    files = HttpFiles(server.url)
    reader = DatasetReader(RemoteStorage("far", files, cache))
    (kept,) = files._idle
    reader.read(0)
    assert files._idle == [kept]
    assert kept.sock is not None
    kept.sock.shutdown(socket.SHUT_RDWR)
    assert reader.read(20) == RECORDS[20]
    assert files._idle != [kept]
    files.close()


@pytest.mark.parametrize("url", ["http", "s3://data"])
def test_too_many_at_once_come_back_later(
    server: Server, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    object_stores.use(monkeypatch, f"http://127.0.0.1:{server.port}")
    one = threading.BoundedSemaphore(1)
    files = remote_files.below(server.url if url == "http" else url, one)
    server.delay_s = 0.3
    started = threading.Thread(target=files.get, args=("manifest.json", 10**6))
    started.start()
    while not server.asked:
        pass
    with pytest.raises(ResourceExhausted) as caught:
        files.get("manifest.json", 10**6)
    assert caught.value.retry_after_s
    started.join()
    assert files.get("manifest.json", 10**6)
    files.close()


def test_the_cache_is_bounded_and_gives_up_what_was_used_least(tmp_path: Path) -> None:
    def name(number: int) -> str:
        return f"{number:064x}-0"

    cache = BlockCache(tmp_path, 1000)
    for number in range(3):
        cache.put(name(number), bytes([number]) * 296)
    assert cache.get(name(0)) == bytes(296)
    cache.put(name(3), bytes(296))
    assert cache.get(name(1)) is None
    assert cache.get(name(0)) is not None
    assert cache.size == sum(path.stat().st_size for path in tmp_path.iterdir()) == 900
    cache.put(name(4), bytes(2000))
    assert cache.get(name(4)) is None
    path = tmp_path / name(2)
    path.write_bytes(b"x" + path.read_bytes()[1:])
    assert cache.get(name(2)) is None
    assert not path.exists()
    assert cache.size == 600
    (tmp_path / "stranger").write_text("")
    (tmp_path / f"{name(9)}.partial").write_text("")
    os.utime(tmp_path / name(3), ns=(1, 1))
    again = BlockCache(tmp_path, 400)
    assert {each.name for each in tmp_path.iterdir()} == {name(0)}
    assert again.size == 300


def test_a_cache_that_cannot_write_costs_speed_only(server: Server, tmp_path: Path) -> None:
    storage = RemoteStorage("far", HttpFiles(server.url), BlockCache(tmp_path / "no", 10**6))
    reader = DatasetReader(storage)
    assert reader.read(0) == reader.read(0) == RECORDS[0]
    storage.close()


async def test_remote_datasets_are_served_beside_local_ones(server: Server, tmp_path: Path) -> None:
    variables = {
        "TDB_DATA_DIR": str(tmp_path),
        "TDB_REMOTE_DATASETS": f"far={server.url}?sig=s3cret,gone={server.url}/nowhere",
    }
    helpers.write(tmp_path / "datasets" / "near", RECORDS[:5])
    opened = open_library(settings(**variables))
    async with helpers.connected_to(opened) as stub:
        listed = await stub.ListDatasets(dataset_pb2.ListDatasetsRequest())
        assert [(each.name, each.is_remote) for each in listed.datasets] == [
            ("far", True),
            ("near", False),
        ]
        assert [each.name for each in listed.unreadable] == ["gone"]
        assert "s3cret" not in str(listed)
        records, _, _ = await collect(stub, dataset="far")
        assert records == RECORDS
        found = await stub.Search(search_pb2.SearchRequest(dataset="far", text="w1 w"))
        assert found.candidates == len(RECORDS)
        for _ in range(2):  # the path of the field does not grow with each refusal
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await collect(stub, dataset="gone")
            assert refusal(caught.value)[:2] == ("NOT_FOUND", ["dataset"])
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.DeleteDataset(dataset_pb2.DeleteDatasetRequest(dataset="far"))
        assert refusal(caught.value)[0] == "FAILED_PRECONDITION"
        assert (tmp_path / "cache" / "datasets").is_dir()


async def test_a_side_that_hangs_leaves_local_datasets_alone(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_files, "TIMEOUT_S", 600.0)
    helpers.write(tmp_path / "datasets" / "near", RECORDS[:5])
    opened = open_library(
        settings(TDB_DATA_DIR=str(tmp_path), TDB_REMOTE_DATASETS=f"far={server.url}")
    )
    async with helpers.connected_to(opened) as stub:
        assert (await collect(stub, dataset="far"))[0] == RECORDS
        server.answers.clear()
        server.asked.clear()
        for path in (tmp_path / "cache" / "datasets").iterdir():
            path.unlink()
        hanging = [
            asyncio.ensure_future(
                stub.GetRecord(read_pb2.GetRecordRequest(dataset="far", component=each.component))
            )
            for each in RECORDS
        ]
        await until("it hangs", lambda: len(server.asked) == http_files.AT_ONCE)
        near = read_pb2.GetRecordRequest(dataset="near", component=RECORDS[0].component)
        answer = await stub.GetRecord(near)
        assert answer.record == helpers.with_texts(RECORDS[0])
        assert len([each for each in hanging if not each.done()]) >= http_files.AT_ONCE
        server.answers.set()
        await asyncio.gather(*hanging, return_exceptions=True)


def test_while_the_other_side_is_away_what_is_known_is_served(
    server: Server, cache: BlockCache, tmp_path: Path
) -> None:
    now = 1000.0
    storage = RemoteStorage("far", HttpFiles(server.url), cache)
    opened = Library(tmp_path, [storage], lambda: now)
    server.status = lambda name: 500
    with pytest.raises(Unavailable):
        opened.open("far")
    asked = len(server.asked)
    with pytest.raises(Unavailable):
        opened.open("far")
    assert len(server.asked) == asked, "not asked again at once"
    server.status = lambda name: None
    now += library.RETRY_S
    reader = opened.open("far")
    server.status = lambda name: 500
    now += library.REFRESH_S
    assert opened.open("far") is reader
    server.status = lambda name: None
    now += library.RETRY_S
    assert opened.open("far") is reader, "an equal manifest is no new dataset"
    opened.close()


def test_one_name_is_one_dataset(tmp_path: Path) -> None:
    helpers.write(tmp_path / "datasets" / "near", RECORDS[:5])
    given = settings(TDB_DATA_DIR=str(tmp_path), TDB_REMOTE_DATASETS="near=https://h/x")
    with pytest.raises(SettingsError, match="TDB_REMOTE_DATASETS names near"):
        open_library(given)
