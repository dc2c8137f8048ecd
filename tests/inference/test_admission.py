"""Requests that would never fit into memory: refused before they wait, saying what would fit."""

from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf.json_format import ParseDict
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from tdb.inference.v1 import (
    attribute_pb2,
    component_pb2,
    generate_pb2,
    model_pb2,
    run_pb2,
    verify_pb2,
)

from services.inference.engine.model import Model
from services.inference.scheduler import Scheduler
from tests.inference.helpers import CONTEXT
from tests.inference.test_refusals import OBJECTIVE

if TYPE_CHECKING:  # the stubs name it, the generated module does not
    from tdb.inference.v1.service_pb2_grpc import InferenceServiceAsyncStub as Stub


def run(tokens: int, *interventions: dict[str, Any]) -> dict[str, Any]:
    ids = [number % 300 for number in range(tokens)]
    return {"prompt": {"tokenIds": {"ids": ids}}, "interventions": list(interventions)}


def asked(rpc: str, stub: "Stub", tokens: int, **more: Any) -> Awaitable[Any]:
    """The call; of a stream its first message."""
    table = {"run": run(tokens), "objective": OBJECTIVE}
    match rpc:
        case "Run":
            fields = {"run": run(tokens), **more}
            return stub.Run(ParseDict(fields, run_pb2.RunRequest()))
        case "Attribute":
            fields = {**table, "topK": 1, **more}
            return stub.Attribute(ParseDict(fields, attribute_pb2.AttributeRequest()))
        case "Verify":
            fields = {"table": table, "allHeads": True, **more}
            return stub.Verify(ParseDict(fields, verify_pb2.VerifyRequest())).read()
        case "Generate":
            fields = {"run": run(tokens), "maxNewTokens": 2, **more}
            return stub.Generate(ParseDict(fields, generate_pb2.GenerateRequest())).read()
        case "StreamActivations":
            fields = {"run": run(tokens), "points": ["attn_probs.0"], **more}
            return stub.StreamActivations(
                ParseDict(fields, run_pb2.StreamActivationsRequest())
            ).read()
        case _:
            request = component_pb2.DescribeComponentRequest(component="head.0.1")
            return stub.DescribeComponent(request)


async def refused(call: Awaitable[Any]) -> tuple[str, str, dict[str, str]]:
    """Sentence, field and metadata of the refusal for want of memory."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    status = rpc_status.from_call(caught.value)
    assert status is not None
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    for detail in status.details:
        detail.Unpack(info)
        detail.Unpack(bad)
    assert info.reason == "MEMORY"
    (violation,) = bad.field_violations
    return status.message, violation.field, dict(info.metadata)


FIELDS = {
    "Run": "run.prompt",
    "Attribute": "run.prompt",
    "Verify": "table.run.prompt",
    "Generate": "run.prompt",
    "StreamActivations": "run.prompt",
    "DescribeComponent": "component",
}


@pytest.mark.parametrize("rpc", FIELDS)
async def test_what_never_fits_is_refused_before_it_waits(
    stub: "Stub", model: Model, rpc: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def entered(*_: Any) -> Any:
        raise AssertionError("it was queued")

    monkeypatch.setattr(Scheduler, "enter", entered)
    monkeypatch.setattr(model.room, "budget", 1000)
    sentence, field, metadata = await refused(asked(rpc, stub, 20))
    assert field == FIELDS[rpc]
    assert metadata["available_bytes"] == "1000"
    assert int(metadata["needed_bytes"]) > 1000
    for word in ("MiB of memory", "0 MiB are there", "TDB_ACTIVATION_MIB"):
        assert word in sentence


@pytest.mark.parametrize("rpc", [rpc for rpc in FIELDS if rpc != "DescribeComponent"])
async def test_the_longest_prompt_that_fits_is_named_and_does(
    stub: "Stub", model: Model, rpc: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.room, "budget", 1000)
    needed = [
        int((await refused(asked(rpc, stub, tokens)))[2]["needed_bytes"]) for tokens in (9, 10)
    ]
    assert needed[0] < needed[1]
    monkeypatch.setattr(model.room, "budget", needed[1] - 1)
    sentence, _, metadata = await refused(asked(rpc, stub, 10))
    fitting = int(metadata["fitting_tokens"])
    assert fitting == (9 + 2 if rpc == "Generate" else 9)
    assert f"at most {fitting} tokens fits" in sentence
    await asked(rpc, stub, 9)
    monkeypatch.setattr(model.room, "budget", needed[1])
    await asked(rpc, stub, 10)


async def test_fewer_rows_may_be_what_fits(
    stub: "Stub", model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    await asked("Attribute", stub, 20, topK=1000)
    monkeypatch.setattr(model.room, "budget", 1000)
    few, many = [
        int((await refused(asked("Attribute", stub, 20, topK=rows)))[2]["needed_bytes"])
        for rows in (100, 1000)
    ]
    monkeypatch.setattr(model.room, "budget", (few + many) // 2)
    sentence, field, metadata = await refused(asked("Attribute", stub, 20, topK=1000))
    assert field == "top_k"
    fitting = int(metadata["fitting_top_k"])
    assert 100 < fitting < 1000
    assert f"a top_k of at most {fitting} fits" in sentence
    await asked("Attribute", stub, 20, topK=fitting)


async def test_a_continuation_may_be_what_is_too_long(
    stub: "Stub", model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.room, "budget", 1000)
    long = int((await refused(asked("Generate", stub, 2, maxNewTokens=25)))[2]["needed_bytes"])
    monkeypatch.setattr(model.room, "budget", long - 1)
    _, field, _ = await refused(asked("Generate", stub, 2, maxNewTokens=25))
    assert field == "max_new_tokens"
    await asked("Generate", stub, 2, maxNewTokens=5)


async def test_a_run_that_is_patched_from_counts(
    stub: "Stub", model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch = {"source": run(CONTEXT), "alignment": [{"to": 1, "source": 1}]}
    edit = {"target": "neuron.0.1", "positions": {"list": {"positions": [1]}}, "patch": patch}
    monkeypatch.setattr(model.room, "budget", 1000)
    _, _, alone = await refused(asked("Run", stub, 3))
    monkeypatch.setattr(model.room, "budget", 2 * int(alone["needed_bytes"]))
    await asked("Run", stub, 3)
    sentence, field, _ = await refused(asked("Run", stub, 3, run=run(3, edit)))
    assert field == "run.interventions"
    assert "a run that the interventions take values from needs" in sentence


async def test_the_budget_is_told(stub: "Stub", model: Model) -> None:
    described = await stub.GetModel(model_pb2.GetModelRequest())
    assert described.limits.max_activation_bytes == model.room.budget > 2**20
