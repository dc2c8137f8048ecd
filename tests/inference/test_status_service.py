"""GetStatus over the real service."""

from typing import TYPE_CHECKING

import pytest
import torch
from tdb.inference.v1 import status_pb2

if TYPE_CHECKING:  # the stubs name it, the generated module does not
    from tdb.inference.v1.service_pb2_grpc import InferenceServiceAsyncStub


async def test_the_service_says_how_it_is(stub: "InferenceServiceAsyncStub") -> None:
    first = await stub.GetStatus(status_pb2.GetStatusRequest())
    second = await stub.GetStatus(status_pb2.GetStatusRequest())
    assert 0 <= first.uptime_s < second.uptime_s < 60
    if torch.cuda.is_available():
        pytest.skip("what a CUDA device holds depends on it")
    (memory,) = first.device_memory
    assert (memory.device, memory.kind) == ("cpu", "resident")
    assert 50 * 2**20 < memory.bytes < 100 * 2**30
