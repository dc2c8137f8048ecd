"""More than can be served: ten thousand requests at once, bodies of 100 MB, readers that do not
read. Refusals say when to come back, what was let in is answered right, memory stays bounded."""

from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
import pytest
from google.protobuf.json_format import ParseDict
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from tdb.inference.v1 import attribute_pb2, service_pb2_grpc

from gateway.app import create_app
from services.common.settings import Settings
from tests.cli.test_up import REQUEST, model
from tests.faults.process import Process
from tests.gateway.helpers import NOWHERE, listening

__all__ = ["model"]

MORE_MIB = 300.0
"""What ten thousand requests that are held or refused may add to the service, in MiB."""
BODY_BYTES = 100 * 10**6


@pytest.fixture(scope="module")
def service(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    with Process(model, tmp_path_factory.mktemp("data")) as service:
        yield service


def table(number: int = 0) -> attribute_pb2.AttributeRequest:
    """Each number is another request: equal ones would be answered together."""
    request = ParseDict(REQUEST, attribute_pb2.AttributeRequest())
    del request.run.prompt.token_ids.ids[:]
    request.run.prompt.token_ids.ids.extend((number % 64, number // 64 % 64, number // 4096))
    return request


def refusal(error: Any) -> tuple[str, float]:
    """The reason and the pause that a refusal names."""
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, error
    retry, info = error_details_pb2.RetryInfo(), error_details_pb2.ErrorInfo()
    status = rpc_status.from_call(error)
    assert status is not None, error
    for detail in status.details:
        for each in (retry, info):
            if detail.Is(each.DESCRIPTOR):
                detail.Unpack(each)
    pushback = dict(error.trailing_metadata())["grpc-retry-pushback-ms"]
    pause = retry.retry_delay.ToTimedelta().total_seconds()
    assert abs(int(pushback) / 1000 - pause) < 0.01
    return info.reason, pause


def flood(service: Process, count: int) -> None:
    """`count` requests at once from one user over many connections, as a script without a limit
    sends them."""
    before = service.mib
    options = [("grpc.use_local_subchannel_pool", 1)]
    address = f"127.0.0.1:{service.port}"
    channels = [grpc.insecure_channel(address, options) for _ in range(20)]
    stubs = [service_pb2_grpc.InferenceServiceStub(channel) for channel in channels]
    calls = [
        stubs[number % 20].Attribute.future(table(number), timeout=300) for number in range(count)
    ]
    answers: dict[int, attribute_pb2.AttributeResponse] = {}
    ends: Counter[str] = Counter()
    peak = before
    for number, call in enumerate(calls):
        if number % 100 == 0:
            peak = max(peak, service.mib)
        error = call.exception()
        if error is None:
            answers[number] = call.result()
        else:
            reason, pause = refusal(error)
            assert 0 < pause <= 60
            ends[reason] += 1
    for channel in channels:
        channel.close()
    assert set(ends) <= {"QUEUE_FULL", "SERVER_BUSY"}
    assert sum(ends.values()) == count - len(answers) > 0
    assert len(answers) >= 256
    assert peak < before + MORE_MIB
    with service.channel() as channel:
        stub = service_pb2_grpc.InferenceServiceStub(channel)
        for number, answer in answers.items():
            alone = stub.Attribute(table(number))
            assert answer.objective_value == pytest.approx(alone.objective_value, abs=1e-5)
            assert [row.node for row in answer.rows] == [row.node for row in alone.rows]


def test_a_thousand_at_once(service: Process) -> None:
    flood(service, 1_000)


@pytest.mark.long
def test_ten_thousand_at_once(service: Process) -> None:
    flood(service, 10_000)


def test_a_body_of_100_mb_over_grpc(service: Process) -> None:
    before = service.mib
    request = table()
    request.run.prompt.text = "x" * BODY_BYTES
    with service.channel() as channel:
        stub = service_pb2_grpc.InferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError) as refused:
            stub.Attribute(request, timeout=60)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "larger than max" in (refused.value.details() or "")
        assert stub.Attribute(table()).rows
    assert service.mib < before + MORE_MIB


async def test_a_body_of_100_mb_over_http(service: Process, tmp_path: Path) -> None:
    settings = Settings.from_env({"TDB_DATA_DIR": str(tmp_path)})
    app = create_app(settings, {"inference": f"127.0.0.1:{service.port}"}, NOWHERE)
    before = psutil.Process().memory_info().rss
    async with listening(app) as url, httpx.AsyncClient(timeout=60) as client:
        path = f"{url}/tdb.inference.v1.InferenceService/Attribute"

        async def pieces() -> AsyncIterator[bytes]:
            for _ in range(BODY_BYTES // 10**6):
                yield b"x" * 10**6

        json_type = {"content-type": "application/json"}
        for length in ({"content-length": str(BODY_BYTES)}, {}):  # declared, and in chunks
            response = await client.post(path, content=pieces(), headers=json_type | length)
            assert response.status_code == 400
            assert response.json()["code"] == "invalid_argument"
            assert "over the limit of 4194304 bytes" in response.json()["message"]
        assert (await client.post(path, json=REQUEST)).status_code == 200
    assert psutil.Process().memory_info().rss < before + MORE_MIB * 2**20
