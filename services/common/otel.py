"""Traces by OpenTelemetry, sent by OTLP to where the OTEL_EXPORTER_OTLP_* variables say.

Our own spans rather than those of the instrumentation package for gRPC: that one makes its span
current in the task that serves the call, where the device's thread cannot find it, and wraps the
context that statuses are written to.
"""

import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from services.common.calls import Call
from services.common.tracing import Span, Value

# Codes that are the server's fault: what OpenTelemetry's conventions call errors of a server.
FAULTS = ("UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS")

CLOSE_S = 2.0
NEWS_EVERY_S = 60.0
_EXPORTER_LOG = "opentelemetry.exporter.otlp.proto.grpc.exporter"

_W3C = TraceContextTextMapPropagator()


def exporting(service: str, exporter: SpanExporter | None = None) -> "OtelTracing":
    """Traces of one process, named `tdb-SERVICE`, sent in batches from a thread of its own."""
    logging.getLogger(_EXPORTER_LOG).addFilter(_News())
    provider = TracerProvider(
        resource=Resource.create({"service.name": f"tdb-{service}"}), shutdown_on_exit=False
    )
    provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter()))
    return OtelTracing(provider)


class _News(logging.Filter):
    """That a collector is not there is news once a minute, not with every try."""

    def __init__(self) -> None:
        super().__init__()
        self._last = -NEWS_EVERY_S

    def filter(self, record: logging.LogRecord) -> bool:
        now = time.monotonic()
        if now - self._last < NEWS_EVERY_S:
            return False
        self._last = now
        return True


class OtelTracing:
    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("tdb")

    def serve(self, name: str, headers: Mapping[str, str], **attributes: Value) -> Span:
        # A context of its own: what happens to be current here is another call's.
        parent = _W3C.extract(dict(headers), context=Context())
        return _OtelSpan(
            self._tracer.start_span(name, parent, SpanKind.SERVER, _prefixed(attributes))
        )

    @contextmanager
    def working(self, name: str, calls: Sequence[Call], **attributes: Value) -> Iterator[None]:
        with ExitStack() as stack:
            for call in calls:
                if isinstance(call.trace, Context):
                    span = self._tracer.start_span(
                        name, call.trace, attributes=_prefixed(attributes)
                    )
                    stack.callback(span.end)
            yield

    def onward(self, call: Call) -> list[tuple[str, str]]:
        return _headers(call.trace) if isinstance(call.trace, Context) else []

    def close(self) -> None:
        # Left alone where it takes longer: a collector that is gone shall not hold up the end.
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(CLOSE_S)


class _OtelSpan:
    def __init__(self, span: trace.Span) -> None:
        self._span = span
        self.trace: object = trace.set_span_in_context(span, Context())

    def headers(self) -> list[tuple[str, str]]:
        return _headers(trace.set_span_in_context(self._span, Context()))

    def end(self, code: str, **attributes: Value) -> None:
        self._span.set_attributes(_prefixed({"code": code, **attributes}))
        if code.upper() in FAULTS:
            self._span.set_status(Status(StatusCode.ERROR, code))
        self._span.end()


def _headers(context: Context) -> list[tuple[str, str]]:
    carrier: dict[str, str] = {}
    _W3C.inject(carrier, context)
    return list(carrier.items())


def _prefixed(attributes: Mapping[str, Value]) -> dict[str, Value]:
    return {f"tdb.{name}": value for name, value in attributes.items()}
