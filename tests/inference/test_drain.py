"""SIGTERM at the inference service: what runs on the device is finished, new work is not begun."""

import asyncio
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf.json_format import ParseDict
from tdb.inference.v1 import attribute_pb2, generate_pb2, model_pb2, verify_pb2

from services.common.server import ServiceServer

if TYPE_CHECKING:  # the stubs name it, the generated module does not
    from tdb.inference.v1.service_pb2_grpc import InferenceServiceAsyncStub as Stub

RUN = {"prompt": {"text": "When Mary and John went"}}
TABLE = {
    "run": RUN,
    "objective": {"logitDiff": {"targets": [{"id": 5}], "distractors": [{"id": 6}]}},
    "topK": 40,
}


def verify(stub: "Stub") -> Any:
    return stub.Verify(ParseDict({"table": TABLE}, verify_pb2.VerifyRequest()))


def generate(stub: "Stub") -> Any:
    tree = {"run": RUN, "maxNewTokens": 20, "pastEnd": True}
    return stub.Generate(ParseDict(tree, generate_pb2.GenerateRequest()))


async def ask_on(stub: "Stub") -> None:
    """Asks until the server has said that it goes."""
    while True:
        await stub.GetModel(model_pb2.GetModelRequest())


@pytest.mark.parametrize("ask", [verify, generate])
async def test_a_stream_in_flight_comes_to_its_end_and_nothing_new_begins(
    stub: "Stub", server: ServiceServer, ask: Any
) -> None:
    attributing = asyncio.ensure_future(
        stub.Attribute(ParseDict(TABLE, attribute_pb2.AttributeRequest()))
    )
    messages = aiter(ask(stub))
    first = await anext(messages)
    assert first.WhichOneof("event") != "summary"
    draining = asyncio.ensure_future(server.drain())
    await asyncio.sleep(0)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await ask_on(stub)
    assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
    rest = [each async for each in messages]
    assert rest[-1].WhichOneof("event") == "summary"
    assert (await attributing).rows
    await draining
