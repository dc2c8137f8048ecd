"""The service over real gRPC: what a client gets."""

import asyncio
import json
import time
from typing import TYPE_CHECKING

import grpc
import pytest
from google.protobuf.json_format import Parse, ParseDict
from tdb.inference.v1 import attribute_pb2, model_pb2, run_pb2

from services.common.errors import Unavailable
from services.inference.engine.model import Model
from services.inference.scheduler import Scheduler
from tests.inference.helpers import CONTEXT, PADDED_VOCABULARY, SENTENCE

if TYPE_CHECKING:  # the stubs name it, the generated module does not
    from tdb.inference.v1.service_pb2_grpc import InferenceServiceAsyncStub as Stub

PROMPT = {"text": SENTENCE[:-6]}
REQUEST = {
    "run": {"prompt": PROMPT},
    "objective": {
        "logitDiff": {"targets": [{"text": " Mary"}], "distractors": [{"text": " John"}]}
    },
}


def attribute(**more: object) -> attribute_pb2.AttributeRequest:
    return ParseDict({**REQUEST, **more}, attribute_pb2.AttributeRequest())


async def test_models_are_listed_and_described(stub: "Stub") -> None:
    listed = await stub.ListModels(model_pb2.ListModelsRequest())
    assert list(listed.models) == ["tiny", "later"]
    described = await stub.GetModel(model_pb2.GetModelRequest())
    assert described.model.id == "tiny"
    assert len(described.model.weights_hash) == 64
    sizes = described.dimensions
    assert (sizes.layers, sizes.heads, sizes.width, sizes.neurons) == (2, 2, 16, 64)
    assert (sizes.vocabulary, sizes.context) == (PADDED_VOCABULARY, CONTEXT)
    assert described.tokenizer.vocabulary < PADDED_VOCABULARY
    supported = {each.feature: each.supported for each in described.supports}
    assert supported["objective.logit_diff"]
    assert supported["objective.traced_node"]
    assert supported["objective.traced_node.latent"]
    assert all(each.supported or each.reason for each in described.supports)


async def test_an_unknown_model_is_not_found_and_names_those_served(stub: "Stub") -> None:
    with pytest.raises(grpc.aio.AioRpcError, match="served: tiny, later") as refusal:
        await stub.GetModel(model_pb2.GetModelRequest(model="gpt5"))
    assert refusal.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_model_that_still_loads_is_unavailable(stub: "Stub") -> None:
    with pytest.raises(grpc.aio.AioRpcError, match="still loading") as refusal:
        await stub.Attribute(attribute(model="later"))
    assert refusal.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_tokens_and_text_round_trip(stub: "Stub") -> None:
    text = "Mary gave wörds 猫 to\nJohn"
    request = ParseDict({"prompt": {"text": text}}, model_pb2.TokenizeRequest())
    there = await stub.Tokenize(request)
    assert there.text == text
    assert b"".join(token.raw for token in there.tokens) == text.encode()
    assert len(there.byte_offsets) == len(there.tokens)
    for token, start in zip(there.tokens, there.byte_offsets, strict=True):
        assert text.encode()[start:].startswith(token.raw)
    ids = [token.id for token in there.tokens]
    back = await stub.Tokenize(
        ParseDict({"prompt": {"tokenIds": {"ids": ids}}}, model_pb2.TokenizeRequest())
    )
    assert back.text == text


async def test_bos_is_prepended_on_request_only(stub: "Stub") -> None:
    plain = await stub.Tokenize(ParseDict({"prompt": PROMPT}, model_pb2.TokenizeRequest()))
    with_bos = await stub.Tokenize(
        ParseDict({"prompt": {**PROMPT, "prependBos": True}}, model_pb2.TokenizeRequest())
    )
    assert with_bos.tokens[0].text == "<|endoftext|>"
    assert [each.id for each in with_bos.tokens[1:]] == [each.id for each in plain.tokens]


async def test_run_gives_probabilities_of_top_and_named_tokens(stub: "Stub") -> None:
    request = ParseDict(
        {"run": {"prompt": PROMPT}, "positions": {"all": {}}, "topK": PADDED_VOCABULARY},
        run_pb2.RunRequest(),
    )
    request.tokens.add(id=PADDED_VOCABULARY - 1)
    response = await stub.Run(request)
    assert [each.position for each in response.next_tokens] == list(range(len(response.tokens)))
    vocabulary = (await stub.GetModel(model_pb2.GetModelRequest())).tokenizer.vocabulary
    last = response.next_tokens[-1]
    assert len(last.top) == vocabulary  # padded rows cannot be decoded: never listed
    logits = [each.logit for each in last.top]
    assert logits == sorted(logits, reverse=True)
    assert sum(each.probability for each in last.top) < 1
    assert last.named[0].token.text == f"<{PADDED_VOCABULARY - 1}>"


async def test_values_of_other_runs_are_taken_over_the_wire(stub: "Stub") -> None:
    """Patched from the same prompt a value stays; the canonical request holds ids alone."""
    other = {"prompt": {"text": SENTENCE}}
    prompt = {"text": SENTENCE}
    wanted = [
        {"target": "attn.1", "patch": {"source": other}},
        {"target": "neuron.0.5~3", "mean": {"prompts": [{"text": " Mary"}, {"text": SENTENCE}]}},
        {"target": "head.1.0~4-2", "mask": {}},
    ]
    request = ParseDict({"run": {"prompt": prompt, "interventions": wanted}}, run_pb2.RunRequest())
    patched, mean, mask = (await stub.Run(request)).receipts
    assert patched.sites == len(patched.positions) > 1
    assert mean.delta_norm > 0
    assert (mask.after, mask.before > 0) == (0, True)
    same = ParseDict({"run": {"prompt": prompt, "interventions": wanted[:1]}}, run_pb2.RunRequest())
    response = await stub.Run(same)
    assert response.receipts[0].delta_norm < 1e-5
    assert SENTENCE not in response.manifest.request_json
    assert "tokenIds" in response.manifest.request_json


