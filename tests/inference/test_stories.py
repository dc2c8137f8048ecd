"""A real trained Llama: its published greedy text, and the table on it."""

from pathlib import Path

import grpc.aio
import pytest
from google.protobuf.json_format import ParseDict
from tdb.inference.v1 import attribute_pb2, run_pb2, service_pb2_grpc

from services.common.settings import ModelSource, Settings
from services.inference.engine.model import Model
from services.inference.scheduler import Scheduler
from services.inference.server import build_server, load_model

pytestmark = pytest.mark.shared


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> Model:
    return load_model(ModelSource("stories", str(shared_data / "stories260k")), None)


@pytest.fixture
def settings(shared_data: Path, tmp_path: Path) -> Settings:
    source = f"stories={shared_data / 'stories260k'}"
    return Settings.from_env({"TDB_MODEL": source, "TDB_DATA_DIR": str(tmp_path)})


async def test_run_reproduces_the_published_greedy_text(
    stories: Model, settings: Settings, scheduler: Scheduler, shared_data: Path
) -> None:
    expected = (shared_data / "stories260k/EXPECTED-greedy-from-BOS.txt").read_text()
    assert stories.vocabulary.facts is not None
    ids = [stories.vocabulary.facts.bos_id or 0]
    async with (
        build_server(settings, scheduler, {"stories": stories}, port=0) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        stub = service_pb2_grpc.InferenceServiceStub(channel)
        text = ""
        while len(text) < len(expected.rstrip()):
            request = run_pb2.RunRequest(top_k=1)
            request.run.prompt.token_ids.ids.extend(ids)
            response = await stub.Run(request)
            ids.append(response.next_tokens[0].top[0].token.id)
            text = stories.vocabulary.decode(ids[1:])[0].lstrip(" ")
    assert text == expected.rstrip()[: len(text)]
    assert len(ids) > 100


async def test_attribute_works_on_it(
    stories: Model, settings: Settings, scheduler: Scheduler
) -> None:
    request = ParseDict(
        {
            "run": {
                "prompt": {"text": "Once upon a time, there was a little girl named Lily. She"}
            },
            "objective": {"logitMinusMean": {"targets": [{"id": 300}]}},
            "topK": 20,
        },
        attribute_pb2.AttributeRequest(),
    )
    async with (
        build_server(settings, scheduler, {"stories": stories}, port=0) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        response = await service_pb2_grpc.InferenceServiceStub(channel).Attribute(request)
    assert len(response.rows) == 20
    totals = response.totals
    total = totals.listed + totals.unlisted + totals.remainder
    assert total == pytest.approx(response.objective_value, abs=1e-4)
    assert not any(row.node.startswith("bias.attn") for row in response.remainder)  # it has none
