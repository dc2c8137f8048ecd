"""A real Azure Blob server, asked without credentials over plain HTTP as the public bucket is."""

import base64
import hashlib
import hmac
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path

import pytest

from services.common.errors import FailedPrecondition, NotFound
from services.dataset.block_cache import BlockCache
from services.dataset.damage import Damaged
from services.dataset.http_files import HttpFiles
from services.dataset.openai_catalogue import PUBLISHED
from services.dataset.openai_remote import OpenAIReader
from services.dataset.reader import DatasetReader
from services.dataset.remote import RemoteStorage
from tests.dataset import helpers, openai_writer
from tests.dataset.test_openai_remote import HEAD, HEADS, NEURON, NEURONS, place

FOLDER = Path(__file__).parent / "azurite"
SERVER = FOLDER / "node_modules" / "azurite" / "dist" / "src" / "blob" / "main.js"
IN_CI = bool(os.environ.get("CI"))

ACCOUNT = "devstoreaccount1"
# The key of every Azurite, published in its documentation.
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="

RECORDS = helpers.random_records(4, helpers.COMPONENTS, tokens=32)


class Azurite:
    """Makes containers and blobs, with the account's key."""

    def __init__(self, port: int) -> None:
        self._root = f"http://127.0.0.1:{port}/{ACCOUNT}"

    def container(self, name: str, *, public: bool) -> str:
        """The URL of a new container."""
        headers = {"x-ms-blob-public-access": "container"} if public else {}
        self._put(f"/{name}", "restype=container", headers, b"")
        return f"{self._root}/{name}"

    def blob(self, container: str, name: str, content: bytes) -> None:
        self._put(f"/{container}/{name}", "", {"x-ms-blob-type": "BlockBlob"}, content)

    def folder(self, container: str, folder: Path) -> None:
        for path in folder.rglob("*"):
            if path.is_file():
                self.blob(container, str(path.relative_to(folder)), path.read_bytes())

    def _put(self, path: str, query: str, given: dict[str, str], content: bytes) -> None:
        stated = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-08-06", **given}
        lines = "".join(f"{name}:{stated[name]}\n" for name in sorted(stated))
        resource = f"/{ACCOUNT}/{ACCOUNT}{path}"
        if query:
            resource += "\n" + query.replace("=", ":")
        length = str(len(content)) if content else ""
        signed = f"PUT\n\n\n{length}\n\n{'application/json'}\n\n\n\n\n\n\n{lines}{resource}"
        digest = hmac.new(base64.b64decode(KEY), signed.encode(), hashlib.sha256).digest()
        headers = {
            **stated,
            "authorization": f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}",
            "content-type": "application/json",
        }
        url = f"{self._root}{path}" + (f"?{query}" if query else "")
        request = urllib.request.Request(url, data=content, headers=headers, method="PUT")
        with urllib.request.urlopen(request, timeout=10) as answer:
            assert answer.status == 201


@pytest.fixture(scope="module")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Azurite]:
    node = shutil.which("node")
    if node is None or not SERVER.exists():
        if IN_CI:
            raise AssertionError("`make test` installs Azurite")
        pytest.skip("no Azurite here: `make .make/azurite` installs it")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("azurite")
    process = subprocess.Popen(
        [
            node,
            str(SERVER),
            "--silent",
            "--skipApiVersionCheck",
            "--disableTelemetry",
            *("--location", str(folder), "--blobHost", "127.0.0.1", "--blobPort", str(port)),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_for(port, process)
        yield Azurite(port)
    finally:
        process.terminate()
        process.wait(10)


def _wait_for(port: int, process: "subprocess.Popen[bytes]") -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        assert process.poll() is None, "Azurite ended"
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise AssertionError("Azurite does not listen")


@pytest.fixture
def cache(tmp_path: Path) -> BlockCache:
    (tmp_path / "cache").mkdir()
    return BlockCache(tmp_path / "cache", 10**7)


def test_published_records_are_read_without_credentials(
    azurite: Azurite, cache: BlockCache, tmp_path: Path
) -> None:
    url = azurite.container("published", public=True)
    openai_writer.write(tmp_path / "bucket" / NEURONS, NEURON)
    openai_writer.write(tmp_path / "bucket" / HEADS, HEAD)
    azurite.folder("published", tmp_path / "bucket")
    azurite.blob("published", f"{NEURONS}/5/132.json", b'{"neuron_id": {"neuron_ind')
    files = HttpFiles(url)
    neurons, heads = (OpenAIReader(each, files, cache) for each in PUBLISHED[:2])
    assert neurons.read(place(neurons)).statistics.max == 4
    assert heads.read(3 * 12 + 7).component == "head.3.7"
    # Azure answers in XML, which is no record.
    with pytest.raises(NotFound, match=r"has published no record of neuron\.5\.130"):
        neurons.read(place(neurons, "neuron.5.130"))
    with pytest.raises(Damaged, match="this is no JSON"):
        neurons.read(place(neurons, "neuron.5.132"))
    files.close()


def test_a_dataset_of_ours_is_read_in_parts(
    azurite: Azurite, cache: BlockCache, tmp_path: Path
) -> None:
    helpers.write(tmp_path / "far", RECORDS)
    url = azurite.container("ours", public=True)
    azurite.folder("ours", tmp_path)
    storage = RemoteStorage("far", HttpFiles(f"{url}/far"), cache)
    reader = DatasetReader(storage)
    assert [reader.read(at) for at in range(len(RECORDS))] == RECORDS
    storage.close()


def test_a_private_container_gives_no_records(azurite: Azurite, cache: BlockCache) -> None:
    url = azurite.container("private", public=False)
    azurite.blob("private", f"{NEURONS}/5/131.json", b"{}")
    reader = OpenAIReader(PUBLISHED[0], HttpFiles(url), cache)
    with pytest.raises((FailedPrecondition, NotFound)):
        reader.read(place(reader))
    reader.close()
