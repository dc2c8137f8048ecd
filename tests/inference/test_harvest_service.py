"""Harvest over real gRPC: what is refused, what comes, segments that merge, who leaves."""

import asyncio
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
from google.protobuf.json_format import Parse, ParseDict
from tdb.inference.v1 import harvest_pb2, model_pb2

from services.common.harvest import reading, wire
from services.common.harvest.state import Keep, State, merge
from services.inference import harvest
from services.inference.engine.model import Model
from services.inference.engine.room import UNLIMITED
from services.inference.scheduler import Scheduler
from tests.inference.helpers import CONTEXT, PADDED_VOCABULARY
from tests.inference.test_refusals import refusal_of

if TYPE_CHECKING:  # the stubs name it, the generated module does not
    from tdb.inference.v1.service_pb2_grpc import InferenceServiceAsyncStub as Stub

GROUPS = ["neuron.1", "head.0"]
KEEP = Keep(top=3, random=2, strata=2, per_stratum=1, seed=4)


def corpus(count: int = 20) -> list[dict[str, Any]]:
    random = np.random.default_rng(0)
    return [
        {"index": index, "ids": random.integers(0, 300, 4 + index % 2 * 5).tolist()}
        for index in range(count)
    ]


def request(sequences: Sequence[dict[str, Any]], **more: Any) -> harvest_pb2.HarvestRequest:
    fields = {
        "groups": GROUPS,
        "sequences": list(sequences),
        "topK": KEEP.top,
        "random": KEEP.random,
        "strata": KEEP.strata,
        "perStratum": KEEP.per_stratum,
        "seed": str(KEEP.seed),
        "tokens": [7, 3],
        **more,
    }
    return ParseDict(fields, harvest_pb2.HarvestRequest())


async def harvested(
    stub: "Stub", asked: harvest_pb2.HarvestRequest
) -> tuple[dict[str, State], harvest_pb2.HarvestSummary]:
    states: dict[str, State] = {}
    incoming: wire.Incoming | None = None
    done = []
    async for message in stub.Harvest(asked):
        match message.WhichOneof("event"):
            case "progress":
                assert message.progress.unit == "tokens"
                done.append(message.progress.done)
            case "state":
                incoming = wire.Incoming(message.state, KEEP)
            case "chunk":
                assert incoming
                assert len(message.chunk) <= 2**20
                incoming.add(message.chunk)
                if incoming.is_whole:
                    state = incoming.state()
                    states[state.group] = state
            case "summary":
                summary = message.summary
    assert done == sorted(done)
    assert done[-1] == summary.tokens
    return states, summary


def same(one: State, other: State) -> None:
    assert (one.group, one.keep, one.count, one.window) == (
        other.group,
        other.keep,
        other.count,
        other.window,
    )
    for name, array in one.arrays.items():
        assert array.dtype == other[name].dtype
        # Batches of other sizes round differently.
        np.testing.assert_allclose(array, other[name], rtol=1e-4, atol=1e-6, err_msg=name)


async def test_segments_merge_to_the_harvest_of_all(stub: "Stub") -> None:
    whole, summary = await harvested(stub, request(corpus()))
    assert list(whole) == GROUPS
    assert (summary.sequences, summary.tokens) == (20, 130)
    first, _ = await harvested(stub, request(corpus()[:7]))
    second, _ = await harvested(stub, request(corpus()[7:]))
    for group in GROUPS:
        same(merge(first[group], second[group]), whole[group])
    assert whole["head.0"].count == 10 * (10 + 45)
    lengths = {len(each.activations) for each in reading.top(whole["head.0"], 1)}
    assert lengths <= {10, 45}
    assert list(whole["neuron.1"]["tokens"]) == [3, 7]


async def test_the_same_request_gives_the_same_bytes_in_any_order(stub: "Stub") -> None:
    one, summary = await harvested(stub, request(corpus()))
    other, _ = await harvested(stub, request(corpus()[::-1]))
    replay = Parse(summary.manifest.request_json, harvest_pb2.HarvestRequest())
    again, _ = await harvested(stub, replay)
    assert json.loads(summary.manifest.request_json)["tokens"] == [3, 7]
    for group in GROUPS:
        for name, array in one[group].arrays.items():
            assert array.tobytes() == other[group][name].tobytes() == again[group][name].tobytes()


