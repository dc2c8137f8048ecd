"""Random requests of every RPC over gRPC: answers or refusals, never INTERNAL, UNKNOWN or silence.

1,000 requests in `make test`, 20,000 in `make test-long`. The requests come from the protos'
descriptors (`random_messages`), so a new RPC or field is among them without a word here.
"""

import math
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import grpc
import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tdb.dataset.v1 import service_pb2 as dataset_pb2
from tdb.explainer.v1 import explanation_pb2
from tdb.explainer.v1 import service_pb2 as explainer_pb2
from tdb.explainer.v1 import service_pb2_grpc as explainer_grpc
from tdb.inference.v1 import service_pb2 as inference_pb2

from services.common.errors import TdbError
from services.explainer.engine.components import Component
from services.inference.engine.model import Model
from tests.dataset import helpers
from tests.explainer import stack, synthetic
from tests.explainer.openai_server import OpenAIServer, Said
from tests.faults import served
from tests.faults.conftest import WORLD
from tests.faults.random_messages import requests, spoiled
from tests.faults.served import in_thread

FEW, MANY = 1_000, 20_000
AT_ONCE = 6
HANG_S = 60.0
# What needs the model or a data set stands for more of the requests than what only looks it up.
CHEAP = {"ListModels", "GetModel", "GetQueue", "GetStatus", "Tokenize", "ListDatasets"}
CHEAP |= {"BuildDataset", "CancelBuild", "ImportDataset", "DeleteDataset"}
CHEAP |= {"GetCapabilities", "DeleteExplanation", "GetJob", "ListJobs", "FollowJob", "PauseJob"}
CHEAP |= {"ResumeJob", "CancelJob", "ImportExplanations", "EmbedExplanations"}
REFUSALS = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNIMPLEMENTED,
}


Refusal = tuple[grpc.StatusCode, str]


NEEDED = {"Run", "Attribute", "Verify", "Generate", "StreamActivations", "DescribeComponent"} | {
    "GetRecord",
    "StreamRecords",
    "Harvest",
    "StreamOutputTokens",
    "StreamExplanations",
    "Search",
    "Explain",
    "Score",
    "Simulate",
    "ListExplanations",
    "WriteExplanation",
    "RateExplanation",
}
"""RPCs that must have been answered, not only refused."""


class Caller:
    """Sends any RPC of a service as bytes, and counts how the calls ended."""

    def __init__(self, channel: grpc.Channel, service: ServiceDescriptor) -> None:
        self._channel = channel
        self.rpcs = list(service.methods)
        self.world = WORLD
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


@contextmanager
def caller_of(port: int, service: ServiceDescriptor) -> Iterator[Caller]:
    with grpc.insecure_channel(
        f"127.0.0.1:{port}", [("grpc.max_receive_message_length", -1)]
    ) as channel:
        caller = Caller(channel, service)
        with caller.clients:
            yield caller


@pytest.fixture(scope="module")
def inference(models: dict[str, Model]) -> Iterator[Caller]:
    service = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"]
    with in_thread(served.inference(models)) as port, caller_of(port, service) as caller:
        yield caller


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Caller]:
    folder = tmp_path_factory.mktemp("datasets")
    helpers.write(folder / "small", helpers.random_records(2, helpers.COMPONENTS))
    service = dataset_pb2.DESCRIPTOR.services_by_name["DatasetService"]
    with in_thread(helpers.serving(folder)) as port, caller_of(port, service) as caller:
        yield caller


@pytest.fixture(scope="module")
def explainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Caller]:
    """With a language model that follows explanations, and texts in its store."""
    few = replace(synthetic.component(count=6), address="neuron.1.9")
    components = [synthetic.component(count=60), few, synthetic.head()]
    folder = tmp_path_factory.mktemp("explanations")
    service = explainer_pb2.DESCRIPTOR.services_by_name["ExplainerService"]
    with (
        OpenAIServer(_follow) as model,
        in_thread(stack.serving(folder, components, model)) as port,
        caller_of(port, service) as caller,
    ):
        caller.world = replace(
            WORLD,
            models=("demo",),
            components=(*(each.address for each in components), "neuron.1.8"),
            explanations=tuple(_written(port, components)),
        )
        yield caller


def _follow(body: dict[str, Any]) -> Said | str:
    """Follows the explanations that can be followed; any other question gets the same answer."""
    try:
        return synthetic.follower()(body)
    except (AttributeError, KeyError, ValueError, IndexError, AssertionError, TdbError):
        return '{"explanation": "fires on names"}'


def _written(port: int, components: list[Component]) -> Iterator[str]:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub: Any = explainer_grpc.ExplainerServiceStub(channel)
        for number in range(60):
            request = explanation_pb2.WriteExplanationRequest(
                model=explanation_pb2.ExplainedModel(id="demo"),
                component=components[0 if number % 6 else number // 6 % 3].address,
                text=synthetic.NAMES,
            )
            yield stub.WriteExplanation(request).explanation.id


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
    weighted = [rpc for rpc in caller.rpcs for _ in range(1 if rpc.name in CHEAP else 6)]
    for _ in range(data.draw(st.sampled_from((1, 2, 4, AT_ONCE)))):
        rpc = data.draw(st.sampled_from(weighted))
        request = data.draw(requests(rpc.input_type, caller.world))
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
    # Not all refused at the door.
    assert sum(answered.values()) > total / 5
    assert answered.keys() >= NEEDED & {rpc.name for rpc in caller.rpcs}


def test_random_requests_are_answered_or_refused(inference: Caller) -> None:
    fuzz(inference, FEW)


@pytest.mark.long
def test_many_random_requests_are_answered_or_refused(inference: Caller) -> None:
    fuzz(inference, MANY)


def test_random_requests_to_datasets_are_answered_or_refused(dataset: Caller) -> None:
    fuzz(dataset, FEW // 3)


@pytest.mark.long
def test_many_random_requests_to_datasets_are_answered_or_refused(dataset: Caller) -> None:
    fuzz(dataset, MANY // 3)


def test_random_requests_for_explanations_are_answered_or_refused(explainer: Caller) -> None:
    fuzz(explainer, FEW // 3)


@pytest.mark.long
def test_many_random_requests_for_explanations_are_answered_or_refused(explainer: Caller) -> None:
    fuzz(explainer, MANY // 3)
