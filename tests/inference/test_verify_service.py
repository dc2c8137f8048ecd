"""`Verify` over real gRPC: its stream, its refusals, and what ends it early."""

import asyncio
import time
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf.json_format import Parse, ParseDict
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from tdb.inference.v1 import verify_pb2

from services.inference.engine import estimates, verification
from services.inference.engine.cancellation import CancelToken
from services.inference.engine.correlation import spearman
from services.inference.engine.verification import Verification, Verified
from services.inference.scheduler import Scheduler
from tests.inference.helpers import CONTEXT
from tests.inference.test_refusals import OBJECTIVE, RUN, ZERO
from tests.inference.test_service import attribute

if TYPE_CHECKING:  # the stubs name it, the generated module does not
    from tdb.inference.v1.service_pb2_grpc import InferenceServiceAsyncStub as Stub

TABLE: dict[str, Any] = {"run": RUN, "objective": OBJECTIVE}


def request(table: dict[str, Any] | None = None, **more: Any) -> verify_pb2.VerifyRequest:
    return ParseDict({"table": {**TABLE, **(table or {})}, **more}, verify_pb2.VerifyRequest())


async def collected(
    stub: "Stub", wanted: verify_pb2.VerifyRequest
) -> tuple[list[verify_pb2.VerifiedNode], verify_pb2.VerifySummary, list[int]]:
    """Nodes, the summary and the counts of progress, of a stream that ends with its summary."""
    nodes: list[verify_pb2.VerifiedNode] = []
    done: list[int] = []
    summary = None
    async for response in stub.Verify(wanted):
        assert summary is None
        match response.WhichOneof("event"):
            case "node":
                nodes.append(response.node)
            case "progress":
                assert response.progress.unit == "nodes"
                assert response.progress.done == len(nodes)
                done.append(response.progress.done)
            case "summary":
                summary = response.summary
    assert summary is not None
    return nodes, summary, done


async def test_the_tables_rows_are_verified(stub: "Stub") -> None:
    table = await stub.Attribute(attribute(topK=20))
    nodes, summary, done = await collected(stub, request({"topK": 20}))
    assert {each.node for each in nodes} == {row.node for row in table.rows}
    estimates = {row.node: row.total_effect for row in table.rows}
    for each in nodes:
        assert each.total_effect == pytest.approx(estimates[each.node], abs=1e-6)
        assert each.objective_value == pytest.approx(
            summary.objective_value - each.verified_effect, abs=1e-5
        )
    assert summary.objective_value == pytest.approx(table.objective_value, abs=1e-5)
    assert (summary.nodes, done[0], done[-1]) == (20, 0, 20)
    assert summary.rank_correlation == pytest.approx(
        spearman([each.total_effect for each in nodes], [each.verified_effect for each in nodes])
    )


async def test_a_node_is_what_attribute_gives_when_it_is_zeroed(stub: "Stub") -> None:
    base = {"target": "neuron.0.3~4", "scale": {"factor": 2.0}}
    names = ["head.1.1", "neuron.0.3", "attn.0~2", "embed~3", "head.1.0~9-3"]
    run = {**RUN, "interventions": [base]}
    nodes, summary, _ = await collected(stub, request({"run": run}, nodes=names))
    assert sorted(each.node for each in nodes) == sorted(names)
    for each in nodes:
        zeroed = {**RUN, "interventions": [base, {"target": each.node, **ZERO}]}
        alone = await stub.Attribute(attribute(run=zeroed, topK=1))
        assert each.objective_value == pytest.approx(alone.objective_value, abs=1e-5)
    (receipt,) = summary.receipts
    assert receipt.target == "neuron.0.3~4"


