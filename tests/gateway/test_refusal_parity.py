"""A malformed request is refused over HTTP as it is over gRPC: same code, field path and sentence.

The cases are those of the inference service's own test. Both ways lead to one real service.
"""

import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc.aio
import httpx
import pytest
from google.protobuf.json_format import ParseDict
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from tdb.inference.v1 import (
    attribute_pb2,
    component_pb2,
    model_pb2,
    run_pb2,
    service_pb2_grpc,
)

from gateway import messages
from services.common.server import ServiceServer
from tests.common.backend import SERVICE
from tests.gateway.helpers import running
from tests.inference import test_components, test_points
from tests.inference.conftest import model, model_folder, scheduler, server
from tests.inference.test_refusals import MALFORMED, OBJECTIVE, RUN

__all__ = ["model", "model_folder", "scheduler", "server"]  # fixtures

SAME_ID = (("x-request-id", "click-1"),)

REQUESTS: dict[str, Any] = {
    "Attribute": attribute_pb2.AttributeRequest,
    "DescribeComponent": component_pb2.DescribeComponentRequest,
    "GetModel": model_pb2.GetModelRequest,
    "Run": run_pb2.RunRequest,
    "Tokenize": model_pb2.TokenizeRequest,
}


def attribute(change: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    merged = {"run": RUN, "objective": OBJECTIVE, **change}
    return "Attribute", {name: value for name, value in merged.items() if value is not None}


CHAT = {"messages": [{"role": "user", "content": "hi"}]}

READ_OUTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        f"run: {name}": ("Run", {"run": test_points.RUN, **change})
        for name, (change, *_) in test_points.MALFORMED.items()
    },
    **{
        f"describe: {name}": ("DescribeComponent", {"component": "head.1.0", **change})
        for name, (change, *_) in test_components.MALFORMED.items()
    },
}

# Name -> (method, the request as JSON).
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: attribute(change) for name, (change, *_) in MALFORMED.items()},
    **READ_OUTS,
    "run: position out of range": ("Run", {"run": RUN, "positions": {"start": 99}}),
    "run: nothing": ("Run", {}),
    "tokenize: nothing": ("Tokenize", {}),
    "unknown model": ("GetModel", {"model": "nope"}),
    "a model that is not loaded": ("GetModel", {"model": "later"}),
    "chat without a template": attribute({"run": {"prompt": {"chat": CHAT}}}),
}


@dataclass(frozen=True)
class Refusal:
    """A refusal as its caller sees it, by whichever way it came."""

    code: str
    message: str
    fields: tuple[str, ...]
    details: tuple[tuple[str, bytes], ...]  # all of them: (type, bytes)


def _refusal(code: str, message: str, details: list[tuple[str, bytes]]) -> Refusal:
    fields = [
        violation.field
        for kind, value in details
        if kind == "google.rpc.BadRequest"
        for violation in error_details_pb2.BadRequest.FromString(value).field_violations
    ]
    return Refusal(code, message, tuple(fields), tuple(details))


class Both:
    """One service, asked over gRPC and over HTTP."""

    def __init__(self, channel: grpc.aio.Channel, client: httpx.AsyncClient) -> None:
        self._stub: Any = service_pb2_grpc.InferenceServiceStub(channel)
        self._client = client

    async def over_grpc(self, method: str, tree: dict[str, Any]) -> Refusal:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await getattr(self._stub, method)(ParseDict(tree, REQUESTS[method]()), metadata=SAME_ID)
        status: status_pb2.Status = rpc_status.from_call(caught.value)
        details = [(each.TypeName(), each.value) for each in status.details]
        return _refusal(caught.value.code().name.lower(), caught.value.details() or "", details)

    async def over_http(self, method: str, body: dict[str, Any] | bytes) -> Refusal:
        url = f"/{SERVICE}/{method}"
        if isinstance(body, bytes):
            headers = {"content-type": "application/json"}
            response = await self._client.post(url, content=body, headers=headers)
        else:
            response = await self._client.post(url, json=body, headers=SAME_ID)
        assert response.status_code >= 400
        tree = response.json()
        details = [
            (each["type"], base64.b64decode(each["value"] + "=" * (-len(each["value"]) % 4)))
            for each in tree["details"]
        ]
        return _refusal(tree["code"], tree["message"], details)


@asynccontextmanager
async def both_ways(server: ServiceServer) -> AsyncIterator[Both]:
    address = f"127.0.0.1:{server.port}"
    async with grpc.aio.insecure_channel(address) as channel, running(address) as (_, client):
        yield Both(channel, client)


def test_there_are_enough_cases() -> None:
    assert len(CASES) == len(MALFORMED) + len(READ_OUTS) + 6
    assert len(CASES) >= 60


@pytest.mark.parametrize("name", CASES)
async def test_both_ways_refuse_alike(name: str, server: ServiceServer) -> None:
    method, tree = CASES[name]
    async with both_ways(server) as both:
        over_grpc = await both.over_grpc(method, tree)
        over_http = await both.over_http(method, tree)
    assert over_http == over_grpc
    assert over_grpc.message
    expected = MALFORMED.get(name)
    if expected is not None:
        assert over_http.code == "invalid_argument"
        assert over_http.fields == (expected[1],)
        assert expected[2] in over_http.message


async def test_different_refusals_do_not_compare_equal(server: ServiceServer) -> None:
    async with both_ways(server) as both:
        seen = {await both.over_grpc(*CASES[name]) for name in MALFORMED}
        over_http = await both.over_http(*CASES["top_k 0"])
        assert over_http != await both.over_grpc(*CASES["top_k too large"])
    assert over_http in seen
    assert len(seen) > len(MALFORMED) * 0.9


async def test_a_gateway_with_its_own_sentence_would_be_noticed(
    server: ServiceServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(messages, "_NON_FINITE", ())
    async with both_ways(server) as both:
        over_grpc = await both.over_grpc(*CASES["NaN"])
        over_http = await both.over_http(*CASES["NaN"])
    assert over_http.fields == over_grpc.fields
    assert over_http != over_grpc


@pytest.mark.parametrize(
    ("body", "field", "sentence"),
    [
        (b'{"bogus": 1}', "bogus", "tdb.inference.v1.AttributeRequest has no field 'bogus'"),
        (b'{"run": {"promt": {}}}', "run.promt", "tdb.inference.v1.Run has no field 'promt'"),
        (b'{"run": {"prompt": "a"}}', "run.prompt", "must be an object, not a string"),
        (b'{"topK": "ten"}', "top_k", "must be a whole number, not a string"),
        (b'{"topK": 3000000000}', "top_k", "must be a whole number from -2147483648"),
        (b'{"verify": 1}', "verify", "must be true or false, not 1"),
        (b'{"normMode": "LIVE"}', "norm_mode", "must be one of NORM_MODE_UNSPECIFIED"),
        (b'{"model": "a", "model": "b"}', "model", "model is given twice"),
        (b'{"topK": 1, "top_k": 1}', "top_k", "top_k is given twice"),
        (b'{"topK": NaN}', None, "NaN is not a JSON number"),
        (b'{"topK": 1', None, "the body is not JSON"),
        (b"\xff\xfe", None, "the body is not"),
        (b"[]", None, "the body must be an object, not a list"),
    ],
)
async def test_what_only_json_can_get_wrong(
    body: bytes, field: str | None, sentence: str, server: ServiceServer
) -> None:
    async with both_ways(server) as both:
        refusal = await both.over_http("Attribute", body)
    assert refusal.code == "invalid_argument"
    assert refusal.fields == (() if field is None else (field,))
    assert sentence in refusal.message
