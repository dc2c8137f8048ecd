"""What tests of kept and shared answers have in common: a service, its requests, counters."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf.json_format import ParseDict
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
from services.common.settings import ModelSource, Settings
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
