"""Answers from the cache, over real gRPC, memory and Redis alike."""

from typing import Any

import pytest
from google.protobuf.json_format import Parse, ParseDict
from tdb.inference.v1 import (
    attribute_pb2,
    generate_pb2,
    manifest_pb2,
    run_pb2,
    verify_pb2,
)

from services.common.cache.cache import Cache
from services.common.cache.memory import MemoryCache
from services.inference import caching, manifest
from services.inference.engine.model import Model
from tests.common.cache.redis_server import patient, running
from tests.inference.cached import (
    ASKED,
    CACHES,
    RUN,
    TABLE,
    VERIFY_REQUEST,
    bare,
    cache,
    manifest_of,
    serving,
    twin,
    until,
    without_circumstances,
)
from tests.inference.helpers import SENTENCE

__all__ = ["bare", "cache", "twin"]  # fixtures


@pytest.mark.parametrize("cache", CACHES, indirect=True)
async def test_what_was_answered_is_not_run_again(model: Model, cache: Cache) -> None:
    async with serving(model, cache) as service:
        for name in ASKED:
            first = await service.ask(name)
            assert service.pieces > 0
            again = await service.ask(name)
            assert service.pieces == 0, name
            assert without_circumstances(again) == without_circumstances(first), name
            made, found = manifest_of(first), manifest_of(again)
            assert not made.cached
            assert made.timings.ListFields()
            assert found.cached
            assert found.HasField("timings")
            assert not found.timings.ListFields(), "nothing ran, so nothing took time"
        counters = cache.counters
        assert (counters.hits, counters.misses) == (len(ASKED), len(ASKED))
        assert (counters.stored, counters.damaged, counters.errors) == (len(ASKED), 0, 0)


async def test_the_same_question_in_other_words_is_the_same(model: Model) -> None:
    async with serving(model, MemoryCache(2**26)) as service:
        for name in ("Run", "Attribute"):
            first = manifest_of(await service.ask(name))
            replayed = Parse(first.request_json, type(ASKED[name])())
            assert replayed != ASKED[name], "ids for text, defaults filled in"
            found = manifest_of(await service.ask(name, replayed))
            assert found.cached
            assert found.request_json == first.request_json


async def test_another_question_is_another(model: Model) -> None:
    """Whatever differs in a request makes it another, however little."""
    variants: list[dict[str, Any]] = [
        {},
        {"topK": 4},
        {"tokens": [{"id": 5}]},
        {"positions": {"list": {"positions": [3]}}},
        {"run": {**RUN, "interventions": [{"target": "neuron.0.3~3", "zero": {}}]}},
        {"run": {**RUN, "interventions": [{"target": "neuron.0.4~2", "zero": {}}]}},
        {"run": {**RUN, "interventions": [{"target": "neuron.0.3~2", "scale": {"factor": 2}}]}},
        {"run": {**RUN, "interventions": [{"target": "neuron.0.3~2", "scale": {"factor": 2.5}}]}},
        {"run": {**RUN, "interventions": []}},
        {"run": {**RUN, "prompt": {"text": SENTENCE[:-7]}}},
    ]
    async with serving(model, MemoryCache(2**26)) as service:
        for variant in variants:
            request = ParseDict({"run": RUN, "topK": 3, **variant}, run_pb2.RunRequest())
            assert not manifest_of(await service.ask("Run", request)).cached, variant
        assert service.answers.cache.counters.stored == len(variants)


async def test_a_deterministic_answer_is_another_than_one_that_may_share_a_batch(
    model: Model,
) -> None:
    alone = ParseDict(
        {**TABLE, "topK": 20, "deterministic": True}, attribute_pb2.AttributeRequest()
    )
    async with serving(model, MemoryCache(2**26)) as service:
        await service.ask("Attribute")
        assert not manifest_of(await service.ask("Attribute", alone)).cached
        assert manifest_of(await service.ask("Attribute", alone)).cached


