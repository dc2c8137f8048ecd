"""Every list that a request may hold has an end, and GetModel tells the limits.

The lists are read from the protos, so that a new one fails here until its case is written.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor
from google.protobuf.json_format import ParseDict
from tdb.inference.v1 import model_pb2, run_pb2, service_pb2

from services.common.errors import InvalidArgument
from services.inference.engine.model import Model
from services.inference.engine.text import ChatMessage
from tests.inference.helpers import CONTEXT
from tests.inference.test_refusals import OBJECTIVE, RUN

if TYPE_CHECKING:  # the stubs name it, the generated module does not
    from tdb.inference.v1.service_pb2_grpc import InferenceServiceAsyncStub as Stub

MANY = 20_000
SERVICE = service_pb2.DESCRIPTOR.services_by_name["InferenceService"]

Case = tuple[str, dict[str, Any]]


def attribute(**change: Any) -> Case:
    return "Attribute", {"run": RUN, "objective": OBJECTIVE, **change}


def edited(**operation: Any) -> Case:
    return attribute(run={**RUN, "interventions": [{"target": "attn_out.0", **operation}]})


def explained(kind: str, field: str) -> Case:
    given = {**OBJECTIVE[kind], field: REFS} if kind in OBJECTIVE else {field: REFS}
    return attribute(objective={kind: given})


REFS = [{"id": 1}] * MANY
IDS = {"tokenIds": {"ids": [1] * MANY}}
MESSAGE = {"role": "user", "content": "hi"}

# Repeated field -> a request with too many in it.
CASES: dict[str, Case] = {
    "tdb.type.v1.TokenIds.ids": ("Tokenize", {"prompt": IDS}),
    "tdb.type.v1.Chat.messages": ("Tokenize", {"prompt": {"chat": {"messages": [MESSAGE] * MANY}}}),
    "tdb.type.v1.Tensor.shape": edited(
        set={"vector": {"dataType": "DATA_TYPE_FLOAT32", "shape": [1] * MANY, "data": "AAAAAA=="}}
    ),
    "Run.interventions": attribute(
        run={**RUN, "interventions": [{"target": "attn_out.0", "zero": {}}] * MANY}
    ),
    "Positions.PositionList.positions": edited(
        positions={"list": {"positions": [0] * MANY}}, zero={}
    ),
    "Intervention.Mean.prompts": edited(mean={"prompts": [{"tokenIds": {"ids": [1]}}] * MANY}),
    "Intervention.Patch.alignment": edited(
        patch={"source": RUN, "alignment": [{"to": 0, "source": 0}] * MANY}
    ),
    "LogitDiff.targets": explained("logitDiff", "targets"),
    "LogitDiff.distractors": explained("logitDiff", "distractors"),
    "LogitMinusMean.targets": explained("logitMinusMean", "targets"),
    "LogProb.targets": explained("logProb", "targets"),
    "Prob.targets": explained("prob", "targets"),
    "AttributeRequest.dictionaries": attribute(dictionaries=["none"] * MANY),
    "RunRequest.tokens": ("Run", {"run": RUN, "tokens": REFS}),
    "RunRequest.activations": ("Run", {"run": RUN, "activations": ["resid_post.0"] * MANY}),
    "LogitLens.points": ("Run", {"run": RUN, "logitLens": {"points": ["embed"] * MANY}}),
    "StreamActivationsRequest.points": (
        "StreamActivations",
        {"run": RUN, "points": ["resid_post.0"] * MANY},
    ),
    "HarvestRequest.groups": ("Harvest", {"groups": ["neuron.0"] * MANY}),
    "HarvestRequest.sequences": (
        "Harvest",
        {
            "groups": ["neuron.0"],
            "sequences": [{"index": index, "ids": [1]} for index in range(70_000)],
        },
    ),
    "HarvestSequence.ids": (
        "Harvest",
        {"groups": ["neuron.0"], "sequences": [{"ids": [1] * MANY}]},
    ),
    "HarvestRequest.tokens": (
        "Harvest",
        {"groups": ["neuron.0"], "sequences": [{"ids": [1]}], "tokens": [1] * MANY},
    ),
    "TokenizeRequest.documents": ("Tokenize", {"documents": ["a"] * MANY}),
    "VerifyRequest.nodes": (
        "Verify",
        {"table": attribute()[1], "nodes": ["head.0.1~1"] * MANY},
    ),
    "GenerateRequest.stop": ("Generate", {"run": RUN, "stop": ["a"] * MANY}),
    "GenerateRequest.stop_tokens": ("Generate", {"run": RUN, "stopTokens": REFS}),
}


def lists(message: Descriptor, seen: set[str]) -> Iterator[str]:
    """Every repeated field below a message."""
    if message.full_name in seen:
        return
    seen.add(message.full_name)
    for field in message.fields:
        if field.is_repeated:
            yield field.full_name.removeprefix("tdb.inference.v1.")
        if field.message_type is not None:
            yield from lists(field.message_type, seen)


def test_every_list_of_a_request_has_a_case() -> None:
    seen: set[str] = set()
    found = [name for method in SERVICE.methods for name in lists(method.input_type, seen)]
    assert sorted(found) == sorted(CASES)


@pytest.mark.parametrize("name", CASES)
async def test_too_many_are_refused(stub: "Stub", name: str) -> None:
    method, tree = CASES[name]
    descriptor = SERVICE.methods_by_name[method]
    request = ParseDict(tree, message_factory.GetMessageClass(descriptor.input_type)())
    call: Any = getattr(stub, method)(request, timeout=30)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (call.read() if descriptor.server_streaming else call)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT, caught.value.details()
    assert "size" not in str(caught.value.details())


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ({"text": "a" * 1_000_001}, "1000001 characters; at most 1000000"),
        ({"chat": {"messages": [MESSAGE] * 1001}}, "1001 messages are given; at most 1000"),
        ({"tokenIds": {"ids": [1] * (CONTEXT + 1)}}, f"reads at most {CONTEXT}"),
    ],
)
async def test_long_prompts_are_refused_before_they_are_read(
    stub: "Stub", prompt: dict[str, Any], says: str
) -> None:
    request = model_pb2.TokenizeRequest()
    ParseDict({"prompt": prompt}, request)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Tokenize(request)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert says in str(caught.value.details())


async def test_a_text_that_can_be_no_token_is_not_tokenised(stub: "Stub") -> None:
    tree = {"run": RUN, "tokens": [{"text": "a" * 1001}]}
    request = run_pb2.RunRequest()
    ParseDict(tree, request)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Run(request)
    assert "1001 characters; at most 1000" in str(caught.value.details())


async def test_the_limits_are_told(stub: "Stub") -> None:
    limits = (await stub.GetModel(model_pb2.GetModelRequest())).limits
    fields = model_pb2.Limits.DESCRIPTOR.fields
    told = {field.name: getattr(limits, field.name) for field in fields}
    assert all(value > 0 for value in told.values()), told
    assert told["max_tokens"] == CONTEXT
    assert told["max_message_bytes"] == 16 * 2**20


async def test_all_messages_of_a_chat_count(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.vocabulary._tokenizer, "chat_template", "{{ messages }}")
    messages = [ChatMessage("user", "a" * 600_000)] * 2
    with pytest.raises(InvalidArgument, match="1200008 characters; at most 1000000"):
        model.vocabulary.encode_chat(messages, False)