async def test_attribute_table_sums_to_the_objective(stub: "Stub") -> None:
    response = await stub.Attribute(attribute(topK=7))
    assert len(response.rows) == 7
    totals = response.totals
    total = totals.listed + totals.unlisted + totals.remainder
    assert total == pytest.approx(response.objective_value, abs=1e-4)
    assert len(response.top_tokens) == 10
    named = await stub.Run(
        ParseDict(
            {"run": {"prompt": PROMPT}, "tokens": [{"text": " Mary"}, {"text": " John"}]},
            run_pb2.RunRequest(),
        )
    )
    mary, john = named.next_tokens[0].named
    assert response.objective_value == pytest.approx(mary.logit - john.logit, abs=1e-4)


async def test_compare_gives_both_runs(stub: "Stub") -> None:
    ablated = {"prompt": PROMPT, "interventions": [{"target": "head.1.0", "zero": {}}]}
    response = await stub.Attribute(attribute(run=ablated, compare={"prompt": PROMPT}))
    alone = await stub.Attribute(attribute())
    assert response.compare_value == pytest.approx(alone.objective_value, rel=1e-4)
    assert response.objective_value != pytest.approx(alone.objective_value, rel=1e-3)
    (receipt,) = response.receipts
    assert receipt.target == "head.1.0"
    assert receipt.applied == len(response.tokens)
    assert not response.compare_receipts
    assert all(row.HasField("compare") for row in response.rows)


async def test_the_manifest_replays_the_result(stub: "Stub") -> None:
    request = attribute(
        run={"prompt": PROMPT, "interventions": [{"target": "neuron.0.3~2", "zero": {}}]}
    )
    first = await stub.Attribute(request)
    replayed = await stub.Attribute(
        Parse(first.manifest.request_json, attribute_pb2.AttributeRequest())
    )
    assert replayed.manifest.result_id == first.manifest.result_id
    assert replayed.manifest.request_json == first.manifest.request_json
    for response in (first, replayed):
        response.manifest.ClearField("timings")
    assert replayed.SerializeToString(deterministic=True) == first.SerializeToString(
        deterministic=True
    )
    canonical = json.loads(first.manifest.request_json)
    assert canonical["model"] == "tiny"
    assert canonical["topK"] == 50
    request.run.interventions[0].target = "neuron.0.3~3"
    other = await stub.Attribute(request)
    assert other.manifest.result_id != first.manifest.result_id


async def test_text_and_its_ids_are_the_same_request(stub: "Stub") -> None:
    by_text = await stub.Attribute(attribute())
    ids = {"tokenIds": {"ids": list(by_text.manifest.token_ids[0].ids)}}
    by_ids = await stub.Attribute(attribute(run={"prompt": ids}))
    assert by_ids.manifest.result_id == by_text.manifest.result_id


async def test_live_mode_says_what_its_direct_effects_are_not(stub: "Stub") -> None:
    assert not (await stub.Attribute(attribute())).manifest.warnings
    live = await stub.Attribute(attribute(normMode="NORM_MODE_LIVE"))
    assert "explain no share" in live.manifest.warnings[0]


async def test_the_loop_answers_while_the_device_is_busy(
    stub: "Stub", scheduler: Scheduler
) -> None:
    blocking = asyncio.ensure_future(scheduler.submit(lambda cancel: time.sleep(0.6)))
    waiting = asyncio.ensure_future(stub.Attribute(attribute()))
    await asyncio.sleep(0.1)
    started = time.monotonic()
    await stub.GetModel(model_pb2.GetModelRequest())
    answered_while_busy = not blocking.done()
    assert answered_while_busy, time.monotonic() - started
    assert (await waiting).manifest.timings.queue_ms > 100
    await blocking


async def test_a_call_past_its_deadline_never_runs(
    stub: "Stub", scheduler: Scheduler, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []
    monkeypatch.setattr(model, "attribute", lambda *_: ran.append(1))
    blocking = asyncio.ensure_future(scheduler.submit(lambda cancel: time.sleep(0.5)))
    await asyncio.sleep(0.05)
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await stub.Attribute(attribute(), timeout=0.1)
    assert refusal.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await blocking
    await scheduler.submit(lambda cancel: None)  # whatever was queued has been taken by now
    assert not ran


async def test_a_cancelled_call_never_runs(
    stub: "Stub", scheduler: Scheduler, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []
    monkeypatch.setattr(model, "attribute", lambda *_: ran.append(1))
    blocking = asyncio.ensure_future(scheduler.submit(lambda cancel: time.sleep(0.5)))
    await asyncio.sleep(0.05)
    call = stub.Attribute(attribute())
    await asyncio.sleep(0.1)
    call.cancel()
    await blocking
    await asyncio.sleep(0.05)
    await scheduler.submit(lambda cancel: None)
    assert not ran


async def test_a_closed_worker_is_unavailable(scheduler: Scheduler) -> None:
    scheduler.close()
    with pytest.raises(Unavailable):
        await scheduler.submit(lambda cancel: None)


async def test_errors_of_work_reach_the_caller_and_the_thread_lives_on(
    scheduler: Scheduler,
) -> None:
    with pytest.raises(ZeroDivisionError):
        await scheduler.submit(lambda cancel: 1 / 0)
    assert (await scheduler.submit(lambda cancel: 7)).result == 7
