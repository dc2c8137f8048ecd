"""How the explainer asks the dataset and inference services: for whom, until when, and what becomes
of what they refuse."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from tdb.dataset.v1 import dataset_pb2, read_pb2
from tdb.inference.v1 import generate_pb2, model_pb2

from services.common import calls, errors
from services.common.calls import Call
from services.common.errors import TdbError
from services.common.otel import OtelTracing
from services.common.server import ServiceServer
from services.common.tracing import Tracing
from services.explainer.upstream import Upstream
from tests.common.backend import Backend, serving, settings
from tests.common.certificates import CLIENT, Authority
from tests.dataset import helpers

MODEL = model_pb2.GetModelRequest(model="m")
NOBODY = "127.0.0.1:1"
"""Where nothing listens."""


@asynccontextmanager
async def upstream(
    *,
    dataset: ServiceServer | None = None,
    inference: ServiceServer | None = None,
    more: Mapping[str, str] = {},
    traces: Tracing | None = None,
) -> AsyncIterator[Upstream]:
    def address(server: ServiceServer | None) -> str:
        return f"127.0.0.1:{server.port}" if server else NOBODY

    addresses = {
        "TDB_DATASET_ADDRESS": address(dataset),
        "TDB_INFERENCE_ADDRESS": address(inference),
    }
    made = Upstream(settings(**addresses, **more), traces)
    try:
        yield made
    finally:
        await made.close()


def raising(error: BaseException) -> Backend:
    backend = Backend()

    async def answer(request: Any, context: Any) -> Any:
        raise error

    backend.answer = answer
    return backend


async def test_records_come_one_by_one_and_as_a_stream(tmp_path: Path) -> None:
    records = helpers.random_records(2, helpers.COMPONENTS[:5])
    helpers.write(tmp_path / "small", records)
    async with helpers.serving(tmp_path) as server, upstream(dataset=server) as asked:
        request = read_pb2.GetRecordRequest(dataset="small", component="neuron.0.3")
        found = await asked.dataset.GetRecord(request)
        assert found.record.component == "neuron.0.3"
        events = [
            each.WhichOneof("event")
            async for each in asked.dataset.StreamRecords(
                read_pb2.StreamRecordsRequest(dataset="small")
            )
        ]
        assert events == ["batch", "summary"]
        with pytest.raises(errors.NotFound, match="other") as refused:
            await asked.dataset.GetRecord(read_pb2.GetRecordRequest(dataset="other"))
        assert refused.value.field == "dataset"
        with pytest.raises(errors.InvalidArgument) as invalid:
            await asked.dataset.GetRecord(
                read_pb2.GetRecordRequest(dataset="small", component="neuron.0")
            )
        assert invalid.value.field == "component"


@pytest.mark.parametrize(
    "refusal",
    [
        errors.InvalidArgument("no such layer", field="component", reason="BEYOND"),
        errors.NotFound("no model m", field="model"),
        errors.FailedPrecondition("no tokenizer", reason="NO_TOKENIZER", metadata={"a": "b"}),
        errors.DeadlineExceeded("too late"),
        errors.Unimplemented("not yet", reason="NOT_BUILT"),
    ],
)
async def test_what_is_refused_is_refused_the_same(refusal: TdbError) -> None:
    async with serving(raising(refusal)) as server, upstream(inference=server) as asked:
        for attempt in (asked.inference.GetModel(MODEL), _first(asked)):
            with pytest.raises(type(refusal)) as refused:
                await attempt
            for name in ("message", "field", "reason", "metadata", "retry_after_s"):
                assert getattr(refused.value, name) == getattr(refusal, name), name


async def test_waiting_is_passed_on() -> None:
    full = errors.ResourceExhausted("the queue is full", reason="QUEUE_FULL", retry_after_s=7)
    starting = errors.Unavailable("it loads", reason="LOADING")
    async with serving(raising(full)) as server, upstream(inference=server) as asked:
        with pytest.raises(errors.ResourceExhausted) as refused:
            await asked.inference.GetModel(MODEL)
        assert (refused.value.reason, refused.value.retry_after_s) == ("QUEUE_FULL", 7)
    async with serving(raising(starting)) as server, upstream(inference=server) as asked:
        with pytest.raises(errors.Unavailable, match="the inference service: it loads") as later:
            await asked.inference.GetModel(MODEL)
        assert later.value.reason == "LOADING"
        assert later.value.retry_after_s


async def test_their_bugs_are_bugs_with_an_id() -> None:
    async with serving(raising(KeyError("x"))) as server, upstream(inference=server) as asked:
        with pytest.raises(TdbError, match="the inference service: internal error") as refused:
            await asked.inference.GetModel(MODEL)
    assert refused.value.code == "INTERNAL"
    assert refused.value.metadata["error_id"] in refused.value.message


@pytest.mark.parametrize("service", ["dataset", "inference"])
async def test_a_service_that_cannot_be_reached_is_named(service: str) -> None:
    async with upstream() as asked:
        attempt = (
            asked.dataset.ListDatasets(dataset_pb2.ListDatasetsRequest())
            if service == "dataset"
            else _first(asked)
        )
        with pytest.raises(
            errors.Unavailable, match=f"the {service} service at .* cannot be reached"
        ) as refused:
            await attempt
    assert refused.value.reason == f"{service.upper()}_UNREACHABLE"
    assert refused.value.retry_after_s


async def test_they_are_asked_for_the_user_until_the_deadline() -> None:
    backend = Backend()
    seen: list[Call] = []

    async def answer(request: Any, context: Any) -> Any:
        call = calls.current()
        assert call is not None
        seen.append(call)
        return model_pb2.GetModelResponse()

    backend.answer = answer
    tokens = {"TDB_TOKENS": "svc:one,ann:two"}
    async with (
        serving(backend, **tokens) as server,
        upstream(inference=server, more=tokens) as asked,
    ):
        deadline = time.monotonic() + 30
        for user in ("ann", "bob"):
            calls.enter(Call("Explain", "id-1", user=user, deadline=deadline))
            await asked.inference.GetModel(MODEL)
    proxied = {"TDB_TRUSTED_GATEWAYS": "127.0.0.1"}
    async with (
        serving(backend, **proxied) as server,
        upstream(inference=server, more=proxied) as asked,
    ):
        await asked.inference.GetModel(MODEL)
    # Of bob no token is known here.
    assert [each.user for each in seen] == ["ann", "svc", "bob"]
    assert {each.request_id for each in seen} == {"id-1"}
    assert all(each.deadline and abs(each.deadline - deadline) < 5 for each in seen)


async def test_their_work_is_in_the_trace_of_the_call() -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    traces = OtelTracing(provider)
    seen: list[str] = []

    async def answer(request: Any, context: Any) -> Any:
        seen.append(str(dict(context.invocation_metadata()).get("traceparent", "")))
        return model_pb2.GetModelResponse()

    backend = Backend()
    backend.answer = answer
    async with serving(backend) as server, upstream(inference=server, traces=traces) as asked:
        span = traces.serve("Explain", {})
        calls.enter(Call("Explain", "id-1", trace=span.trace))
        await asked.inference.GetModel(MODEL)
        span.end("OK")
        calls.enter(Call("Explain", "id-2"))  # one that is not traced
        await asked.inference.GetModel(MODEL)
    (finished,) = exporter.get_finished_spans()
    context = finished.get_span_context()
    assert context is not None
    first, second = seen
    assert first.startswith(f"00-{context.trace_id:032x}-{context.span_id:016x}-")
    assert second == ""


async def test_a_wrong_service_token_is_not_the_caller_s_fault() -> None:
    async with (
        serving(Backend(), TDB_TOKENS="svc:one") as server,
        upstream(inference=server, more={"TDB_SERVICE_TOKEN": "two"}) as asked,
    ):
        with pytest.raises(errors.FailedPrecondition, match="TDB_SERVICE_TOKEN") as refused:
            await asked.inference.GetModel(MODEL)
    assert refused.value.reason == "INFERENCE_REFUSES"


async def test_they_are_asked_by_mutual_tls(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    service = authority.pair("service")
    own = authority.pair("explainer", usage=CLIENT)
    of_service = {
        "TDB_TLS_CERT": service.cert,
        "TDB_TLS_KEY": service.key,
        "TDB_TLS_CLIENT_CA": authority.path,
    }
    known = {
        "TDB_TLS_CA": authority.path,
        "TDB_TLS_CLIENT_CERT": own.cert,
        "TDB_TLS_CLIENT_KEY": own.key,
    }
    async with serving(Backend(), **of_service) as server:
        async with upstream(inference=server, more=known) as asked:
            await asked.inference.ListModels(model_pb2.ListModelsRequest())
        async with upstream(inference=server) as asked:  # in the clear
            with pytest.raises(errors.Unavailable, match="the inference service at"):
                await asked.inference.ListModels(model_pb2.ListModelsRequest())


async def test_a_stream_that_is_left_is_cancelled() -> None:
    ended = asyncio.Event()

    class Endless(Backend):
        async def Generate(self, request: Any, context: Any) -> AsyncIterator[Any]:
            try:
                while True:
                    yield generate_pb2.GenerateResponse()
                    await asyncio.sleep(0.01)
            finally:
                ended.set()

    async with serving(Endless()) as server, upstream(inference=server) as asked:
        await _first(asked)
        await asyncio.wait_for(ended.wait(), 10)


async def _first(asked: Upstream) -> Any:
    """The first message of a stream that is left then."""
    stream: Any = asked.inference.Generate(generate_pb2.GenerateRequest())
    try:
        return await anext(stream)
    finally:
        await stream.aclose()