async def test_estimates_come_in_parts(stub: "Stub", monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["head.1.1", "neuron.0.3", "attn.0~2", "embed~3", "head.1.0~9-3"]
    together, whole, _ = await collected(stub, request(nodes=names))
    monkeypatch.setattr(estimates, "AT_ONCE", 2)
    apart, parts, _ = await collected(stub, request(nodes=names))
    for left, right in zip(together, apart, strict=True):
        assert left.node == right.node
        assert left.total_effect == pytest.approx(right.total_effect, abs=1e-6)
    assert whole.rank_correlation == parts.rank_correlation


async def test_all_heads_are_verified_whole(stub: "Stub") -> None:
    nodes, summary, _ = await collected(stub, request(allHeads=True))
    assert {each.node for each in nodes} == {f"head.{n}.{h}" for n in range(2) for h in range(2)}
    assert summary.HasField("correlation")


async def test_two_nodes_have_no_correlation(stub: "Stub") -> None:
    _, summary, _ = await collected(stub, request(nodes=["head.0.0", "head.1.0"]))
    assert not summary.HasField("rank_correlation")
    assert not summary.HasField("correlation")


@pytest.mark.parametrize(
    "wanted",
    [
        request({"topK": 5}),
        request(allHeads=True),
        request(nodes=["resid_pre.0~1", "neuron.1.2", "mlp.0"]),
    ],
    ids=["rows", "heads", "nodes"],
)
async def test_the_manifest_replays_the_result(
    stub: "Stub", wanted: verify_pb2.VerifyRequest
) -> None:
    nodes, summary, _ = await collected(stub, wanted)
    manifest = summary.manifest
    again = Parse(manifest.request_json, verify_pb2.VerifyRequest())
    replayed, other, _ = await collected(stub, again)
    assert replayed == nodes
    assert other.manifest.result_id == manifest.result_id
    assert manifest.method.endswith("/Verify")


MALFORMED: dict[str, tuple[dict[str, Any], str, str]] = {
    "no table": ({}, "table", "a table is required"),
    "no objective": ({"table": {"run": RUN}}, "table.objective", "an objective is required"),
    "compare": ({"table": {**TABLE, "compare": RUN}}, "table.compare", "one run is verified"),
    "read-outs": (
        {"table": {**TABLE, "readOuts": {"tokens": 3}}},
        "table.read_outs",
        "nodes are not read out here",
    ),
    "verify": ({"table": {**TABLE, "verify": True}}, "table.verify", "leave verify out"),
    "integrated": (
        {"table": {**TABLE, "integratedSteps": 4}},
        "table.integrated_steps",
        "not integrated",
    ),
    "two kinds of nodes": (
        {"table": TABLE, "nodes": ["embed~1"], "allHeads": True},
        "all_heads",
        "give one of nodes and all_heads",
    ),
    "a ranking of nodes": (
        {"table": {**TABLE, "topK": 5}, "nodes": ["embed~1"]},
        "table.top_k",
        "no rows are ranked",
    ),
    "a ranking of heads": (
        {"table": {**TABLE, "perKind": True}, "allHeads": True},
        "table.per_kind",
        "no rows are ranked",
    ),
    "no address": ({"table": TABLE, "nodes": ["embed~1", "hed.1"]}, "nodes[1]", "not an address"),
    "no such head": ({"table": TABLE, "nodes": ["head.1.7"]}, "nodes[0]", "valid is 0..1"),
    "no such token": (
        {"table": TABLE, "nodes": [f"embed~{CONTEXT}"]},
        "nodes[0]",
        "token position",
    ),
    "twice": (
        {"table": TABLE, "nodes": ["resid_pre.0", "embed"]},
        "nodes[1]",
        "embed is nodes[0] already",
    ),
    "too many rows": ({"table": {**TABLE, "topK": 10_001}}, "table.top_k", "at most 10000"),
}


@pytest.mark.parametrize("name", MALFORMED)
async def test_malformed_requests_say_where_and_what(name: str, stub: "Stub") -> None:
    change, path, sentence = MALFORMED[name]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collected(stub, ParseDict(change, verify_pb2.VerifyRequest()))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert sentence in (caught.value.details() or "")
    bad = error_details_pb2.BadRequest()
    for detail in rpc_status.from_call(caught.value).details:
        if detail.Is(bad.DESCRIPTOR):
            detail.Unpack(bad)
    assert bad.field_violations[0].field == path


@pytest.fixture
def slow_chunks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One node per chunk, each taking 0.1 s of the torch thread; the list has those begun."""
    begun: list[int] = []
    chunk = Verification.chunk

    def slow(self: Verification, number: int, cancel: CancelToken) -> list[Verified]:
        begun.append(number)
        time.sleep(0.1)
        return chunk(self, number, cancel)

    monkeypatch.setattr(Verification, "chunk", slow)
    monkeypatch.setattr(verification, "TOKENS_PER_CHUNK", {"cpu": 1})
    return begun


async def first_node(call: Any) -> None:
    """Reads until a node has come."""
    while not (await call.read()).HasField("node"):
        pass


async def test_others_get_in_between_chunks(stub: "Stub", slow_chunks: list[int]) -> None:
    call = stub.Verify(request({"topK": 30}))
    await first_node(call)
    await stub.Attribute(attribute())
    assert len(slow_chunks) < 10
    call.cancel()


async def test_a_caller_that_leaves_stops_it(
    stub: "Stub", scheduler: Scheduler, slow_chunks: list[int]
) -> None:
    call = stub.Verify(request({"topK": 30}))
    await first_node(call)
    call.cancel()
    await asyncio.sleep(0.3)
    await scheduler.submit(lambda cancel: None)
    ended = len(slow_chunks)
    await asyncio.sleep(0.3)
    assert len(slow_chunks) == ended < 30


async def test_a_deadline_ends_it_with_what_was_found(stub: "Stub", slow_chunks: list[int]) -> None:
    found: list[str] = []

    async def collect() -> None:
        async for response in stub.Verify(request({"topK": 30}), timeout=1.0):
            found.extend([response.node.node] if response.HasField("node") else [])

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect()
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert 0 < len(found) < 30
    await asyncio.sleep(0.3)
    assert len(slow_chunks) < 30
