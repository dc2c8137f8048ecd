"""What stops a build, what it says then, and that nothing is lost by it."""

import asyncio
import errno
import os
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from tdb.dataset.v1 import build_pb2, dataset_pb2

from services.common.server import ServiceServer
from services.inference.engine.model import Model
from services.inference.scheduler import Scheduler
from services.inference.server import build_server
from tests.common.backend import settings
from tests.dataset.building import helpers
from tests.dataset.building.conftest import Gate

REQUEST = helpers.request(tokens=600, segmentTokens=60, groups=["neuron.1", "head.0"])


@asynccontextmanager
async def inference_at(
    port: int, model: Model, folder: Path, **variables: str
) -> AsyncIterator[ServiceServer]:
    found = settings(TDB_MODEL=f"tiny={folder}", TDB_CACHE_MIB="0", **variables)
    scheduler = Scheduler()
    try:
        async with build_server(found, scheduler, {"tiny": model}, port=port) as server:
            await server.set_serving()
            yield server
    finally:
        scheduler.close()


async def builds(stub: Any) -> list[dataset_pb2.Build]:
    listed = await stub.ListDatasets(dataset_pb2.ListDatasetsRequest())
    return list(listed.builds)


async def until(stub: Any, condition: Callable[[dataset_pb2.Build], bool]) -> dataset_pb2.Build:
    """The build, once it is so."""
    async with asyncio.timeout(60):
        while True:
            for found in await builds(stub):
                if condition(found):
                    return found
            await asyncio.sleep(0.01)


def is_at(state: str) -> Callable[[dataset_pb2.Build], bool]:
    return lambda build: build.state == dataset_pb2.BuildState.Value(f"BUILD_STATE_{state}")


