"""Datasets in object stores: a real Azure Blob server and a real S3 server, account from the
environment. How failures of the other side are told is in test_remote."""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from azure.storage.blob import ContainerSasPermissions, generate_container_sas
from google.protobuf.json_format import ParseDict
from tdb.dataset.v1 import dataset_pb2, import_pb2, read_pb2

from services.common.errors import FailedPrecondition
from services.common.settings import SettingsError
from services.dataset.http_files import Missing
from services.dataset.object_files import ObjectFiles
from services.dataset.server import open_library
from tests.common.backend import settings
from tests.dataset import helpers, object_stores, openai_writer, s3_server
from tests.dataset.azurite_server import Azurite
from tests.dataset.object_stores import ACCOUNT, KEY
from tests.dataset.test_neuronpedia_export import explanation, feature, sequence, write
from tests.dataset.test_openai_remote import NEURON, NEURONS
from tests.dataset.test_service import collect, refusal

RECORDS = helpers.random_records(4, helpers.COMPONENTS, tokens=32)
CONTAINER = "stores"


@dataclass
class Store:
    """A server of one kind, with a dataset, a published record and an export in CONTAINER."""

    scheme: str
    endpoint: str
    put: Callable[[str, bytes], None]
    """Puts more into CONTAINER."""

    def url(self, path: str) -> str:
        return f"{self.scheme}://{CONTAINER}/{path}"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stores")
    helpers.write(folder / "far", RECORDS)
    openai_writer.write(folder / "published" / NEURONS, NEURON)
    export = folder / "exports" / "m" / "10-res-jb"
    write(export / "features" / "batch-0.jsonl.gz", [feature(0)])
    write(export / "activations" / "batch-0.jsonl.gz", [sequence(0, [1.0])])
    write(export / "explanations" / "batch-0.jsonl.gz", [explanation(0, "zero")])
    return folder


@pytest.fixture(scope="module")
def blobs(azurite: Azurite, written: Path) -> Store:
    azurite.container(CONTAINER, public=False)
    azurite.folder(CONTAINER, written)
    return Store("az", azurite.root, lambda name, content: azurite.blob(CONTAINER, name, content))


@pytest.fixture(scope="module")
def objects(written: Path) -> Iterator[Store]:
    with s3_server.serving() as server:
        server.bucket(CONTAINER)
        server.folder(CONTAINER, written)
        yield Store("s3", server.root, lambda *what: server.object(CONTAINER, *what))


