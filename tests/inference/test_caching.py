"""Answers from the cache and answers shared in flight, over real gRPC, memory and Redis alike."""

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf.json_format import Parse, ParseDict
from google.protobuf.message import Message
from tdb.inference.v1 import (
    attribute_pb2,
    component_pb2,
    generate_pb2,
    manifest_pb2,
    run_pb2,
    service_pb2_grpc,
    verify_pb2,
)

from services.common.cache.cache import Cache
from services.common.cache.memory import MemoryCache
from services.common.errors import ResourceExhausted
from services.common.settings import ModelSource, Settings
from services.inference import caching, manifest
from services.inference.caching import Answers
from services.inference.engine.model import Model
from services.inference.observer import Unobserved
from services.inference.scheduler import Scheduler
from services.inference.server import build_server, load_model
from tests.common.cache.redis_server import patient, running
from tests.inference.helpers import SENTENCE

if TYPE_CHECKING:  # the stubs name it, the generated module does not
    from tdb.inference.v1.service_pb2_grpc import InferenceServiceAsyncStub as Stub

PROMPT = {"text": SENTENCE[:-6]}
RUN: dict[str, Any] = {
    "prompt": PROMPT,
    "interventions": [{"target": "neuron.0.3~2", "zero": {}}],
}
TABLE = {
    "run": RUN,
    "objective": {
        "logitDiff": {"targets": [{"text": " Mary"}], "distractors": [{"text": " John"}]}
    },
}
RUN_REQUEST = ParseDict({"run": RUN, "topK": 3}, run_pb2.RunRequest())
VERIFY_REQUEST = ParseDict({"table": {**TABLE, "topK": 9}}, verify_pb2.VerifyRequest())
ASKED: dict[str, Message] = {
    "Run": RUN_REQUEST,
    "Attribute": ParseDict({**TABLE, "topK": 20}, attribute_pb2.AttributeRequest()),
    "DescribeComponent": component_pb2.DescribeComponentRequest(component="head.0.1"),
    "Verify": VERIFY_REQUEST,
    "Generate": ParseDict({"run": RUN, "maxNewTokens": 5}, generate_pb2.GenerateRequest()),
    "Generate, seeded": ParseDict(
        {"run": RUN, "maxNewTokens": 5, "temperature": 1.5, "seed": 3},
        generate_pb2.GenerateRequest(),
    ),
}
CACHES = ["memory", "redis"]


class Pieces(Unobserved):
    """Counts the pieces of work that the device began."""

    def __init__(self) -> None:
        self.count = 0

    def running(self, *args: Any, **more: Any) -> Any:
        self.count += 1
        return contextlib.nullcontext()


class Serving:
    """One inference service of its own, and what it has done."""

    def __init__(self, stub: "Stub", answers: Answers, pieces: Pieces) -> None:
        self.stub = stub
        self.answers = answers
        self._pieces = pieces

    async def ask(self, name: str, request: Message | None = None) -> list[Message]:
        """All messages of an answer."""
        call = getattr(self.stub, name.partition(",")[0])(request or ASKED[name])
        if hasattr(call, "__aiter__"):
            return [message async for message in call]
        return [await call]

    @property
    def pieces(self) -> int:
        """Pieces of work since this was asked last."""
        count, self._pieces.count = self._pieces.count, 0
        return count


@asynccontextmanager
async def serving(
    model: Model, cache: Cache | None = None, name: str = "tiny"
) -> AsyncIterator[Serving]:
    """Without `cache` nothing is kept, and only what is in flight is shared."""
    pieces = Pieces()
    scheduler = Scheduler(observer=pieces)
    answers = Answers(cache or MemoryCache(0))
    settings = Settings.from_env({"TDB_MODEL": f"{name}=org/model", "TDB_DRAIN_SECONDS": "1"})
    try:
        async with build_server(settings, scheduler, {name: model}, 0, answers=answers) as server:
            await server.set_serving()
            async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
                yield Serving(service_pb2_grpc.InferenceServiceStub(channel), answers, pieces)
    finally:
        scheduler.close()


class Passes:
    """The model's forward passes, counted and, while `held`, kept from going on."""

    def __init__(self) -> None:
        self.count = 0
        self.may_run = threading.Event()
        self.may_run.set()

    def __call__(self, *_: object) -> None:
        self.count += 1
        assert self.may_run.wait(60)

    async def begun(self, count: int) -> None:
        await until(lambda: self.count >= count)

    @contextmanager
    def held(self) -> Iterator[None]:
        self.may_run.clear()
        try:
            yield
        finally:
            self.may_run.set()


