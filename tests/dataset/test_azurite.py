"""A real Azure Blob server, asked without credentials over plain HTTP as the public bucket is."""

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
from tests.dataset.azurite_server import Azurite
from tests.dataset.test_openai_remote import HEAD, HEADS, NEURON, NEURONS, place

RECORDS = helpers.random_records(4, helpers.COMPONENTS, tokens=32)


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