async def test_sampling_without_a_seed_is_never_kept(model: Model) -> None:
    request = ParseDict(
        {"run": RUN, "maxNewTokens": 3, "temperature": 1.0}, generate_pb2.GenerateRequest()
    )
    async with serving(model, MemoryCache(2**26)) as service:
        for _ in range(2):
            assert not manifest_of(await service.ask("Generate", request)).cached
        counters = service.answers.cache.counters
        assert (counters.hits, counters.misses, counters.stored) == (0, 0, 0)


async def test_half_a_stream_is_not_kept(model: Model) -> None:
    async with serving(model, MemoryCache(2**26)) as service:
        call = service.stub.Verify(VERIFY_REQUEST)
        async for message in call:
            if message.HasField("node"):
                break
        call.cancel()
        await until(lambda: not len(service.answers.flights))
        counters = service.answers.cache.counters
        whole = await service.ask("Verify")
        # It may have been done before it noticed; then the whole was kept, and is given.
        assert manifest_of(whole).cached is (counters.stored == 1 and counters.hits == 1)
        assert manifest_of(await service.ask("Verify")).cached


async def test_what_is_too_large_is_not_kept(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching, "MAX_VALUE_BYTES", 500)
    async with serving(model, MemoryCache(2**26)) as service:
        for _ in range(2):
            assert not manifest_of(await service.ask("Attribute")).cached
        assert service.answers.cache.counters.too_large == 2


async def test_large_answers_are_the_same(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are read and written beside the loop."""
    monkeypatch.setattr(caching, "LONG_BYTES", 10)
    async with serving(model, MemoryCache(2**26)) as service:
        for name in ("Attribute", "Verify"):
            first, again = await service.ask(name), await service.ask(name)
            assert manifest_of(again).cached
            assert without_circumstances(again) == without_circumstances(first)


async def test_an_answer_to_another_question_is_not_kept(
    model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The guard against a part of the program that disagrees on what was asked."""
    build = manifest.build

    def other(*args: Any, **more: Any) -> manifest_pb2.Manifest:
        made = build(*args, **more)
        made.result_id = "0" * 64
        return made

    async with serving(model, MemoryCache(2**26)) as service:
        monkeypatch.setattr(manifest, "build", other)
        await service.ask("Run")
        assert service.answers.cache.counters.stored == 0
    assert "another id" in caplog.text


async def test_other_models_do_not_share_their_answers(model: Model, bare: Model) -> None:
    """Without the tokenizer tokens have other texts: the weights alone are not the key."""
    assert bare.identity == model.identity
    request = ParseDict(
        {"run": {"prompt": {"tokenIds": {"ids": [5, 9, 31]}}}}, run_pb2.RunRequest()
    )
    with running() as redis:
        async with (
            serving(model, patient(redis.address)) as one,
            serving(bare, patient(redis.address)) as other,
        ):
            (first,), (second,) = await one.ask("Run", request), await other.ask("Run", request)
            assert manifest_of([first]).result_id == manifest_of([second]).result_id
            assert not manifest_of([second]).cached
            assert first.tokens[0].text != second.tokens[0].text  # type: ignore[attr-defined]


def test_the_key_has_all_that_decides_the_bytes(
    model: Model, twin: Model, bare: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = run_pb2.RunRequest(model="tiny")
    asked = manifest.question("Run", model, request)

    def key(asked: manifest.Question = asked, of: Model = model, kind: Any = None) -> str:
        return caching.key_of(asked, of, kind or run_pb2.RunResponse).text

    assert key() == key(manifest.question("Run", twin, request), twin)
    others = {
        key(),
        key(manifest.question("Attribute", model, request)),
        key(manifest.question("Run", model, run_pb2.RunRequest(model="tiny", top_k=1))),
        key(of=bare),
        key(kind=verify_pb2.VerifyResponse),
    }
    assert len(others) == 5
    monkeypatch.setattr("torch.__version__", "0.0")
    assert key() not in others
    monkeypatch.undo()
    monkeypatch.setattr(caching, "_device", lambda device: "cuda Another")
    assert key() not in others
    monkeypatch.undo()
    monkeypatch.setattr("services.inference.manifest.ENGINE_VERSION", "next")
    assert key(manifest.question("Run", model, request)) not in others
