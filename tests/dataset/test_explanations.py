"""Explanations that came with records: kept in the dataset, sent whole and in order, resumable."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from tdb.dataset.v1 import dataset_pb2, explanations_pb2

from services.common.errors import InvalidArgument
from services.dataset import explanation_batches, explanations, groups
from services.dataset.explanations import Explanation
from services.dataset.library import Library
from services.dataset.server import open_library
from services.dataset.store import DatasetWriter
from tests.common.backend import settings
from tests.dataset import helpers, range_server
from tests.dataset.test_service import refusal

RECORDS = helpers.random_records(2, helpers.COMPONENTS[:12])
FOUND = [
    Explanation("neuron.1.3", "a layer above", scores={"ev_correlation": 0.5, "rsquared": -0.25}),
    Explanation("neuron.0.11", "beyond the records"),
    Explanation("neuron.0.2", "one — of two", "oai_token-act-pair", "gpt-4o", "me", "so so", "e1"),
    Explanation("neuron.0.2", "second\nof two"),
]
IN_ORDER = [FOUND[2], FOUND[3], FOUND[1], FOUND[0]]


def write(folder: Path, found: list[Explanation]) -> None:
    group = groups.parse("neuron.0")
    with DatasetWriter(folder, helpers.header()) as writer:
        writer.write(group, 0, RECORDS)
        writer.finish(helpers.VOCABULARY, explanations=explanations.write(folder, found))


@pytest.fixture
async def stub(tmp_path: Path) -> AsyncIterator[Any]:
    write(tmp_path / "told", FOUND)
    write(tmp_path / "untold", [])
    async with helpers.connected(tmp_path) as stub:
        yield stub


async def collect(
    stub: Any, **request: Any
) -> tuple[list[Explanation], list[explanations_pb2.ExplanationBatch], Any]:
    batches = []
    summary = None
    async for response in stub.StreamExplanations(
        explanations_pb2.StreamExplanationsRequest(**request)
    ):
        assert summary is None, "the summary comes last"
        if response.WhichOneof("event") == "batch":
            batches.append(response.batch)
        else:
            summary = response.summary
    found = [
        Explanation(
            *(each.component, each.text, each.method, each.model, each.author),
            *(each.notes, each.id, {score.name: score.value for score in each.scores}),
        )
        for batch in batches
        for each in batch.explanations
    ]
    return found, batches, summary


async def test_explanations_are_sent_in_the_order_of_components(stub: Any) -> None:
    found, _, summary = await collect(stub, dataset="told")
    assert found == IN_ORDER
    assert summary.explanations == 4
    assert len(summary.manifest_hash) == 64
    found, batches, summary = await collect(stub, dataset="untold")
    assert (found, batches, summary.explanations) == ([], [], 0)
    listed = await stub.ListDatasets(dataset_pb2.ListDatasetsRequest())
    assert [each.explanations for each in listed.datasets] == [4, 0]


async def test_they_go_on_from_any_cursor(stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explanation_batches, "BATCH_EXPLANATIONS", 1)
    monkeypatch.setattr(explanations, "_PIECE", 7)  # lines end in other pieces than they begin
    found, batches, _ = await collect(stub, dataset="told")
    assert found == IN_ORDER
    assert len(batches) == 4
    for number, batch in enumerate(batches):
        rest, _, summary = await collect(stub, dataset="told", cursor=batch.cursor)
        assert rest == IN_ORDER[number + 1 :]
        assert summary.explanations == len(rest)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(stub, dataset="untold", cursor=batches[0].cursor)
    assert refusal(caught.value)[:2] == ("INVALID_ARGUMENT", ["cursor"])


@pytest.mark.parametrize(
    ("request_", "code", "fields"),
    [
        ({}, "INVALID_ARGUMENT", ["dataset"]),
        ({"dataset": "other"}, "NOT_FOUND", ["dataset"]),
        ({"dataset": "told", "cursor": "x"}, "INVALID_ARGUMENT", ["cursor"]),
    ],
)
async def test_what_is_refused(
    stub: Any, request_: dict[str, Any], code: str, fields: list[str]
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(stub, **request_)
    assert refusal(caught.value)[:2] == (code, fields)


@pytest.mark.parametrize("change", [lambda content: content[:-9], lambda content: content[::-1]])
async def test_a_damaged_file_is_reported_and_records_still_serve(
    tmp_path: Path, change: Any
) -> None:
    write(tmp_path / "hurt", FOUND)
    path = tmp_path / "hurt" / "explanations.jsonl"
    path.write_bytes(change(path.read_bytes()))
    async with helpers.connected(tmp_path) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(stub, dataset="hurt")
        assert refusal(caught.value)[0::2] == ("FAILED_PRECONDITION", "DAMAGED")
        assert "explanations.jsonl does not match" in str(caught.value.details())
        path.unlink()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(stub, dataset="hurt")
        assert "explanations.jsonl is missing" in str(caught.value.details())
        assert helpers.opened(tmp_path / "hurt").read(3) == RECORDS[3]


async def test_they_are_read_from_afar(tmp_path: Path) -> None:
    write(tmp_path / "far" / "told", FOUND)
    with range_server.serving(tmp_path / "far") as server:
        variables = {
            "TDB_DATA_DIR": str(tmp_path),
            "TDB_REMOTE_DATASETS": f"told={server.url}/told",
            "TDB_OPENAI_RECORDS": server.url,
        }
        async with helpers.connected_to(open_library(settings(**variables))) as stub:
            assert (await collect(stub, dataset="told"))[0] == IN_ORDER
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await collect(stub, dataset="openai-gpt2-neurons")
            assert refusal(caught.value) == ("FAILED_PRECONDITION", ["dataset"], "NOT_HERE")


def test_a_dataset_from_before_there_were_any_still_opens(tmp_path: Path) -> None:
    write(tmp_path / "old", [])
    path = tmp_path / "old" / "manifest.json"
    document = json.loads(path.read_bytes())
    del document["explanations"]
    path.write_text(json.dumps(document))
    assert list(Library(tmp_path).open("old").explanations(0)) == []


def test_what_cannot_be_sent_is_not_kept(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"the explanation of neuron.0.1 has 2,000,"):
        explanations.write(tmp_path, [Explanation("neuron.0.1", "a" * 2_000_000)])
    assert list(tmp_path.iterdir()) == []
