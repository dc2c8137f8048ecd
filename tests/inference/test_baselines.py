"""Effects measured from a mean or another run, over real gRPC, against interventions."""

from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf.json_format import Parse, ParseDict
from tdb.inference.v1 import attribute_pb2, verify_pb2

from tests.inference.test_refusals import OBJECTIVE, RUN
from tests.inference.test_refusals import refusal as refusal_of
from tests.inference.test_service import attribute
from tests.inference.test_verify_service import collected, request

if TYPE_CHECKING:  # the stubs name it, the generated module does not
    from tdb.inference.v1.service_pb2_grpc import InferenceServiceAsyncStub as Stub

IDS = [7, 30, 41, 2, 9, 16]
HERE: dict[str, Any] = {"prompt": {"tokenIds": {"ids": IDS}}}
THERE: dict[str, Any] = {"prompt": {"tokenIds": {"ids": [7, 31, 55, 2, 90, 16]}}}
LONGER = {"prompt": {"tokenIds": {"ids": [5, 7, 31, 55, 2, 90, 16]}}}
ALIGNED = [{"to": position, "source": position + 1} for position in range(len(IDS))]
FROM_RUN: dict[str, Any] = {"run": {"source": THERE}}
FROM_LONGER: dict[str, Any] = {"run": {"source": LONGER, "alignment": ALIGNED}}
FROM_MEAN: dict[str, Any] = {
    "mean": {"prompts": [THERE["prompt"], HERE["prompt"]], "perPosition": True}
}
OPERATIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "run": (FROM_RUN, {"patch": FROM_RUN["run"]}),
    "aligned run": (FROM_LONGER, {"patch": FROM_LONGER["run"]}),
    "mean": (FROM_MEAN, {"mean": FROM_MEAN["mean"]}),
}
EVERY = 10_000


async def values(stub: "Stub", run: dict[str, Any]) -> dict[str, attribute_pb2.NodeRow]:
    table = await stub.Attribute(attribute(run=run, topK=EVERY))
    return {row.node: row for row in table.rows}


async def objective(stub: "Stub", node: str, operation: dict[str, Any]) -> float:
    """J with the node edited."""
    run = {**HERE, "interventions": [{"target": node, **operation}]}
    return (await stub.Attribute(attribute(run=run, topK=1))).objective_value


@pytest.mark.parametrize("name", OPERATIONS)
async def test_the_three_columns_start_at_the_baseline(name: str, stub: "Stub") -> None:
    baseline, operation = OPERATIONS[name]
    plain = await values(stub, HERE)
    if name == "aligned run":
        there = {}
        for node, row in (await values(stub, LONGER)).items():
            component, places = node.split("~")
            back = [int(place) - 1 for place in places.split("-")]
            if min(back) >= 0:
                there[f"{component}~{'-'.join(map(str, back))}"] = row.activation
    else:
        there = {node: row.activation for node, row in (await values(stub, THERE)).items()}
    if name == "mean":
        there = {node: (value + plain[node].activation) / 2 for node, value in there.items()}
    asked = attribute(run=HERE, topK=30, baseline=baseline, verify=True, integratedSteps=2)
    table = await stub.Attribute(asked)
    largest = max(abs(row.total_effect) for row in table.rows)
    scalars = [row for row in table.rows if not row.node.startswith("embed")]
    assert len(scalars) > 10
    for row in scalars:
        before = plain[row.node]
        gradient = before.total_effect / before.activation
        moved = before.activation - there[row.node]
        assert row.total_effect == pytest.approx(moved * gradient, abs=1e-4 * largest)
    for row in [*scalars[:3], *(row for row in table.rows if row.node.startswith("embed"))][:5]:
        edited = await objective(stub, row.node, operation)
        effect = table.objective_value - edited
        assert row.verified_effect == pytest.approx(effect, abs=1e-5)
    assert all(row.HasField("integrated_effect") for row in table.rows)
    zero = await stub.Attribute(attribute(run=HERE, topK=30, baseline={"zero": {}}))
    alone = await stub.Attribute(attribute(run=HERE, topK=30))
    assert zero.rows == alone.rows
    assert [row.node for row in zero.rows] != [row.node for row in table.rows]


async def test_components_are_verified_from_a_mean_over_all_tokens(stub: "Stub") -> None:
    mean = {"mean": {"prompts": [THERE["prompt"], LONGER["prompt"]]}}
    names = ["attn.0~2", "head.1.1", "neuron.0.3", "mlp.1", "embed~1"]
    nodes, summary, _ = await collected(stub, request({"run": HERE, "baseline": mean}, nodes=names))
    assert {each.node for each in nodes} == set(names)
    for each in nodes:
        edited = await objective(stub, each.node, mean)
        assert each.objective_value == pytest.approx(edited, abs=1e-5)
    again = Parse(summary.manifest.request_json, verify_pb2.VerifyRequest())
    replayed, other, _ = await collected(stub, again)
    assert replayed == nodes
    assert other.manifest.result_id == summary.manifest.result_id