@pytest.fixture
def passes(model: Model) -> Iterator[Passes]:
    passes = Passes()
    hook = model._module.register_forward_pre_hook(passes)
    yield passes
    hook.remove()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


@pytest.fixture
def cache(request: pytest.FixtureRequest) -> Iterator[Cache]:
    if request.param == "memory":
        yield MemoryCache(2**26)
    else:
        with running() as server:
            yield patient(server.address)


def manifest_of(messages: list[Message]) -> manifest_pb2.Manifest:
    last: Any = messages[-1]
    found: manifest_pb2.Manifest = getattr(last, "summary", last).manifest
    return found


def without_circumstances(messages: list[Message]) -> list[bytes]:
    """The answer but for where it came from, when, and how it was queued."""
    kept: list[bytes] = []
    for message in messages:
        copy: Any = type(message)()
        copy.CopyFrom(message)
        if message is messages[-1]:
            manifest_of([copy]).ClearField("timings")
            manifest_of([copy]).ClearField("cached")
        elif copy.HasField("progress"):
            copy.progress.ClearField("queue")
        data = copy.SerializeToString(deterministic=True)
        if not kept or kept[-1] != data:
            kept.append(data)
    return kept


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


async def test_a_hundred_who_ask_at_once_cost_one_pass(model: Model, passes: Passes) -> None:
    for name in ("Run", "Attribute"):
        async with serving(model) as service:
            passes.count = 0
            with passes.held():
                asking = [asyncio.ensure_future(service.ask(name)) for _ in range(100)]
                await until(lambda: service.answers.flights.joined == 99)
            found = [answer for (answer,) in await asyncio.gather(*asking)]
            assert passes.count == 1
            assert service.pieces == 1
            assert len({answer.SerializeToString(deterministic=True) for answer in found}) == 1
            assert not manifest_of([found[0]]).cached
            # Nothing was kept, so the next one is computed: the count does count.
            await service.ask(name)
            assert passes.count == 2


async def test_streams_are_shared_from_their_beginning(model: Model, passes: Passes) -> None:
    async with serving(model) as service:
        with passes.held():
            early = asyncio.ensure_future(service.ask("Generate"))
            await passes.begun(1)
            late = asyncio.ensure_future(service.ask("Generate"))
            await until(lambda: service.answers.flights.joined == 1)
        first, second = await asyncio.gather(early, late)
        assert first == second
        assert passes.count == 5


async def test_who_leaves_leaves_the_others(model: Model, passes: Passes) -> None:
    async with serving(model) as service:
        with passes.held():
            calls = [service.stub.Run(RUN_REQUEST) for _ in range(3)]
            await until(lambda: service.answers.flights.joined == 2)
            calls[0].cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await calls[0]
        answers = await asyncio.gather(calls[1], calls[2])
        assert answers[0] == answers[1]
        assert passes.count == 1


async def test_the_first_ones_deadline_is_its_own(model: Model, passes: Passes) -> None:
    async with serving(model) as service:
        with passes.held():
            hurried = service.stub.Run(RUN_REQUEST, timeout=0.3)
            await passes.begun(1)
            patient = service.stub.Run(RUN_REQUEST, timeout=60)
            await until(lambda: service.answers.flights.joined == 1)
            with pytest.raises(grpc.aio.AioRpcError) as late:
                await hurried
            assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert (await patient).next_tokens
        assert passes.count == 1


async def test_when_all_have_left_the_work_ends(model: Model, passes: Passes) -> None:
    other = ParseDict({"run": {"prompt": PROMPT}}, run_pb2.RunRequest())
    async with serving(model, MemoryCache(2**26)) as service:
        with passes.held():
            blocking = asyncio.ensure_future(service.ask("Run", other))
            await passes.begun(1)
            calls = [service.stub.Run(RUN_REQUEST) for _ in range(3)]
            await until(lambda: service.answers.flights.joined == 2)
            for call in calls:
                call.cancel()
            await until(lambda: len(service.answers.flights) == 1)
        await blocking
        assert passes.count == 1, "what nobody waits for is not run"
        assert service.answers.cache.counters.stored == 1