@pytest.fixture(params=["blobs", "objects"])
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store whose account the environment knows."""
    found: Store = request.getfixturevalue(request.param)
    object_stores.use(monkeypatch, found.endpoint)
    return found


def test_parts_and_whole_files_are_read(store: Store) -> None:
    files = ObjectFiles(store.url("some/"))
    store.put("some/thing", bytes(range(200)))
    assert files.shown == store.url("some")
    assert files.get("thing", 200) == bytes(range(200))
    with pytest.raises(FailedPrecondition, match="is larger than it should be"):
        files.get("thing", 199)
    assert files.get_part("thing", 10, 5) == bytes(range(10, 15))
    assert files.get_part("thing", 190, 50) == bytes(range(190, 200))
    assert files.get_part("thing", 200, 50) == b""
    for name in ("thin", "thing/else"):
        with pytest.raises(Missing, match=store.url(f"some/{name}")):
            files.get(name, 10)
    files.close()
    assert files.get("thing", 200), "closed connections are opened again"
    files.close()
    elsewhere = ObjectFiles(f"{store.scheme}://nowhere")
    with pytest.raises(Missing):
        elsewhere.get("thing", 10)
    elsewhere.close()


async def test_a_dataset_is_served_like_any_other(store: Store, tmp_path: Path) -> None:
    places = f"far={store.url('far')},gone={store.url('gone')}"
    opened = open_library(settings(TDB_DATA_DIR=str(tmp_path), TDB_REMOTE_DATASETS=places))
    async with helpers.connected_to(opened) as stub:
        listed = await stub.ListDatasets(dataset_pb2.ListDatasetsRequest())
        assert [(each.name, each.is_remote) for each in listed.datasets] == [("far", True)]
        assert [each.name for each in listed.unreadable] == ["gone"]
        records, _, _ = await collect(stub, dataset="far", token_texts=True)
        assert records == [helpers.with_texts(each) for each in RECORDS]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(stub, dataset="gone")
        assert refusal(caught.value)[:2] == ("NOT_FOUND", ["dataset"])


async def test_what_is_damaged_there_is_said_and_the_rest_is_served(
    store: Store, tmp_path: Path
) -> None:
    helpers.write(tmp_path / "hurt", RECORDS)
    content = bytearray((tmp_path / "hurt" / "neuron.0.00001.records").read_bytes())
    content[10] ^= 1
    for path in (tmp_path / "hurt").iterdir():
        whole = bytes(content) if path.name == "neuron.0.00001.records" else path.read_bytes()
        half = path.name == "neuron.10.00000.records"
        if path.name != "head.0.00000.index":
            store.put(f"hurt/{path.name}", whole[: len(whole) // 2] if half else whole)
    variables = {
        "TDB_DATA_DIR": str(tmp_path / "data"),
        "TDB_REMOTE_DATASETS": f"hurt={store.url('hurt')}",
    }
    async with helpers.connected_to(open_library(settings(**variables))) as stub:
        records, batches, summary = await collect(stub, dataset="hurt")
    damaged = {each.component: each for batch in batches for each in batch.damaged}
    assert records == [each for each in RECORDS if each.component not in damaged]
    flipped = damaged["neuron.0.7"]
    assert flipped.file == "neuron.0.00001.records"
    assert "neuron.0.7 in neuron.0.00001.records does not match its checksum" in flipped.reason
    assert "is shorter than its index says" in damaged["neuron.10.2"].reason
    assert all("head.0.00000.index is missing" in damaged[f"head.0.{n}"].reason for n in range(4))
    assert summary.damaged == len(damaged) < 9


async def test_published_records_and_exports_are_read(store: Store, tmp_path: Path) -> None:
    variables = {
        "TDB_DATA_DIR": str(tmp_path),
        "TDB_OPENAI_RECORDS": store.url("published"),
        "TDB_IMPORT_SOURCES": f"far={store.url('exports')}",
    }
    async with helpers.connected_to(open_library(settings(**variables))) as stub:
        asked = read_pb2.GetRecordRequest(dataset="openai-gpt2-neurons", component="neuron.5.131")
        assert (await stub.GetRecord(asked)).record.statistics.max == 4
        asked.component = "neuron.5.130"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetRecord(asked)
        assert refusal(caught.value)[0] == "NOT_FOUND"
    async with helpers.connected(tmp_path / "datasets", **variables) as stub:
        fields: dict[str, Any] = {"dataset": "d", "place": "far", "path": "m/10-res-jb"}
        fields["neuronpedia"] = {}
        request = ParseDict(fields, import_pb2.ImportDatasetRequest())
        *_, last = [response async for response in stub.ImportDataset(request)]
        assert (last.dataset.records, last.dataset.explanations) == (1, 1)


def test_wrong_credentials_and_none_are_said_and_never_shown(
    blobs: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    object_stores.use(monkeypatch, blobs.endpoint)
    wrong = f"AccountName={ACCOUNT};AccountKey={KEY[4:]};BlobEndpoint={blobs.endpoint}"
    unknown = f"AccountName={ACCOUNT};SharedAccessSignature=sv=1&sig=s3cret;"
    for connection in (wrong, f"{unknown}BlobEndpoint={blobs.endpoint}", "nonsense"):
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", connection)
        check_refused(f"az://{CONTAINER}/far")
    object_stores.clear(monkeypatch)
    check_refused(f"az://{CONTAINER}/far")
    check_refused(f"s3://{CONTAINER}/far")


def check_refused(url: str) -> None:
    files = ObjectFiles(url)
    with pytest.raises(FailedPrecondition) as caught:
        files.get("manifest.json", 10**6)
    assert caught.value.reason == "CREDENTIALS"
    said = str(caught.value)
    assert f"{url}/manifest.json" in said or url in said
    assert "from the environment of the dataset service" in said
    for secret in ("s3cret", KEY[4:], "nonsense"):
        assert secret not in said
    files.close()


def test_a_signature_is_enough(blobs: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    object_stores.clear(monkeypatch)
    signature = generate_container_sas(
        ACCOUNT,
        CONTAINER,
        account_key=KEY,
        permission=ContainerSasPermissions(read=True),
        expiry=datetime.now(UTC) + timedelta(hours=1),
    )
    connection = f"BlobEndpoint={blobs.endpoint};SharedAccessSignature={signature}"
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", connection)
    files = ObjectFiles(f"az://{CONTAINER}/far")
    assert files.get("manifest.json", 10**6).startswith(b"{")
    files.close()


def test_without_the_package_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "s3fs" else found(name)
    )
    variables = {"TDB_DATA_DIR": str(tmp_path), "TDB_REMOTE_DATASETS": "far=s3://bucket/far"}
    says = (
        r"TDB_REMOTE_DATASETS: s3://bucket/far is in S3, which is read with the package s3fs: "
        r"install transformer-debugger\[object-stores\]\."
    )
    with pytest.raises(SettingsError, match=says):
        open_library(settings(**variables))
    ObjectFiles("az://bucket/far")