async def test_only_named_nodes_need_a_counterpart(stub: "Stub") -> None:
    some = {"run": {"source": LONGER, "alignment": ALIGNED[2:4]}}
    table = {"run": HERE, "baseline": some}
    nodes, _, _ = await collected(stub, request(table, nodes=["neuron.0.3~2", "head.1.0~3-2"]))
    for each in nodes:
        edited = await objective(stub, each.node, {"patch": some["run"]})
        assert each.objective_value == pytest.approx(edited, abs=1e-5)
    with pytest.raises(grpc.aio.AioRpcError, match="position 1 stands for no token"):
        await collected(stub, request(table, nodes=["neuron.0.3~2", "neuron.0.3~1"]))


async def test_along_the_input_embeddings_add_up_to_the_other_prompts_embedding(
    stub: "Stub",
) -> None:
    table = await stub.Attribute(
        attribute(
            run=HERE,
            topK=100,
            perKind=True,
            baseline=FROM_RUN,
            integratedSteps=256,
            integratedPath="INTEGRATED_PATH_INPUT",
        )
    )
    rows = [row for row in table.rows if row.node.startswith("embed~")]
    assert len(rows) == len(IDS)
    patch = {"target": "embed", "patch": FROM_RUN["run"]}
    moved = await stub.Attribute(attribute(run={**HERE, "interventions": [patch]}, topK=1))
    change = table.objective_value - moved.objective_value
    assert sum(row.integrated_effect for row in rows) == pytest.approx(change, rel=2e-2)


async def test_the_manifest_replays_a_baseline(stub: "Stub") -> None:
    asked = attribute(run=RUN, topK=5, baseline={"run": {"source": RUN}}, integratedSteps=2)
    first = await stub.Attribute(asked)
    assert all(row.total_effect == 0 for row in first.rows)  # the run itself
    again = Parse(first.manifest.request_json, attribute_pb2.AttributeRequest())
    second = await stub.Attribute(again)
    assert second.rows == first.rows
    assert second.manifest.result_id == first.manifest.result_id


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "no kind": ({"baseline": {}}, "baseline.kind", "one of zero, mean or run"),
    "compared": (
        {"baseline": FROM_RUN, "compare": HERE},
        "baseline",
        "two compared runs have no baseline but 0",
    ),
    "pooled mean": (
        {"baseline": {"mean": {"prompts": [THERE["prompt"]]}}},
        "baseline.mean.per_position",
        "which have a mean at their own positions only",
    ),
    "no prompts": (
        {"baseline": {"mean": {"perPosition": True}}},
        "baseline.mean.prompts",
        "reference prompts are given",
    ),
    "uneven prompts": (
        {
            "baseline": {
                "mean": {"prompts": [THERE["prompt"], LONGER["prompt"]], "perPosition": True}
            }
        },
        "baseline.mean.prompts",
        "the run has 6 tokens and the reference prompts 6, 7",
    ),
    "no source": ({"baseline": {"run": {}}}, "baseline.run.source", "required"),
    "other length": (
        {"baseline": {"run": {"source": LONGER}}},
        "baseline.run.alignment",
        "the run has 6 tokens and the source 7",
    ),
    "a hole": (
        {"baseline": {"run": {"source": LONGER, "alignment": ALIGNED[1:]}}},
        "baseline.run.alignment",
        "position 0 stands for no token of the source",
    ),
    "out of order": (
        {"baseline": {"run": {"source": LONGER, "alignment": [*ALIGNED[:5], {"to": 5}]}}},
        "baseline.run.alignment",
        "positions 4 and 5 stand for 5 and 0",
    ),
    "past the end": (
        {"baseline": {"run": {"source": LONGER, "alignment": [{"to": 0, "source": 7}]}}},
        "baseline.run.alignment[0].source",
        "position 7 does not exist; valid is 0..6",
    ),
    "path without steps": (
        {"integratedPath": "INTEGRATED_PATH_SUBLAYER"},
        "integrated_path",
        "set integrated_steps too",
    ),
    "input path from 0": (
        {"integratedPath": "INTEGRATED_PATH_INPUT", "integratedSteps": 4},
        "integrated_path",
        "name it as baseline.run",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_what_has_no_baseline_is_refused(name: str, stub: "Stub") -> None:
    change, path, sentence = REFUSED[name]
    code, field, message = await refusal_of(
        stub,
        ParseDict(
            {"run": HERE, "objective": OBJECTIVE, **change}, attribute_pb2.AttributeRequest()
        ),
    )
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert field == path
    assert sentence in message
