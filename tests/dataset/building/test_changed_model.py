"""A model that changes while a dataset is built of it: noticed, never mixed."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tdb.dataset.v1 import build_pb2
from transformers import AutoModelForCausalLM

from services.common.settings import ModelSource
from services.dataset.building.inference import Inference
from services.inference.engine.model import Model
from services.inference.server import load_model
from tests.dataset.building import helpers
from tests.dataset.building.conftest import Gate
from tests.dataset.building.test_faults import REQUEST, inference_at, is_at, refusal, until


@pytest.fixture(scope="module")
def other(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Model]:
    """The same model with another number in it."""
    folder = tmp_path_factory.mktemp("other") / "tiny"
    shutil.copytree(model_folder, folder)
    changed: Any = AutoModelForCausalLM.from_pretrained(model_folder)
    with torch.no_grad():
        changed.transformer.h[1].mlp.c_fc.weight[0, 0] += 1
    changed.save_pretrained(folder)
    return folder, load_model(ModelSource("tiny", str(folder)), None)


async def test_another_model_after_a_restart_is_refused(
    data: Path,
    model: Model,
    model_folder: Path,
    other: tuple[Path, Model],
    gate: Gate,
) -> None:
    async with inference_at(0, model, model_folder) as inference:
        port = inference.port
        async with helpers.serving(data, port) as stub:
            gate.close(segments=2)
            stub.BuildDataset(REQUEST)
            await until(stub, lambda build: build.done >= 60)
            await stub.CancelBuild(build_pb2.CancelBuildRequest(dataset="built"))
            gate.open()
            await until(stub, is_at("CANCELLED"))
    async with inference_at(port, other[1], other[0]), helpers.serving(data, port) as stub:
        code, says = await refusal(stub, REQUEST)
        assert code == "FAILED_PRECONDITION"
        assert "begun with another model" in says
    # With the model that it was begun with it goes on.
    async with inference_at(port, model, model_folder), helpers.serving(data, port) as stub:
        await helpers.build(stub, REQUEST)


async def test_another_model_between_two_segments_is_refused(
    data: Path,
    model: Model,
    model_folder: Path,
    other: tuple[Path, Model],
    gate: Gate,
) -> None:
    async with inference_at(0, model, model_folder) as gone:
        port = gone.port
    async with helpers.serving(data, port) as stub:
        gate.close(segments=2)
        call = stub.BuildDataset(REQUEST)
        async with inference_at(port, model, model_folder):
            await until(stub, lambda build: build.done >= 60)
        gate.open()
        await until(stub, is_at("WAITING"))
        async with inference_at(port, other[1], other[0]):
            failed = await until(stub, is_at("FAILED"))
        assert "serves other weights as 'tiny' now" in failed.message
        call.cancel()


async def test_read_outs_of_another_model_are_refused(
    data: Path, model: Model, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Inference.output_tokens

    def of_another(self: Any, *what: Any) -> Any:
        found, ran = real(self, *what)
        ran.model.weights_hash = "0" * 64
        return found, ran

    async with (
        inference_at(0, model, model_folder) as inference,
        helpers.serving(data, inference.port) as stub,
    ):
        monkeypatch.setattr(Inference, "output_tokens", of_another)
        code, says = await refusal(stub, REQUEST)
        assert code == "FAILED_PRECONDITION"
        assert "serves other weights as 'tiny' now" in says
        monkeypatch.setattr(Inference, "output_tokens", real)
        await helpers.build(stub, REQUEST)
