"""Resident memory, descriptors and threads of the service over many requests of every kind, with
refusals, clients that leave and deadlines that pass among them: flat."""

import contextlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.json_format import ParseDict
from tdb.inference.v1 import (
    attribute_pb2,
    component_pb2,
    generate_pb2,
    model_pb2,
    run_pb2,
    service_pb2_grpc,
    verify_pb2,
)

from tests.cli.test_up import model
from tests.faults.process import Process

__all__ = ["model"]

Stub = service_pb2_grpc.InferenceServiceStub
CLIENTS = 4
TOLERANCE_MIB = 12.0
"""What allocators may keep; a leak of 2 KiB per request would be over it in the long test."""

POOL = min(32, (os.cpu_count() or 1) + 4)
"""Threads that asyncio starts when they are first needed at once, and keeps."""


def run_of(number: int) -> dict[str, Any]:
    """A prompt of 1 to 12 tokens, and an edit now and then; different for each number."""
    ids = [number % 64, *((number * 7 + place) % 64 for place in range(number % 12))]
    run: dict[str, Any] = {"prompt": {"tokenIds": {"ids": ids}}}
    if number % 3 == 0:
        run["interventions"] = [{"target": f"neuron.1.{number % 64}", "zero": {}}]
    return run


def table_of(number: int) -> attribute_pb2.AttributeRequest:
    objective = {"logitDiff": {"targets": [{"id": 4}], "distractors": [{"id": 5}]}}
    tree = {"run": run_of(number), "objective": objective, "topK": 5}
    return ParseDict(tree, attribute_pb2.AttributeRequest())


def attribute(stub: Stub, number: int) -> None:
    request = table_of(number)
    if number % 5 == 0:
        request.read_outs.tokens = 3
        request.compare.CopyFrom(request.run)
    stub.Attribute(request)


def run(stub: Stub, number: int) -> None:
    stub.Run(ParseDict({"run": run_of(number), "logitLens": {}}, run_pb2.RunRequest()))


def verify(stub: Stub, number: int) -> None:
    assert len(list(stub.Verify(verify_pb2.VerifyRequest(table=table_of(number))))) >= 5


def generation(number: int) -> generate_pb2.GenerateRequest:
    tree = {"run": run_of(number), "maxNewTokens": 6}
    return ParseDict(tree, generate_pb2.GenerateRequest())


def generate(stub: Stub, number: int) -> None:
    list(stub.Generate(generation(number)))


def stream(stub: Stub, number: int) -> None:
    tree = {"run": run_of(number), "points": ["logits", "attn_probs.1", "mlp_act.0"]}
    list(stub.StreamActivations(ParseDict(tree, run_pb2.StreamActivationsRequest())))


def describe(stub: Stub, number: int) -> None:
    stub.DescribeComponent(
        component_pb2.DescribeComponentRequest(component=f"neuron.0.{number % 64}")
    )


def facts(stub: Stub, number: int) -> None:
    stub.GetModel(model_pb2.GetModelRequest())


def refused(stub: Stub, number: int) -> None:
    request = table_of(number)
    request.run.interventions.add(target="neuron.9.9").zero.SetInParent()
    stub.Attribute(request)


def overflowing(stub: Stub, number: int) -> None:
    request = table_of(number)
    request.run.interventions.add(target="mlp.0").scale.factor = 1e38
    stub.Attribute(request)


def leaving(stub: Stub, number: int) -> None:
    call = stub.Verify(verify_pb2.VerifyRequest(table=table_of(number)))
    next(call)
    call.cancel()


def late(stub: Stub, number: int) -> None:
    for _ in stub.Generate(generation(number), timeout=0.002):
        pass


ENDS: dict[Callable[[Stub, int], None], set[str]] = {
    attribute: {"OK"},
    run: {"OK"},
    verify: {"OK"},
    generate: {"OK"},
    stream: {"OK"},
    describe: {"OK"},
    facts: {"OK"},
    refused: {"INVALID_ARGUMENT"},
    overflowing: {"FAILED_PRECONDITION", "OK"},
    leaving: {"OK"},
    late: {"DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "OK"},
}
"""How each kind of request may end."""


@pytest.fixture
def service(model: Path, tmp_path: Path) -> Iterator[Process]:
    with Process(model, tmp_path, TDB_CACHE_MIB="1") as service:
        yield service


def send(service: Process, numbers: range) -> Counter[tuple[str, str]]:
    """One request of each kind in turn, from a few clients at once; how they ended."""
    kinds = list(ENDS)
    ends: Counter[tuple[str, str]] = Counter()

    def one(number: int) -> None:
        kind = kinds[number % len(kinds)]
        code = "OK"
        try:
            kind(stub, number)
        except grpc.RpcError as error:
            code = error.code().name
        ends[kind.__name__, code] += 1

    with service.channel() as channel, ThreadPoolExecutor(CLIENTS) as clients:
        stub = Stub(channel)
        for _ in clients.map(one, numbers):
            pass
    return ends


def held(service: Process) -> tuple[int, int]:
    """Descriptors and threads, once what was left has been cleared away."""
    time.sleep(0.5)
    return service.usage.num_fds(), service.usage.num_threads()


def flat(service: Process, count: int) -> None:
    send(service, range(count // 5))
    warm, resting = service.mib, held(service)
    ends = send(service, range(count // 5, count))
    for kind, allowed in ENDS.items():
        found = {code for name, code in ends if name == kind.__name__}
        assert found <= allowed
        assert found
    assert service.mib - warm < TOLERANCE_MIB
    after = held(service)
    assert after[0] <= resting[0]
    assert after[1] <= resting[1] + POOL
    assert not service.usage.children()
    with contextlib.suppress(IndexError):
        pytest.fail(service.errors[0])


def test_six_hundred_requests(service: Process) -> None:
    flat(service, 600)


@pytest.mark.long
def test_ten_thousand_requests(service: Process) -> None:
    flat(service, 10_000)