async def refusal(stub: Any, request: build_pb2.BuildDatasetRequest) -> tuple[str, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await helpers.build(stub, request)
    return caught.value.code().name, caught.value.details() or ""


async def test_a_cancelled_build_stays_until_it_is_asked_for_again(
    data: Path, inference: ServiceServer, tmp_path: Path, gate: Gate
) -> None:
    (tmp_path / "whole").mkdir()
    shutil.copytree(data / "corpora", tmp_path / "whole" / "corpora")
    wanted = await helpers.built_by(tmp_path / "whole", inference, REQUEST)
    async with helpers.serving(data, inference.port) as stub:
        gate.close(segments=2)
        call = stub.BuildDataset(REQUEST)
        await until(stub, lambda build: build.done > 60)
        stopped = await stub.CancelBuild(build_pb2.CancelBuildRequest(dataset="built"))
        gate.open()
        assert 60 < stopped.build.done <= 120
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            [each async for each in call]
        assert caught.value.code() is grpc.StatusCode.CANCELLED
        await until(stub, is_at("CANCELLED"))
        with pytest.raises(grpc.aio.AioRpcError, match="no build of 'built' is under way"):
            await stub.CancelBuild(build_pb2.CancelBuildRequest(dataset="built"))
    async with helpers.serving(data, inference.port) as stub:
        assert is_at("CANCELLED")((await builds(stub))[0]), "a restart does not begin it again"
        code, says = await refusal(stub, helpers.request(tokens=601))
        assert code == "FAILED_PRECONDITION"
        assert "begun with another request" in says
        said, _ = await helpers.build(stub, REQUEST)
        harvested = [each.done for each in said if each.phase == "harvesting"]
        assert not harvested or min(harvested) >= 60, "it began from the start"
    assert helpers.files_of(data / "datasets" / "built") == wanted


async def test_a_build_goes_on_when_its_caller_leaves_and_when_the_service_stops(
    data: Path, inference: ServiceServer, gate: Gate
) -> None:
    async with helpers.serving(data, inference.port) as stub:
        gate.close(segments=2)
        call = stub.BuildDataset(REQUEST)
        await anext(aiter(call))
        call.cancel()
        before = await until(stub, lambda build: build.done > 60)
        with pytest.raises(grpc.aio.AioRpcError, match="cancel that first"):
            await stub.DeleteDataset(dataset_pb2.DeleteDatasetRequest(dataset="built"))
    gate.open()
    async with helpers.serving(data, inference.port) as stub:
        _, dataset = await helpers.build(stub, REQUEST)
        assert dataset.header.corpus.tokens == 600
        assert before.done > 60
        code, says = await refusal(stub, REQUEST)
        assert (code, says) == (
            "FAILED_PRECONDITION",
            "there is a dataset 'built' already: delete it or choose another name",
        )
        await stub.DeleteDataset(dataset_pb2.DeleteDatasetRequest(dataset="built"))
    assert not (data / "datasets" / "built").exists()


async def test_while_the_inference_service_is_away_a_build_waits(
    data: Path, model: Model, model_folder: Path, gate: Gate
) -> None:
    async with inference_at(0, model, model_folder) as gone:
        port = gone.port
    async with helpers.serving(data, port) as stub:
        call = asyncio.ensure_future(helpers.build(stub, REQUEST))
        waiting = await until(stub, is_at("WAITING"))
        assert waiting.message.startswith("the inference service: ")
        gate.close(segments=2)
        async with inference_at(port, model, model_folder):
            await until(stub, lambda build: build.done > 60)
        gate.open()
        waiting = await until(stub, is_at("WAITING"))
        assert 60 < waiting.done <= 120
        async with inference_at(port, model, model_folder):
            _, dataset = await call
    assert dataset.header.corpus.tokens == 600


@pytest.mark.parametrize(
    ("more", "code", "says"),
    [
        ({"weightsHash": "0" * 64}, "FAILED_PRECONDITION", "the weights of the model"),
        ({"tokenizerHash": "0" * 64}, "FAILED_PRECONDITION", "the tokenizer of the model"),
        ({"model": "gpt5"}, "NOT_FOUND", "served: tiny"),
        ({"groups": ["latent"]}, "FAILED_PRECONDITION", "no dictionary is served"),
        ({"groups": ["latent.x"]}, "INVALID_ARGUMENT", "no dictionary 'x'"),
        ({"groups": ["neuron.2"]}, "INVALID_ARGUMENT", "has layers 0..1"),
        ({"groups": ["neuron", "neuron.1"]}, "INVALID_ARGUMENT", "neuron.1 is named twice"),
        ({"groups": ["mlp.1"]}, "INVALID_ARGUMENT", "is not a group of components"),
        ({"sequenceLength": 33}, "INVALID_ARGUMENT", "at most 32 tokens"),
        ({"sequenceLength": 1}, "INVALID_ARGUMENT", "must be in 2.."),
        ({"topK": 0}, "INVALID_ARGUMENT", "must be in 1..1000"),
        ({"quantiles": 17}, "INVALID_ARGUMENT", "must be in 0..16"),
        ({"tokens": 0}, "INVALID_ARGUMENT", "must be in 1.."),
        ({"dataset": "../x"}, "INVALID_ARGUMENT", "cannot be the name"),
        ({"corpus": {}}, "INVALID_ARGUMENT", "one of files, demo or hub"),
        ({"corpus": {"files": {"path": "../x"}}}, "INVALID_ARGUMENT", "must be a file or folder"),
        ({"corpus": {"files": {"path": "x"}}}, "NOT_FOUND", "there is no x"),
        (
            {"corpus": {"files": {"path": "news.jsonl", "field": "text"}}},
            "FAILED_PRECONDITION",
            "news.jsonl, line 1: there is no text in 'text'; it has body, id",
        ),
    ],
)
async def test_what_can_never_be_built_is_refused_and_leaves_nothing(
    data: Path, inference: ServiceServer, more: dict[str, Any], code: str, says: str
) -> None:
    async with helpers.serving(data, inference.port) as stub:
        found, sentence = await refusal(stub, helpers.request(**more))
        assert (found, says in sentence) == (code, True), sentence
        assert await builds(stub) == []
    assert list((data / "datasets").iterdir()) == []


@pytest.mark.parametrize("token", ["wrong", "of-ann"])
async def test_a_build_shows_its_token(
    data: Path, model: Model, model_folder: Path, token: str
) -> None:
    variables = {"TDB_TOKENS": "ann:of-ann"}
    async with (
        inference_at(0, model, model_folder, **variables) as inference,
        helpers.serving(data, inference.port, TDB_SERVICE_TOKEN=token) as stub,
    ):
        if token == "of-ann":
            await helpers.build(stub, REQUEST)
        else:
            code, says = await refusal(stub, REQUEST)
            assert code == "UNAUTHENTICATED"
            assert "TDB_SERVICE_TOKEN" in says
            assert token not in says


async def test_too_small_a_disk_is_said_before_any_work(
    data: Path, inference: ServiceServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(data)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    async with helpers.serving(data, inference.port) as stub:
        code, says = await refusal(stub, REQUEST)
    assert code == "FAILED_PRECONDITION"
    assert "make room" in says
    assert list((data / "datasets").iterdir()) == []


async def test_the_cap_on_all_datasets_is_held_before_any_work(
    data: Path, inference: ServiceServer
) -> None:
    other = data / "datasets" / "other"
    (other / "building").mkdir(parents=True)
    async with helpers.serving(data, inference.port, TDB_DATASETS_MIB="20") as stub:
        with (other / "building" / "state").open("wb") as file:
            file.truncate(20 * 2**20)
        code, says = await refusal(stub, REQUEST)
        assert code == "FAILED_PRECONDITION"
        assert "of the 20 MiB that datasets may take (TDB_DATASETS_MIB) others take 20" in says
        assert not (data / "datasets" / "built").exists()
        shutil.rmtree(other)
        await helpers.build(stub, REQUEST)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
async def test_a_disk_that_fills_up_costs_a_segment(
    data: Path,
    inference: ServiceServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:
    (tmp_path / "whole").mkdir()
    shutil.copytree(data / "corpora", tmp_path / "whole" / "corpora")
    wanted = await helpers.built_by(tmp_path / "whole", inference, REQUEST)
    real, left = os.fsync, [25]

    def fsync(descriptor: int) -> None:
        left[0] -= 1
        if left[0] <= 0:
            raise OSError(number, os.strerror(number))
        real(descriptor)

    async with helpers.serving(data, inference.port) as stub:
        monkeypatch.setattr(os, "fsync", fsync)
        code, says = await refusal(stub, REQUEST)
        assert code == "FAILED_PRECONDITION"
        assert os.strerror(number) in says
        (failed,) = await builds(stub)
        assert is_at("FAILED")(failed)
        assert failed.message == says
        monkeypatch.setattr(os, "fsync", real)
        await helpers.build(stub, REQUEST)
    assert helpers.files_of(data / "datasets" / "built") == wanted


async def test_a_damaged_state_is_noticed_and_named(
    data: Path, inference: ServiceServer, gate: Gate
) -> None:
    async with helpers.serving(data, inference.port) as stub:
        gate.close(segments=2)
        call = stub.BuildDataset(REQUEST)
        await until(stub, lambda build: build.done > 60)
        await stub.CancelBuild(build_pb2.CancelBuildRequest(dataset="built"))
        gate.open()
        await until(stub, is_at("CANCELLED"))
        call.cancel()
        (state,) = (data / "datasets" / "built" / "building").glob("state.*/head.0")
        content = bytearray(state.read_bytes())
        content[len(content) // 2] ^= 1
        state.write_bytes(content)
        code, says = await refusal(stub, REQUEST)
        assert code == "FAILED_PRECONDITION"
        assert f"{state.parent.name}/head.0: does not match its checksum" in says
        await stub.DeleteDataset(dataset_pb2.DeleteDatasetRequest(dataset="built"))
        await helpers.build(stub, REQUEST)


async def test_a_corpus_that_changed_meanwhile_is_noticed(
    data: Path, inference: ServiceServer, gate: Gate
) -> None:
    async with helpers.serving(data, inference.port) as stub:
        gate.close(segments=2)
        call = stub.BuildDataset(REQUEST)
        await until(stub, lambda build: build.done > 60)
        await stub.CancelBuild(build_pb2.CancelBuildRequest(dataset="built"))
        gate.open()
        await until(stub, is_at("CANCELLED"))
        call.cancel()
        (data / "corpora" / "news.jsonl").write_text(helpers.corpus_lines() + "\n")
        code, says = await refusal(stub, REQUEST)
        assert code == "FAILED_PRECONDITION"
        assert "was begun with another model, dictionary, tokenizer or corpus" in says
