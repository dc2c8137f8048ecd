"""`tdb up` with the real services and a small model: what a stranger sees first."""

import json
import os
import signal
import socket
import stat
import urllib.request
from pathlib import Path
from typing import Any

import grpc
import pytest
from tdb.inference.v1 import model_pb2, service_pb2_grpc

from tests.cli.helpers import Up, alive, tdb, until

ATTRIBUTE = "tdb.inference.v1.InferenceService/Attribute"
CAPABILITIES = "tdb.explainer.v1.ExplainerService/GetCapabilities"
REQUEST = {
    "run": {"prompt": {"tokenIds": {"ids": [1, 2, 3]}}},
    "objective": {"logitDiff": {"targets": [{"id": 4}], "distractors": [{"id": 5}]}},
    "topK": 3,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of two layers with random weights and no tokenizer."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2,
        n_head=2,
        n_embd=16,
        vocab_size=64,
        n_positions=32,
        bos_token_id=0,
        eos_token_id=0,
    )
    folder = tmp_path_factory.mktemp("models") / "tiny"
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def post(url: str, body: Any) -> Any:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)


def ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def test_from_start_to_an_answer_through_a_crash_to_the_end(model: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    with Up(tdb("up", "--model", f"small={model}", "--data-dir", str(data)), tmp_path) as up:
        url = up.url()
        assert ready(url)
        first = post(f"{url}/{ATTRIBUTE}", REQUEST)
        assert len(first["rows"]) == 3
        assert first["manifest"]["model"]["id"] == "small"

        listening = next(line for line in up.errors if line.startswith("inference: listening"))
        with grpc.insecure_channel(f"127.0.0.1:{listening.split()[-1]}") as channel:
            stub = service_pb2_grpc.InferenceServiceStub(channel)
            assert stub.ListModels(model_pb2.ListModelsRequest()).models == ["small"]

        assert post(f"{url}/tdb.dataset.v1.DatasetService/ListDatasets", {})["datasets"] == []
        capable = post(f"{url}/{CAPABILITIES}", {})
        assert capable["methods"] == ["METHOD_TOKEN_PATTERN"]
        assert "TDB_PROVIDER_URL" in capable["howToConfigure"]

        inference, dataset, explainer, gateway = up.children()
        os.kill(inference, signal.SIGKILL)
        until("the crash to show", lambda: any("SIGKILL" in line for line in up.errors))
        until("readiness to end", lambda: not ready(url))
        until("readiness again", lambda: ready(url), within_s=60)
        assert {dataset, explainer, gateway} <= set(up.children())
        second = post(f"{url}/{ATTRIBUTE}", REQUEST)
        assert second["manifest"]["resultId"] == first["manifest"]["resultId"]
        assert second["rows"] == first["rows"]

        children = up.children()
        assert up.stop() == 0
    assert not any(alive(pid) for pid in children)
    assert up.out.empty()
    assert stat.S_IMODE(data.stat().st_mode) == 0o700
    logs = {path.name for path in (data / "logs").iterdir()}
    assert logs == {"gateway.log", "dataset.log", "explainer.log", "inference.log"}
    assert stat.S_IMODE((data / "explanations.sqlite3").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "variable",
    ["TDB_GATEWAY_PORT", "TDB_INFERENCE_PORT", "TDB_DATASET_PORT", "TDB_EXPLAINER_PORT"],
)
def test_a_busy_port_is_one_sentence(model: Path, tmp_path: Path, variable: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with Up(tdb("up", "--model", str(model)), tmp_path, **{variable: port}) as up:
            assert up.end() == 1
    assert "cannot listen on 127.0.0.1 port " + port in up.errors[-1]
    assert sum("cannot listen" in line for line in up.errors) == 1
    assert up.out.empty()
    assert not any("Traceback" in line for line in up.errors)


def test_a_folder_without_a_model_is_one_sentence(tmp_path: Path) -> None:
    with Up(tdb("up", "--model", str(tmp_path)), tmp_path) as up:
        assert up.end() == 1
    assert up.out.empty()
    assert str(tmp_path) in up.errors[-1]
    assert not any("Traceback" in line for line in up.errors)
