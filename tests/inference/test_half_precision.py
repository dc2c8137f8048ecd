"""A model served in half precision says so wherever effects are given."""

from pathlib import Path
from typing import TYPE_CHECKING

import grpc.aio
import pytest
import torch
from google.protobuf.json_format import ParseDict
from tdb.inference.v1 import attribute_pb2, model_pb2, service_pb2_grpc, verify_pb2
from tdb.type.v1 import tensor_pb2

from services.common.settings import ModelSource, Settings
from services.inference.scheduler import Scheduler
from services.inference.server import build_server, load_model

if TYPE_CHECKING:  # the stubs name it, the generated module does not
    from tdb.inference.v1.service_pb2_grpc import InferenceServiceAsyncStub


@pytest.mark.parametrize("data_type", ["float32", "bfloat16", "float16"])
async def test_effects_in_half_precision_carry_a_warning(
    data_type: str, model_folder: Path, scheduler: Scheduler, tmp_path: Path
) -> None:
    settings = Settings.from_env(
        {
            "TDB_MODEL": f"tiny={model_folder}",
            "TDB_DATA_DIR": str(tmp_path),
            "TDB_DTYPE": data_type,
        }
    )
    dtype = getattr(torch, settings.data_type)
    model = load_model(ModelSource("tiny", str(model_folder)), None, dtype=dtype)
    request = ParseDict(
        {
            "run": {"prompt": {"tokenIds": {"ids": [3, 5, 7]}}},
            "objective": {"logitDiff": {"targets": [{"id": 4}]}},
        },
        attribute_pb2.AttributeRequest(),
    )
    async with build_server(settings, scheduler, {"tiny": model}, port=0) as server:
        await server.set_serving()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            stub: InferenceServiceAsyncStub = service_pb2_grpc.InferenceServiceStub(channel)
            described = await stub.GetModel(model_pb2.GetModelRequest())
            manifest = (await stub.Attribute(request)).manifest
            heads = verify_pb2.VerifyRequest(table=request, all_heads=True)
            *_, last = [response async for response in stub.Verify(heads)]
    name = f"DATA_TYPE_{data_type.upper()}"
    assert tensor_pb2.DataType.Name(described.data_type) == name
    assert tensor_pb2.DataType.Name(manifest.data_type) == name
    for found in (manifest, last.summary.manifest):
        half = any("half precision" in warning for warning in found.warnings)
        assert half is (data_type != "float32")
