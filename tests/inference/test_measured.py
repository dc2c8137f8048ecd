"""The verified and integrated columns of `Attribute` over real gRPC."""

from typing import TYPE_CHECKING

import pytest
from google.protobuf.json_format import Parse
from tdb.inference.v1 import attribute_pb2

from tests.inference.test_refusals import RUN, ZERO
from tests.inference.test_service import PROMPT, attribute
from tests.inference.test_verify_service import collected, request

if TYPE_CHECKING:  # the stubs name it, the generated module does not
    from tdb.inference.v1.service_pb2_grpc import InferenceServiceAsyncStub as Stub


async def test_the_verified_column_is_what_verify_streams(stub: "Stub") -> None:
    table = await stub.Attribute(attribute(topK=20, verify=True))
    nodes, summary, _ = await collected(stub, request({"topK": 20}))
    streamed = {each.node: each.verified_effect for each in nodes}
    for row in table.rows:
        assert row.verified_effect == pytest.approx(streamed[row.node], abs=1e-6)
    assert table.rank_correlation == pytest.approx(summary.rank_correlation)


async def test_columns_are_absent_unless_asked_for(stub: "Stub") -> None:
    table = await stub.Attribute(attribute(topK=5))
    assert not table.HasField("rank_correlation")
    assert not any(row.HasField("verified_effect") for row in table.rows)
    assert not any(row.HasField("integrated_effect") for row in table.rows)


async def test_of_two_runs_the_first_is_verified(stub: "Stub") -> None:
    ablated = {"prompt": PROMPT, "interventions": [{"target": "head.1.0", "zero": {}}]}
    table = await stub.Attribute(
        attribute(run=ablated, compare={"prompt": PROMPT}, verify=True, topK=100)
    )
    assert all(row.HasField("verified_effect") for row in table.rows)
    dead = [row for row in table.rows if row.node.startswith("head.1.0~")]
    assert dead
    assert all(row.verified_effect == pytest.approx(0, abs=1e-5) for row in dead)


async def test_integrated_rows_of_a_sublayer_add_up_to_its_removal(stub: "Stub") -> None:
    last = len((await stub.Attribute(attribute())).tokens) - 1
    pairs = 2 * 2 * (last + 1) * (last + 2) // 2
    heads = attribute(topK=pairs + 200, perKind=True, integratedSteps=64)
    table = await stub.Attribute(heads)
    rows = [row for row in table.rows if row.node.startswith("head.1.")]
    assert len(rows) == pairs // 2
    zeroed = [{"target": f"head.1.{head}", **ZERO} for head in (0, 1)]
    without = await stub.Attribute(attribute(run={**RUN, "interventions": zeroed}))
    change = table.objective_value - without.objective_value
    assert sum(row.integrated_effect for row in rows) == pytest.approx(change, rel=1e-2)
    assert sum(row.total_effect for row in rows) != pytest.approx(change, rel=1e-2)


async def test_the_manifest_replays_both_columns(stub: "Stub") -> None:
    first = await stub.Attribute(attribute(topK=6, verify=True, integratedSteps=3))
    again = Parse(first.manifest.request_json, attribute_pb2.AttributeRequest())
    second = await stub.Attribute(again)
    assert second.rows == first.rows
    assert second.manifest.result_id == first.manifest.result_id