async def test_an_error_reaches_all_and_is_not_kept(
    model: Model, passes: Passes, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(model, MemoryCache(2**26)) as service:
        with monkeypatch.context() as patched:

            def full(*_: Any, **__: Any) -> Any:
                passes()
                raise ResourceExhausted("no room", retry_after_s=1.0)

            patched.setattr(Model, "run", full)
            with passes.held():
                asking = [asyncio.ensure_future(service.ask("Run")) for _ in range(5)]
                await until(lambda: service.answers.flights.joined == 4)
            found = await asyncio.gather(*asking, return_exceptions=True)
        for each in found:
            assert isinstance(each, grpc.aio.AioRpcError)
            assert each.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert each.details() == "no room"
        assert not manifest_of(await service.ask("Run")).cached
        assert manifest_of(await service.ask("Run")).cached


async def test_a_cancelled_error_from_within_is_an_answer(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Let out, it would leave the client to wait for its own deadline."""

    async def cancelled(*_: Any) -> Any:
        raise asyncio.CancelledError

    async with serving(model) as service:
        monkeypatch.setattr("services.inference.servicer.InferenceServicer._run", cancelled)
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await service.stub.Run(RUN_REQUEST, timeout=60)
        assert failed.value.code() is grpc.StatusCode.INTERNAL


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


@pytest.fixture(scope="module")
def twin(model_folder: Path) -> Model:
    """The same weights, loaded once more: what another process would have."""
    return load_model(ModelSource("tiny", str(model_folder)), None)


@pytest.fixture(scope="module")
def bare(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The same weights under the same name without their tokenizer."""
    folder = tmp_path_factory.mktemp("bare")
    for name in ("config.json", "model.safetensors"):
        (folder / name).symlink_to(model_folder / name)
    return load_model(ModelSource("tiny", str(folder)), None)


async def test_two_services_share_one_redis(model: Model, twin: Model) -> None:
    with running() as redis:
        async with (
            serving(model, patient(redis.address)) as one,
            serving(twin, patient(redis.address)) as other,
        ):
            for name in ASKED:
                first, again = await one.ask(name), await other.ask(name)
                assert other.pieces == 0
                assert manifest_of(again).cached
                assert without_circumstances(again) == without_circumstances(first)


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


async def test_redis_may_go_and_come(model: Model, caplog: pytest.LogCaptureFixture) -> None:
    """Killed, hung, flushed and garbled while it is used, and no answer is lost or wrong."""
    caplog.set_level(logging.WARNING)
    with running() as redis:
        cache = patient(redis.address)
        async with serving(model, cache) as service:
            right = without_circumstances(await service.ask("Run"))

            async def asked(do: Callable[[], None] = lambda: None) -> bool:
                """Whether all of five answers were kept ones."""
                asking = [asyncio.ensure_future(service.ask("Run")) for _ in range(5)]
                do()
                answers = await asyncio.gather(*asking)
                assert all(without_circumstances(answer) == right for answer in answers)
                return all(manifest_of(answer).cached for answer in answers)

            assert await asked()
            redis.command("FLUSHALL")
            assert not await asked()
            assert await asked()
            keys = redis.command("KEYS", "*").split()
            (key,) = [each.decode() for each in keys if each.startswith(b"tdb:")]
            redis.command("SETRANGE", key, "30", "damage")
            assert not await asked()
            assert cache.counters.damaged == 1
            assert await asked()
            await asked(redis.stop)
            assert not await asked()
            redis.start()
            breaker = cache._breaker
            breaker._opened_at = -1e9  # its pause is over
            await asked()
            assert await asked()
            assert service.answers.cache.state == "closed"


@pytest.mark.parametrize("broken", ["frozen", "dead"])
async def test_without_redis_all_is_as_before(model: Model, broken: str) -> None:
    with running() as redis:
        env = {"TDB_MODEL": "tiny=org/model", "TDB_REDIS_URL": redis.url}
        settings = Settings.from_env(env)
        redis.freeze() if broken == "frozen" else redis.stop()
        scheduler = Scheduler()
        try:
            async with build_server(settings, scheduler, {"tiny": model}, 0) as server:
                await server.set_serving()
                async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
                    stub: Stub = service_pb2_grpc.InferenceServiceStub(channel)
                    for _ in range(5):
                        answer = await stub.Run(RUN_REQUEST, timeout=60)
                        assert answer.next_tokens
                        assert not answer.manifest.cached
        finally:
            scheduler.close()


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
