"""Tracing and directions over gRPC."""

from typing import TYPE_CHECKING, Any

import pytest
from google.protobuf.json_format import Parse, ParseDict
from tdb.inference.v1 import attribute_pb2, run_pb2, verify_pb2

if TYPE_CHECKING:  # the stubs name it, the generated module does not
    from tdb.inference.v1.service_pb2_grpc import InferenceServiceAsyncStub as Stub

PROMPT = {"text": "When Mary and John went to the store, John gave a drink to"}
LOGIT_DIFF = {
    "logitDiff": {"targets": [{"text": " Mary"}], "distractors": [{"text": " John"}]},
}


def attribute(objective: dict[str, Any], **more: Any) -> attribute_pb2.AttributeRequest:
    wanted = {"run": {"prompt": PROMPT}, "objective": objective, "topK": 20, **more}
    return ParseDict(wanted, attribute_pb2.AttributeRequest())


def traced(node: str, **more: Any) -> dict[str, Any]:
    return {"tracedNode": {"node": node, **more}}


def closes(response: attribute_pb2.AttributeResponse) -> bool:
    totals = response.totals
    total = totals.listed + totals.unlisted + totals.remainder
    return total == pytest.approx(response.objective_value, abs=1e-4)


SCORE = traced("head.1.1~6-3", through="THROUGH_QUERY_KEY")
OBJECTIVES = {
    "neuron": traced("neuron.1.3~5"),
    "activation": traced("neuron.1.3~5", side="ACTIVATION_SIDE_POST"),
    "score": SCORE,
    "probability": traced("head.1.1~6-3", through="THROUGH_KEY", side="ACTIVATION_SIDE_POST"),
    "value": traced(
        "head.1.1~6-3", through="THROUGH_VALUE", downstream={**LOGIT_DIFF, "position": 6}
    ),
    "value on a score": traced("head.0.1~6-3", through="THROUGH_VALUE", downstream=SCORE),
    "along": {
        "along": {"point": "resid_pre.1", "direction": {"writeOf": "neuron.0.3"}},
        "position": 4,
    },
}


@pytest.mark.parametrize("name", OBJECTIVES)
async def test_the_table_sums_and_its_manifest_replays_it(name: str, stub: "Stub") -> None:
    first = await stub.Attribute(attribute(OBJECTIVES[name]))
    assert closes(first)
    assert not first.manifest.warnings
    assert first.objective_value != 0
    again = Parse(first.manifest.request_json, attribute_pb2.AttributeRequest())
    replayed = await stub.Attribute(again)
    assert replayed.manifest.result_id == first.manifest.result_id
    assert replayed.objective_value == first.objective_value
    assert list(replayed.rows) == list(first.rows)


async def test_what_was_left_out_is_written_down(stub: "Stub") -> None:
    response = await stub.Attribute(attribute(traced("neuron.1.3~5")))
    request = Parse(response.manifest.request_json, attribute_pb2.AttributeRequest())
    assert request.objective.traced_node.side == 1  # ACTIVATION_SIDE_PRE
    assert not request.objective.HasField("position")
    along = await stub.Attribute(attribute(OBJECTIVES["along"]))
    request = Parse(along.manifest.request_json, attribute_pb2.AttributeRequest())
    assert request.objective.along.point == "resid_post.0"


async def test_top_tokens_are_those_of_the_nodes_token(stub: "Stub") -> None:
    response = await stub.Attribute(attribute(SCORE))
    run = ParseDict(
        {"run": {"prompt": PROMPT}, "positions": {"list": {"positions": [6]}}},
        run_pb2.RunRequest(),
    )
    (there,) = (await stub.Run(run)).next_tokens
    for ours, theirs in zip(response.top_tokens, there.top, strict=True):
        assert ours.token == theirs.token
        assert ours.score == pytest.approx(theirs.logit, abs=1e-4)


async def test_along_the_unembedding_after_the_final_norm_is_the_logit_difference(
    stub: "Stub",
) -> None:
    direction = {"unembedding": LOGIT_DIFF["logitDiff"]}
    along = await stub.Attribute(
        attribute({"along": {"point": "final_norm", "direction": direction}})
    )
    plain = await stub.Attribute(attribute(LOGIT_DIFF))
    assert along.objective_value == pytest.approx(plain.objective_value, abs=1e-4)
    assert [row.node for row in along.rows] == [row.node for row in plain.rows]
    unit = await stub.Attribute(
        attribute({"along": {"point": "final_norm", "direction": {**direction, "unit": True}}})
    )
    assert unit.objective_value != pytest.approx(plain.objective_value, rel=1e-3)
    assert (unit.objective_value > 0) is (plain.objective_value > 0)


async def test_a_downstream_out_of_reach_is_a_warning(stub: "Stub") -> None:
    response = await stub.Attribute(
        attribute(traced("head.0.1~6-3", through="THROUGH_VALUE", downstream=LOGIT_DIFF))
    )
    assert response.objective_value == 0
    assert all(row.direct_effect == row.total_effect == 0 for row in response.rows)
    (warning,) = response.manifest.warnings
    assert "does not read token 6" in warning


async def test_a_traced_run_is_compared_with_a_plain_one(stub: "Stub") -> None:
    response = await stub.Attribute(
        attribute(SCORE, compare={"prompt": PROMPT}, compareObjective=LOGIT_DIFF)
    )
    alone = await stub.Attribute(attribute(LOGIT_DIFF))
    assert closes(response)
    assert response.compare_value == pytest.approx(alone.objective_value, abs=1e-4)
    assert response.compare_top_tokens != response.top_tokens


@pytest.mark.parametrize("mode", ["NORM_MODE_LIVE", "NORM_MODE_ALL_NORMS_FROZEN"])
async def test_norm_modes(mode: str, stub: "Stub") -> None:
    response = await stub.Attribute(attribute(SCORE, normMode=mode))
    assert closes(response)
    assert bool(response.manifest.warnings) is (mode == "NORM_MODE_LIVE")
    along = await stub.Attribute(attribute(OBJECTIVES["along"], normMode=mode))
    assert closes(along)
    assert not along.manifest.warnings  # no norm lies before the residual stream itself


@pytest.mark.parametrize("name", ["neuron", "score", "value", "along"])
async def test_effects_on_a_traced_node_are_verified(name: str, stub: "Stub") -> None:
    """Zeroing a node really, and asking for the traced value of the run without it."""
    nodes = ["embed~3", "neuron.0.5~3", "head.0.0~3"]
    request = verify_pb2.VerifyRequest(table=attribute(OBJECTIVES[name]), nodes=nodes)
    request.table.ClearField("top_k")
    found = {
        message.node.node: message.node
        async for message in stub.Verify(request)
        if message.HasField("node")
    }
    clean = await stub.Attribute(attribute(OBJECTIVES[name]))
    for node in nodes:
        edited = {"prompt": PROMPT, "interventions": [{"target": node, "zero": {}}]}
        without = await stub.Attribute(attribute(OBJECTIVES[name], run=edited))
        assert found[node].objective_value == pytest.approx(
            clean.objective_value - found[node].verified_effect, abs=1e-5
        )
        if name != "value":  # there the pattern and the downstream gradient would move as well
            assert found[node].objective_value == pytest.approx(without.objective_value, abs=1e-4)
        assert found[node].verified_effect != 0 or name == "along"
