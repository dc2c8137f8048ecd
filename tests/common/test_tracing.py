"""One trace from the gateway to the device's work, with OpenTelemetry's own exporter in memory."""

import logging
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from prometheus_client import CollectorRegistry

from services.common import calls, errors, tracing
from services.common.calls import Call
from services.common.otel import OtelTracing
from services.common.settings import SettingsError
from services.inference.metrics import DeviceMetrics
from tests.common.backend import settings
from tests.gateway import echo
from tests.gateway.echo import ECHO, ITEMS, EchoResponse, ItemsResponse
from tests.gateway.framings import EVENTS
from tests.gateway.helpers import NOWHERE, running


@pytest.fixture(autouse=True)
def exposed(monkeypatch: pytest.MonkeyPatch) -> None:
    echo.expose(monkeypatch, echo.DESCRIPTOR)


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def traced(exporter: InMemorySpanExporter) -> OtelTracing:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return OtelTracing(provider)


def ids(span: ReadableSpan | None) -> tuple[int, int]:
    """(trace, span)."""
    assert span is not None
    context = span.get_span_context()
    assert context is not None
    return context.trace_id, context.span_id


def parent(span: ReadableSpan) -> tuple[int, int] | None:
    return (span.parent.trace_id, span.parent.span_id) if span.parent else None


async def test_one_trace_from_the_gateway_to_the_device(
    exporter: InMemorySpanExporter, traced: OtelTracing, caplog: pytest.LogCaptureFixture
) -> None:
    device = DeviceMetrics(CollectorRegistry(), traced)

    async def answer(request: Any, context: Any) -> Any:
        call = calls.current()
        assert call is not None
        with device.running("Attribute", [call], 1, 3, 4):
            return EchoResponse()

    async with (
        echo.echo_server(unary=answer, tracing=traced) as server,
        running(f"127.0.0.1:{server.port}", NOWHERE, None, traced) as (_, client),
    ):
        await client.post(ECHO, json={}, headers={"x-request-id": "click-1"})
        await client.post(ECHO, json={})
    work, service, gateway, *second = exporter.get_finished_spans()
    assert [span.name for span in (gateway, service, work)] == [ECHO, ECHO[1:], "Attribute"]
    assert parent(gateway) is None
    assert parent(service) == ids(gateway)
    assert parent(work) == ids(service)
    assert [span.kind for span in (gateway, service)] == [SpanKind.SERVER] * 2
    for span in (gateway, service):
        assert dict(span.attributes or {})["tdb.request_id"] == "click-1"
    assert dict(work.attributes or {}) == {"tdb.rows": 1, "tdb.padded_tokens": 4}
    assert len(second) == 3
    assert {ids(span)[0] for span in second}.isdisjoint({ids(gateway)[0]})
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_a_trace_that_the_client_began_goes_on(
    exporter: InMemorySpanExporter, traced: OtelTracing
) -> None:
    began = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with running("127.0.0.1:1", NOWHERE, None, traced) as (_, client):
        await client.get("/healthz", headers={"traceparent": began})
        await client.get("/healthz", headers={"traceparent": "nonsense"})
    first, second = exporter.get_finished_spans()
    assert parent(first) == (0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331)
    assert parent(second) is None


async def test_spans_end_as_their_calls_do_and_hold_no_text(
    exporter: InMemorySpanExporter, traced: OtelTracing
) -> None:
    secret = "a secret prompt"

    async def items(request: Any, context: Any) -> AsyncIterator[Any]:
        yield ItemsResponse()
        if request.count:
            raise errors.Unavailable(f"stopping {secret}")
        raise errors.NotFound(f"no such thing {secret}")

    async with (
        echo.echo_server(items, tracing=traced) as server,
        running(f"127.0.0.1:{server.port}", NOWHERE, None, traced) as (_, client),
    ):
        for count in (0, 1):
            await client.post(ITEMS, json={"count": count, "text": secret}, headers=EVENTS)
    ends = [
        (dict(span.attributes or {})["tdb.code"], span.status.status_code)
        for span in exporter.get_finished_spans()
    ]
    assert ends == [
        ("NOT_FOUND", StatusCode.UNSET),
        ("not_found", StatusCode.UNSET),
        ("UNAVAILABLE", StatusCode.ERROR),
        ("unavailable", StatusCode.ERROR),
    ]
    assert secret not in str([span.to_json() for span in exporter.get_finished_spans()])


def test_work_shared_by_calls_is_in_the_trace_of_each(
    exporter: InMemorySpanExporter, traced: OtelTracing
) -> None:
    spans = [traced.serve(name, {}) for name in ("one", "two")]
    shared = [Call("/x", "1", trace=span.trace) for span in spans]
    with traced.working("Run", [*shared, Call("/untraced", "3")], rows=3):
        assert exporter.get_finished_spans() == ()
    for span in spans:
        span.end("OK")
    first, second, one, two = sorted(
        exporter.get_finished_spans(), key=lambda span: (span.name != "Run", span.name)
    )
    assert {parent(first), parent(second)} == {ids(one), ids(two)}
    assert ids(one)[0] != ids(two)[0]


def test_a_collector_that_is_not_there_is_one_line_and_holds_up_nobody() -> None:
    """In a process of its own, since its end counts too."""
    program = """
import logging, sys
from services.common import otel
logging.basicConfig(level="DEBUG", format="%(name)s", stream=sys.stdout)
otel.CLOSE_S = 0.5
traced = otel.exporting("inference")
for number in range(5000):
    traced.serve("one", {}).end("OK")
print("served")
traced.close()
"""
    env = {**os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "served" in lines
    assert lines.count("opentelemetry.exporter.otlp.proto.grpc.exporter") == 1


def test_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(tracing.start(settings(), "gateway"), tracing.Untraced)
    assert settings(OTEL_EXPORTER_OTLP_ENDPOINT="http://collector:4317").otel
    assert not settings(OTEL_EXPORTER_OTLP_ENDPOINT="http://collector:4317", TDB_OTEL="0").otel
    on = tracing.start(settings(TDB_OTEL="1"), "gateway")
    assert isinstance(on, OtelTracing)
    on.close()


def test_asked_for_and_not_installed_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    monkeypatch.delitem(sys.modules, "services.common.otel")
    with pytest.raises(SettingsError, match=r"transformer-debugger\[otel\]"):
        tracing.start(settings(TDB_OTEL="1"), "gateway")


def test_untraced_is_silent() -> None:
    nothing = tracing.Untraced()
    span = nothing.serve("x", {"traceparent": "y"})
    assert (span.trace, span.headers()) == (None, [])
    with nothing.working("x", [], rows=1):
        span.end("OK")
    nothing.close()
