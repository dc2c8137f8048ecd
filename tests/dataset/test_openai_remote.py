"""OpenAI's published records behind a URL, written by another writer than ours."""

import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from tdb.dataset.v1 import dataset_pb2, read_pb2, search_pb2

from services.common.errors import FailedPrecondition, NotFound, Unavailable
from services.common.settings import SettingsError
from services.dataset import http_files, openai_remote
from services.dataset.block_cache import BlockCache
from services.dataset.damage import Damaged
from services.dataset.http_files import HttpFiles
from services.dataset.openai_catalogue import PUBLISHED
from services.dataset.openai_remote import OpenAIReader
from services.dataset.server import open_library
from tests.common.backend import settings
from tests.dataset import helpers, openai_writer, range_server
from tests.dataset.openai_writer import ActivationRecord, NeuronId, NeuronRecord
from tests.dataset.range_server import Server
from tests.dataset.test_service import collect, refusal

NEURONS = "gpt2_small_data/collated-activations"
HEADS = "gpt2_small/attn_write_norm/collated-activations-by-token-pair"
LATENTS = "gpt2_small/autoencoder_latent/resid_delta_mlp_v4/collated-activations"

NEURON = NeuronRecord(
    NeuronId(layer_index=5, neuron_index=131),
    random_sample=[ActivationRecord([" calm", "."], [-0.25, 0.0])],
    random_sample_by_quantile=[
        [ActivationRecord(["low"], [0.5])],
        [ActivationRecord(["high"], [1.5])],
    ],
    quantile_boundaries=[1.0],
    mean=0.125,
    variance=2.0,
    most_positive_activation_records=[
        ActivationRecord(["a", " b"], [1.0, 2.0]),
        ActivationRecord([" c", "d", "\u2019"], [-1.0, 4.0, 0.5]),
    ],
)
PAIRS = ["The", " cat", " sat", " down"]
HEAD = NeuronRecord(
    NeuronId(layer_index=3, neuron_index=7),
    most_positive_activation_records=[
        ActivationRecord(PAIRS, openai_writer.triangle(PAIRS, {(2, 1): 3.0, (3, 0): 1.0}, 99)),
        ActivationRecord(PAIRS, openai_writer.triangle(PAIRS, {(3, 2): 2.0}, 2)),
    ],
)
LATENT = NeuronRecord(
    NeuronId(layer_index=2, neuron_index=32_767),
    most_positive_activation_records=[ActivationRecord(["x"], [7.0])],
)


@pytest.fixture
def bucket(tmp_path: Path) -> Iterator[Server]:
    folder = tmp_path / "bucket"
    openai_writer.write(folder / NEURONS, NEURON)
    openai_writer.write(folder / HEADS, HEAD)
    openai_writer.write(folder / LATENTS, LATENT, tags=False)
    with range_server.serving(folder) as server:
        yield server


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
async def stub(bucket: Server, data: Path) -> AsyncIterator[Any]:
    given = settings(TDB_DATA_DIR=str(data), TDB_OPENAI_RECORDS=bucket.url)
    async with helpers.connected_to(open_library(given)) as stub:
        yield stub


@pytest.fixture
def neurons(bucket: Server, tmp_path: Path) -> Iterator[OpenAIReader]:
    (tmp_path / "cache").mkdir()
    reader = OpenAIReader(
        PUBLISHED[0], HttpFiles(bucket.url), BlockCache(tmp_path / "cache", 10**7)
    )
    yield reader
    reader.close()


def place(reader: OpenAIReader, component: str = "neuron.5.131") -> int:
    _, layer, index = component.split(".")
    return int(layer) * 3072 + int(index)


async def get(stub: Any, dataset: str, component: str, **view: Any) -> Any:
    request = read_pb2.GetRecordRequest(
        dataset=dataset, component=component, view=read_pb2.View(**view)
    )
    return (await stub.GetRecord(request)).record


