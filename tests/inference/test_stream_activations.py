"""StreamActivations over real gRPC and over HTTP: what Run gives, in pieces."""

import asyncio
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf.json_format import Parse, ParseDict
from tdb.inference.v1 import run_pb2

from services.common.server import ServiceServer
from services.inference import request_points, stream_activations, tensors
from services.inference.scheduler import Scheduler
from tests.common.backend import SERVICE
from tests.gateway.helpers import running
from tests.inference.helpers import SENTENCE
from tests.inference.test_refusals import refusal_of

if TYPE_CHECKING:  # the stubs name it, the generated module does not
    from tdb.inference.v1.service_pb2_grpc import InferenceServiceAsyncStub as Stub

POINTS = ["attn_scores.1", "logits", "mlp_act.0", "resid_pre.0"]
RUN: dict[str, Any] = {
    "prompt": {"text": SENTENCE[:-6]},
    "interventions": [{"target": "neuron.0.3~2", "set": {"value": 1.5}}],
}


def request(**more: Any) -> run_pb2.StreamActivationsRequest:
    return ParseDict({"run": RUN, "points": POINTS, **more}, run_pb2.StreamActivationsRequest())


async def first(call: Any) -> Any:
    return await call.read()


async def test_pieces_make_up_what_run_gives(stub: "Stub", monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_activations, "CHUNK_BYTES", 1000)
    whole = await stub.Run(ParseDict({"run": RUN, "activations": POINTS}, run_pb2.RunRequest()))
    found: dict[str, bytes] = {}
    headers: list[run_pb2.PointHeader] = []
    sizes: list[int] = []
    async for message in stub.StreamActivations(request()):
        match message.WhichOneof("event"):
            case "point":
                headers.append(message.point)
                found[message.point.point] = b""
            case "chunk":
                found[headers[-1].point] += message.chunk
                sizes.append(len(message.chunk))
            case "progress":
                assert message.progress.done == len(headers)
                assert (message.progress.total, message.progress.unit) == (4, "points")
            case "summary":
                summary = message.summary
    assert max(sizes) == 1000
    assert len(sizes) > 20
    for header, expected in zip(headers, whole.activations, strict=True):
        assert header.point == expected.point
        assert header.axes == expected.axes
        assert header.data_type == expected.tensor.data_type
        assert header.shape == expected.tensor.shape
        assert found[header.point] == expected.tensor.data
    assert summary.receipts == whole.receipts
    assert list(summary.manifest.token_ids[0].ids) == [each.id for each in whole.tokens]
    canonical = json.loads(summary.manifest.request_json)
    assert canonical["points"] == ["attn_scores.1", "logits", "mlp_act.0", "embed"]
    assert canonical["model"] == "tiny"
    replay = Parse(summary.manifest.request_json, run_pb2.StreamActivationsRequest())
    messages = [message async for message in stub.StreamActivations(replay)]
    assert messages[-1].summary.manifest.result_id == summary.manifest.result_id


async def test_other_calls_get_in_between_and_a_cancelled_stream_stops(
    stub: "Stub", scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = 0
    closed = asyncio.Event()

    def large(tensor: Any, size: int) -> Iterator[bytes]:
        nonlocal cut
        try:
            for _ in range(200):
                cut += 1
                yield bytes(2**20)
        finally:
            closed.set()

    monkeypatch.setattr(tensors, "pieces", large)
    call = stub.StreamActivations(request())
    assert (await first(call)).HasField("progress")
    assert (await first(call)).HasField("point")
    # Nobody reads on: flow control stops the stream, and the device is free meanwhile.
    await asyncio.wait_for(scheduler.submit(lambda cancel: None), 5)
    await asyncio.sleep(0.3)
    assert cut < 50
    assert not closed.is_set()
    call.cancel()
    await asyncio.wait_for(closed.wait(), 5)
    assert cut < 50
    assert (await stub.Run(ParseDict({"run": RUN}, run_pb2.RunRequest()))).next_tokens


async def test_it_comes_as_server_sent_events(server: ServiceServer) -> None:
    tree = {"run": RUN, "points": ["resid_post.1"]}
    headers = {"accept": "text/event-stream"}
    async with running(f"127.0.0.1:{server.port}") as (_, client):
        response = await client.post(f"/{SERVICE}/StreamActivations", json=tree, headers=headers)
    events = [json.loads(line[6:]) for line in response.text.splitlines() if line[:5] == "data:"]
    assert [*events[0]] == ["progress"]
    assert events[1]["point"]["axes"] == ["token", "channel"]
    assert [*events[-2]] == ["summary"]
    assert events[-1] == {}


MALFORMED: dict[str, tuple[dict[str, Any], str, str]] = {
    "no run": ({"run": {}}, "run.prompt", "a prompt is required"),
    "no points": ({"points": []}, "points", "at least one point is required"),
    "no such point": ({"points": ["logits", "mlp.0"]}, "points[1]", "is not a point"),
    "twice": ({"points": ["logits", "logits"]}, "points[1]", "listed twice"),
}


@pytest.mark.parametrize("name", MALFORMED)
async def test_malformed_requests_are_refused(name: str, stub: "Stub") -> None:
    change, path, sentence = MALFORMED[name]
    code, field, message = await refusal_of(first(stub.StreamActivations(request(**change))))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert field == path
    assert sentence in message


async def test_more_than_a_stream_carries_is_refused_before_it_runs(
    stub: "Stub", scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_points, "MAX_STREAM_BYTES", 10_000)
    monkeypatch.setattr(scheduler, "submit", None)
    code, field, message = await refusal_of(first(stub.StreamActivations(request())))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert field == "points"
    assert "one call sends at most 10,000" in message
