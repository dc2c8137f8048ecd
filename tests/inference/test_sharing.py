"""Calls of several users over real gRPC that one pass answers, each as if it were alone."""

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from google.protobuf.json_format import ParseDict
from tdb.inference.v1 import attribute_pb2, run_pb2

from services.inference import requests, sharing
from services.inference.engine import needs
from services.inference.engine.model import Model
from services.inference.engine.table_memory import Listing
from tests.inference.test_queue_service import Busy, busy, queued

if TYPE_CHECKING:  # the stubs name it, the generated module does not
    from tdb.inference.v1.service_pb2_grpc import InferenceServiceAsyncStub as Stub

__all__ = ["busy"]

IDS = [[40, 51, 62, 73, 84], [95, 106], [117, 128, 139, 140, 151, 162, 173, 184]]


def attribution(ids: list[int], **changes: Any) -> attribute_pb2.AttributeRequest:
    asked = {
        "run": {"prompt": {"tokenIds": {"ids": ids}}},
        "objective": {"logitDiff": {"targets": [{"id": 5}], "distractors": [{"id": 9}]}},
        "topK": 5,
        "readOuts": {"tokens": 3},
        **changes,
    }
    return ParseDict(asked, attribute_pb2.AttributeRequest())


def forward(ids: list[int]) -> run_pb2.RunRequest:
    return ParseDict({"run": {"prompt": {"tokenIds": {"ids": ids}}}}, run_pb2.RunRequest())


def same_rows(
    ours: attribute_pb2.AttributeResponse, theirs: attribute_pb2.AttributeResponse
) -> None:
    assert [row.node for row in ours.rows] == [row.node for row in theirs.rows]
    assert ours.objective_value == pytest.approx(theirs.objective_value, rel=1e-4)
    for mine, other in zip(ours.rows, theirs.rows, strict=True):
        assert mine.total_effect == pytest.approx(other.total_effect, rel=1e-4)
        tokens = [[each.token.id for each in row.output_tokens] for row in (mine, other)]
        assert tokens[0] == tokens[1]


async def test_tables_of_several_users_share_a_pass(stub: "Stub", busy: Busy) -> None:
    wanted = [attribution(ids) for ids in IDS]
    calls = [asyncio.ensure_future(stub.Attribute(each)) for each in wanted]
    await queued(stub, 1 + len(calls))
    busy.released.set()
    for call, each in zip(calls, wanted, strict=True):
        ours = await call
        assert ours.manifest.timings.shared_by == len(calls)
        each.deterministic = True
        theirs = await stub.Attribute(each)
        assert theirs.manifest.timings.shared_by == 1
        same_rows(ours, theirs)


async def test_runs_of_several_users_share_a_pass(stub: "Stub", busy: Busy) -> None:
    calls = [asyncio.ensure_future(stub.Run(forward(ids))) for ids in IDS]
    await queued(stub, 1 + len(calls))
    busy.released.set()
    tops = []
    for call in calls:
        response = await call
        assert response.manifest.timings.shared_by == len(calls)
        tops.append([each.token.id for each in response.next_tokens[0].top])
    for top, ids in zip(tops, IDS, strict=True):
        other = forward(ids)
        other.top_k = len(top) + 1  # or the answer would come from the cache
        (alone,) = (await stub.Run(other)).next_tokens
        assert [each.token.id for each in alone.top][:-1] == top


async def test_who_shares_with_nobody(stub: "Stub", busy: Busy) -> None:
    """Repeatable requests, those with passes of their own, and prompts of other lengths."""
    baseline = {"run": {"source": {"prompt": {"tokenIds": {"ids": IDS[0]}}}}}
    calls = [
        asyncio.ensure_future(stub.Attribute(each))
        for each in (
            attribution(IDS[0], deterministic=True),
            attribution(IDS[0], baseline=baseline),
            attribution(list(range(40, 57))),
            attribution(IDS[1]),
        )
    ]
    await queued(stub, 1 + len(calls))
    busy.released.set()
    for call in calls:
        assert (await call).manifest.timings.shared_by == 1


async def test_a_refusal_is_its_own(stub: "Stub", busy: Busy) -> None:
    overflow = attribution(IDS[0])
    overflow.run.interventions.add(target="neuron.0.3~1").set.value = 3e38
    refused = asyncio.ensure_future(stub.Attribute(overflow))
    answered = asyncio.ensure_future(stub.Attribute(attribution(IDS[1])))
    await queued(stub, 3)
    busy.released.set()
    assert len((await answered).rows) == 5
    with pytest.raises(Exception, match="overflow"):
        await refused


def fitting(model: Model, count: int) -> bool:
    wanted = [requests.read_attribution(attribution(IDS[2]), model) for _ in range(count)]
    batches = [sharing.of_attribution(each, model).batch for each in wanted]
    members = [each.member for each in batches if each]
    assert batches[0]
    assert len(members) == count
    assert len({each.key for each in batches if each}) == 1
    assert batches[0].padded_tokens(members) == count * len(IDS[2])
    return batches[0].fits(members)


def test_a_pass_stays_within_tokens_and_bytes(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "batch_tokens", 3 * len(IDS[2]))
    assert fitting(model, 3)
    assert not fitting(model, 4)
    one = requests.read_attribution(attribution(IDS[2]), model)
    rows = needs.Rows((len(IDS[2]), len(IDS[2])))
    enough = needs.table(model.hooks, rows, Listing(5, read_out_rows=2 * 5))
    monkeypatch.setattr(model.room, "budget", enough)
    assert one.padded_tokens == len(IDS[2])
    assert fitting(model, 2)
    assert not fitting(model, 3)