async def test_published_datasets_are_listed_without_asking(stub: Any, bucket: Server) -> None:
    listed = await stub.ListDatasets(dataset_pb2.ListDatasetsRequest())
    found = {each.name: each for each in listed.datasets}
    assert len(found) == len(PUBLISHED)
    assert all(each.is_remote and not each.has_token_ids for each in found.values())
    assert found["openai-gpt2-neurons"].records == 12 * 3072
    assert found["openai-gpt2-heads"].records == 144
    assert found["openai-gpt2-xl-neurons"].records == 48 * 6400
    assert found["openai-gpt2-xl-neurons"].header.model.id == "gpt2-xl"
    latents = found["openai-gpt2-ae-mlp-post-act-v1"]
    assert latents.records == 12 * 32768
    assert latents.groups[0].name == "latent.ae-mlp-post-act-v1-0"
    assert bucket.asked == []
    hashes = {each.manifest_hash for each in found.values()}
    assert len(hashes) == len(found)


async def test_a_neuron_s_record(stub: Any, bucket: Server) -> None:
    record = await get(stub, "openai-gpt2-neurons", "neuron.5.131")
    assert [each.name for each in bucket.asked] == [f"{NEURONS}/5/131.json"]
    assert [list(each.token_texts) for each in record.top] == [[" c", "d", "\u2019"], ["a", " b"]]
    assert [list(each.activations) for each in record.top] == [[-1.0, 4.0, 0.5], [1.0, 2.0]]
    assert list(record.random[0].activations) == [-0.25, 0.0]
    high, low = record.quantiles
    assert (high.lower, high.examples[0].token_texts[0]) == (1.0, "high")
    assert (low.upper, low.HasField("lower")) == (1.0, False)
    assert (record.statistics.mean, record.statistics.variance) == (0.125, 2.0)
    assert not record.statistics.HasField("skewness"), "NaN is not computed"
    normalised = await get(stub, "openai-gpt2-neurons", "neuron.5.131", normalised=True)
    assert list(normalised.top[0].activations) == [0.0, 1.0, 0.125]
    assert len(bucket.asked) == 1, "a record is fetched once"


async def test_a_head_s_record_has_pairs(stub: Any) -> None:
    record = await get(stub, "openai-gpt2-heads", "head.3.7")
    whole, narrow = record.top
    # (0,0) (1,0) (1,1) (2,0) (2,1) (2,2) (3,0) (3,1) (3,2) (3,3)
    assert list(whole.pair_activations) == [0, 0, 0, 0, 3, 0, 1, 0, 0, 0]
    assert not whole.HasField("pair_width")
    # (0,0) (1,0) (1,1) (2,1) (2,2) (3,2) (3,3)
    assert list(narrow.pair_activations) == [0, 0, 0, 0, 0, 2, 0]
    assert narrow.pair_width == 2
    by_query = await get(
        stub, "openai-gpt2-heads", "head.3.7", pair_form=read_pb2.PAIR_FORM_QUERY_MAX
    )
    assert [list(each.activations) for each in by_query.top] == [[0, 0, 3, 1], [0, 0, 0, 2]]


async def test_a_latent_s_record_without_class_names(stub: Any) -> None:
    component = "latent.ae-resid-delta-mlp-v4-2.32767"
    record = await get(stub, "openai-gpt2-ae-resid-delta-mlp-v4", component)
    assert record.component == component
    assert record.statistics.max == 7


async def test_a_missing_file_is_not_found(stub: Any, bucket: Server) -> None:
    for component in ("neuron.5.130", "neuron.5.3072"):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await get(stub, "openai-gpt2-neurons", component)
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    assert [each.name for each in bucket.asked] == [f"{NEURONS}/5/130.json"], "3072 is none of them"


async def test_a_stream_names_what_is_missing_or_wrong(stub: Any, bucket: Server) -> None:
    bad = NeuronRecord(NeuronId(5, 130))
    path = openai_writer.write(bucket.folder / NEURONS, bad)
    path.write_bytes(b'<?xml version="1.0"?><Error><Code>BlobNotFound</Code></Error>')
    chosen = read_pb2.Selection(
        range=read_pb2.ComponentRange(first="neuron.5.125", last="neuron.5.135")
    )
    records, batches, summary = await collect(
        stub, dataset="openai-gpt2-neurons", selections=[chosen], token_texts=True
    )
    assert [each.component for each in records] == ["neuron.5.131"]
    reasons = {each.component: each.reason for batch in batches for each in batch.damaged}
    assert len(reasons) == summary.damaged == 10
    assert "XML or HTML" in reasons["neuron.5.130"]
    assert "has published no record of neuron.5.125" in reasons["neuron.5.125"]
    assert len(batches) == 2
    again, _, _ = await collect(
        stub, dataset="openai-gpt2-neurons", selections=[chosen], cursor=batches[0].cursor
    )
    assert again == []