async def test_what_is_left_out_is_the_default(stub: "Stub") -> None:
    asked = harvest_pb2.HarvestRequest(groups=["neuron.0"])
    asked.sequences.add(index=3, ids=[1, 2])
    messages = [message async for message in stub.Harvest(asked)]
    canonical = json.loads(messages[-1].summary.manifest.request_json)
    plain = Keep()
    assert canonical | {"sequences": 0} == {
        "model": "tiny",
        "groups": ["neuron.0"],
        "sequences": 0,
        "topK": plain.top,
        "random": plain.random,
        "strata": plain.strata,
        "perStratum": plain.per_stratum,
        "seed": str(plain.seed),
    }


@pytest.mark.parametrize(
    ("change", "field", "says"),
    [
        ({"groups": []}, "groups", "at least one group"),
        ({"groups": ["neuron.2"]}, "groups[0]", "valid is 0..1"),
        ({"groups": ["neuron.0", "neuron.00"]}, "groups[1]", "valid is 0..1"),
        ({"groups": ["neuron.0", "neuron.0"]}, "groups[1]", "named twice"),
        ({"groups": ["neuron.0.1"]}, "groups[0]", "does not exist"),
        ({"groups": ["mlp.0"]}, "groups[0]", "write neuron.L, head.L or latent.D"),
        ({"groups": ["latent.none"]}, "groups[0]", "loaded: none"),
        ({"sequences": []}, "sequences", "at least one sequence"),
        ({"sequences": [{"index": -1, "ids": [1]}]}, "sequences[0].index", "from 0"),
        (
            {"sequences": [{"index": 2, "ids": [1]}] * 2},
            "sequences[1].index",
            "index of sequences[0] already",
        ),
        ({"sequences": [{"index": 2}]}, "sequences[0].ids", "0 tokens"),
        ({"sequences": [{"ids": [1] * (CONTEXT + 1)}]}, "sequences[0].ids", f"1 to {CONTEXT}"),
        ({"sequences": [{"ids": [1, PADDED_VOCABULARY]}]}, "sequences[0].ids[1]", "399"),
        ({"sequences": [{"ids": [-1]}]}, "sequences[0].ids[0]", "399"),
        ({"topK": 0}, "top_k", "valid is 1..1000"),
        ({"random": 1001}, "random", "valid is 0..1000"),
        ({"strata": -1}, "strata", "valid is 0..64"),
        ({"perStratum": 0}, "per_stratum", "valid is 1..100"),
        ({"tokens": [3, 3]}, "tokens[1]", "listed twice"),
        ({"tokens": [PADDED_VOCABULARY]}, "tokens[0]", "399"),
    ],
)
async def test_refusals(stub: "Stub", change: dict[str, Any], field: str, says: str) -> None:
    call = stub.Harvest(request(**{"sequences": corpus(2), **change}))
    status, path, sentence = await refusal_of(call.read())
    assert (status, path) == (grpc.StatusCode.INVALID_ARGUMENT, field)
    assert says in sentence


async def test_more_tokens_than_a_call_reads(stub: "Stub", monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harvest, "MAX_TOKENS", 100)
    status, path, sentence = await refusal_of(stub.Harvest(request(corpus())).read())
    assert (status, path) == (grpc.StatusCode.INVALID_ARGUMENT, "sequences")
    assert "in segments" in sentence


async def test_states_that_never_fit_are_refused_before_they_wait(
    stub: "Stub", model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.room, "budget", 2**20)
    status, path, sentence = await refusal_of(stub.Harvest(request(corpus())).read())
    assert (status, path) == (grpc.StatusCode.FAILED_PRECONDITION, "groups")
    assert "fewer groups" in sentence
    monkeypatch.setattr(model.room, "budget", UNLIMITED)
    with model.room.holding(UNLIMITED // 2):
        status, _, sentence = await refusal_of(stub.Harvest(request(corpus())).read())
    assert status == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "beside the work of others" in sentence


async def test_one_that_is_left_stops_between_batches_and_gives_memory_back(
    stub: "Stub", model: Model, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = 0
    work = harvest._batch

    def counted(*arguments: Any) -> float:
        nonlocal ran
        ran += 1
        return work(*arguments)

    monkeypatch.setattr(harvest, "_batch", counted)
    sequences = [
        {"index": index, "ids": [1] * (1 + index % CONTEXT)} for index in range(40 * CONTEXT)
    ]
    call = stub.Harvest(request(sequences))
    await call.read()
    await call.read()
    assert model.room.held > 0
    # Others get in between.
    await stub.GetModel(model_pb2.GetModelRequest())
    call.cancel()
    for _ in range(100):
        await asyncio.sleep(0.02)
        if model.room.held == 0:
            break
    assert model.room.held == 0
    stopped = ran
    await asyncio.sleep(0.1)
    assert ran == stopped < 70
    assert not scheduler.snapshot()
