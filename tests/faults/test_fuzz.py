"""Random requests of every RPC over gRPC: answers or refusals, never INTERNAL, UNKNOWN or silence.

1,500 requests in `make test`, 20,000 in `make test-long`. The requests come from the protos'
descriptors (`random_messages`), so a new RPC or field is among them without a word here.
"""

import math
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tdb.inference.v1 import service_pb2

from services.inference.engine.model import Model
from tests.faults.conftest import WORLD
from tests.faults.random_messages import requests, spoiled
from tests.faults.served import service

FEW, MANY = 1_500, 20_000
AT_ONCE = 6
HANG_S = 60.0
RPCS = [
    method
    for name in service_pb2.DESCRIPTOR.services_by_name
    for method in service_pb2.DESCRIPTOR.services_by_name[name].methods
]
# What needs the model stands for more of the requests than what only looks it up.
CHEAP = ("ListModels", "GetModel", "Tokenize")
WEIGHTED = [rpc for rpc in RPCS for _ in range(1 if rpc.name in CHEAP else 6)]
REFUSALS = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNIMPLEMENTED,
}


Refusal = tuple[grpc.StatusCode, str]


class Caller:
    """Sends any RPC as bytes, and counts how the calls ended."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel
        self.clients = ThreadPoolExecutor(AT_ONCE)
        self.ends: Counter[tuple[str, str]] = Counter()

    def call(self, rpc: MethodDescriptor, data: bytes) -> tuple[list[Message], Refusal | None]:
        """The answers, of a stream as many as came, and how it was refused if it was."""
        path = f"/{rpc.containing_service.full_name}/{rpc.name}"
        answer = message_factory.GetMessageClass(rpc.output_type).FromString
        answers: list[Message] = []
        refusal = None
        try:
            if rpc.server_streaming:
                streamed: Any = self._channel.unary_stream(path, response_deserializer=answer)
                answers.extend(streamed(data, timeout=HANG_S))
            else:
                unary: Any = self._channel.unary_unary(path, response_deserializer=answer)
                answers.append(unary(data, timeout=HANG_S))
        except grpc.RpcError as error:
            refusal = (error.code(), error.details() or "")
        self.ends[rpc.name, refusal[0].name if refusal else "OK"] += 1
        return answers, refusal


@pytest.fixture(scope="module")
def caller(models: dict[str, Model]) -> Iterator[Caller]:
    names = ",".join(f"{name}=/" for name in models)
    with (
        service(models, TDB_MODEL=names) as port,
        grpc.insecure_channel(
            f"127.0.0.1:{port}", [("grpc.max_receive_message_length", -1)]
        ) as channel,
    ):
        caller = Caller(channel)
        with caller.clients:
            yield caller


def not_finite(message: Message, path: str = "") -> Iterator[str]:
    """The fields of an answer that hold NaN or infinity."""
    for each, value in message.ListFields():
        values = value if each.is_repeated else [value]
        name = f"{path}.{each.name}"
        if each.message_type is not None:
            for item in values:
                yield from not_finite(item, name)
        elif each.cpp_type in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
            yield from (f"{name} = {item}" for item in values if not math.isfinite(item))


def check(caller: Caller, data: st.DataObject) -> None:
    """Sends a few requests at once, so that some share a pass."""
    sent = []
    for _ in range(data.draw(st.sampled_from((1, 2, 4, AT_ONCE)))):
        rpc = data.draw(st.sampled_from(WEIGHTED))
        request = data.draw(requests(rpc.input_type, WORLD))
        raw = request.SerializeToString()
        if data.draw(st.integers(0, 19)) == 13:
            raw = data.draw(spoiled(raw))
        sent.append((rpc, request, raw))
    ends = caller.clients.map(lambda each: caller.call(each[0], each[2]), sent)
    for (rpc, request, _), (answers, refusal) in zip(sent, ends, strict=True):
        if refusal is not None:
            code, sentence = refusal
            assert code in REFUSALS, f"{rpc.name}: {code} {sentence}\n{request}"
            assert sentence, f"{rpc.name}: {code}\n{request}"
        for answer in answers:
            assert not list(not_finite(answer)), f"{rpc.name}\n{request}"


def fuzz(caller: Caller, examples: int) -> None:
    caller.ends.clear()

    @settings(
        max_examples=examples // 3 + 100,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def run(data: st.DataObject) -> None:
        check(caller, data)

    run()
    total = sum(caller.ends.values())
    answered = Counter(name for name, code in caller.ends.elements() if code == "OK")
    assert total >= examples
    # Not all refused at the door: every RPC was answered, and a fair part of all requests.
    assert set(answered) == {rpc.name for rpc in RPCS}
    assert sum(answered.values()) > total / 5


def test_random_requests_are_answered_or_refused(caller: Caller) -> None:
    fuzz(caller, FEW)


@pytest.mark.long
def test_many_random_requests_are_answered_or_refused(caller: Caller) -> None:
    fuzz(caller, MANY)