async def test_a_stream_of_everything_and_a_search_are_refused(stub: Any, bucket: Server) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(stub, dataset="openai-gpt2-neurons")
    assert refusal(caught.value)[:2] == ("INVALID_ARGUMENT", ["selections"])
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Search(search_pb2.SearchRequest(dataset="openai-gpt2-heads"))
    assert refusal(caught.value) == ("FAILED_PRECONDITION", ["dataset"], "NOT_SEARCHABLE")
    assert "cannot be searched: import them" in (caught.value.details() or "")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.DeleteDataset(dataset_pb2.DeleteDatasetRequest(dataset="openai-gpt2-heads"))
    assert "TDB_OPENAI_RECORDS" in (caught.value.details() or "")
    assert bucket.asked == []


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'<?xml version="1.0"?><Error/>', "XML or HTML"),
        (b"", "no JSON"),
        (json.dumps(openai_writer.encoded(NEURON)).encode()[:-9], "no JSON"),
        (
            json.dumps(openai_writer.encoded(NeuronRecord(NeuronId(5, 132)))).encode(),
            "says layer 5, index 132, where neuron.5.131 is wanted",
        ),
    ],
)
def test_wrong_content_is_refused_and_not_kept(
    neurons: OpenAIReader, bucket: Server, content: bytes, says: str
) -> None:
    bucket.change = lambda name, _: content
    with pytest.raises(Damaged, match=says) as caught:
        neurons.read(place(neurons))
    assert f"{NEURONS}/5/131.json" in str(caught.value)
    bucket.change = lambda name, right: right
    assert neurons.read(place(neurons)).statistics.max == 4


def test_what_the_other_side_does_wrong_is_said(
    neurons: OpenAIReader, bucket: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_files, "TIMEOUT_S", 0.1)
    at = place(neurons)
    bucket.status = lambda name: 302
    with pytest.raises(FailedPrecondition, match="a redirect"):
        neurons.read(at)
    bucket.status = lambda name: 503
    with pytest.raises(Unavailable, match="status 503"):
        neurons.read(at)
    bucket.status = lambda name: 410
    with pytest.raises(NotFound, match="has published no record"):
        neurons.read(at)
    bucket.status = lambda name: None
    bucket.cut = True
    with pytest.raises(Unavailable, match="cannot be read"):
        neurons.read(at)
    bucket.cut = False
    bucket.delay_s = 0.5
    with pytest.raises(Unavailable, match="timed out"):
        neurons.read(at)
    bucket.delay_s = 0
    monkeypatch.setattr(openai_remote, "MAX_FILE_BYTES", 100)
    with pytest.raises(FailedPrecondition, match="larger than it should be"):
        neurons.read(at)
    monkeypatch.undo()
    assert neurons.read(at).statistics.max == 4


def test_a_record_stays_in_the_bounded_cache(
    neurons: OpenAIReader, bucket: Server, tmp_path: Path
) -> None:
    record = neurons.read(place(neurons))
    bucket.status = lambda name: 500
    assert neurons.read(place(neurons)) == record
    again = BlockCache(tmp_path / "cache", 10**7)
    assert 0 < again.size < 1000
    other = OpenAIReader(PUBLISHED[0], HttpFiles(bucket.url), again)
    assert other.read(place(other)) == record
    # Another bucket's file is another file.
    elsewhere = OpenAIReader(PUBLISHED[0], HttpFiles(f"{bucket.url}/mirror"), again)
    with pytest.raises(Unavailable):
        elsewhere.read(place(elsewhere))
    (kept,) = (tmp_path / "cache").iterdir()
    kept.write_bytes(kept.read_bytes()[:-1])
    with pytest.raises(Unavailable):
        other.read(place(other))
    for reader in (other, elsewhere):
        reader.close()


def test_a_name_that_is_taken_is_said(data: Path) -> None:
    given = {"TDB_DATA_DIR": str(data), "TDB_OPENAI_RECORDS": "https://host/x"}
    with pytest.raises(SettingsError, match="serves openai-gpt2-heads"):
        open_library(settings(**given, TDB_REMOTE_DATASETS="openai-gpt2-heads=https://h/x"))
    (data / "datasets" / "openai-gpt2-neurons").mkdir(parents=True)
    with pytest.raises(SettingsError, match="serves openai-gpt2-neurons"):
        open_library(settings(**given))
