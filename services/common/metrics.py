"""What every process counts, in the terms of Prometheus, and the port that it is read from.

There is no global registry: each server has its own, so that several can live in one process.
The port asks for a token and speaks TLS where services do, since metrics carry the names of users;
where there are no tokens it stays on loopback.
"""

import logging
import socket
import socketserver
import ssl
import threading
from http import HTTPStatus
from types import TracebackType
from typing import Any, Self

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    MetricsHandler,
    ProcessCollector,
    disable_created_metrics,
)

from services.common.tokens import Tokens

LATENCY_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 600, 3600)
MOST_NAMES = 100
OTHER = "other"
READ_TIMEOUT_S = 10.0

_log = logging.getLogger("tdb.metrics")

# A second series for each, which nobody asks for.
disable_created_metrics()  # type: ignore[no-untyped-call]


def new_registry() -> CollectorRegistry:
    """A registry that holds what the operating system knows of this process."""
    registry = CollectorRegistry(auto_describe=True)
    ProcessCollector(registry=registry)
    return registry


class CallMetrics:
    """The calls of a gRPC service, told by its interceptor."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "tdb_requests",
            "Calls that ended, by method and gRPC status.",
            ("method", "code"),
            registry=registry,
        )
        self._refusals = Counter(
            "tdb_refusals",
            "Calls that were refused, by the stable reason in their ErrorInfo: rate limits, full "
            "queues and missing tokens are among them.",
            ("reason",),
            registry=registry,
        )
        self._seconds = Histogram(
            "tdb_request_seconds",
            "How long calls took, from their first byte to their last.",
            ("method",),
            buckets=LATENCY_S,
            registry=registry,
        )
        self._in_flight = Gauge(
            "tdb_requests_in_flight", "Calls being served.", ("method",), registry=registry
        )
        self._response_bytes = Counter(
            "tdb_response_bytes",
            "Bytes of messages sent in answer, before HTTP/2's framing.",
            ("method",),
            registry=registry,
        )

    def began(self, method: str) -> None:
        self._in_flight.labels(method).inc()

    def ended(self, method: str, code: str, reason: str, seconds: float, sent_bytes: int) -> None:
        """`reason` is "" for a call that was not refused."""
        self._in_flight.labels(method).dec()
        self._requests.labels(method, code).inc()
        self._seconds.labels(method).observe(seconds)
        self._response_bytes.labels(method).inc(sent_bytes)
        if reason:
            self._refusals.labels(reason).inc()


class FirstNames:
    """Keeps a label's values few: the first `most` are themselves, all later ones "other"."""

    def __init__(self, most: int = MOST_NAMES) -> None:
        self._most = most
        self._known: set[str] = set()
        self._lock = threading.Lock()

    def __call__(self, name: str) -> str:
        with self._lock:
            if name not in self._known and len(self._known) >= self._most:
                return OTHER
            self._known.add(name)
            return name


class MetricsServer:
    """Answers GET with all metrics of `registry`, from threads of its own."""

    def __init__(
        self,
        registry: CollectorRegistry,
        host: str,
        port: int,
        tokens: Tokens,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """Listens; `port` 0 takes any free one. Raises OSError when the port is taken."""
        known = {"registry": registry, "tokens": tokens, "tls": tls}
        handler = type("_Handler", (_Handler,), known)
        kind = _ServerV6 if ":" in host else _Server
        self._server = kind((host, port), handler)
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, name="metrics"
        )
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True  # a scraper that reads slowly does not keep the process alive

    def handle_error(self, request: Any, client_address: Any) -> None:
        _log.debug("a scrape failed", exc_info=True)


class _ServerV6(_Server):
    address_family = socket.AF_INET6


class _Handler(MetricsHandler):
    tokens: Tokens
    tls: ssl.SSLContext | None
    timeout = READ_TIMEOUT_S

    def setup(self) -> None:
        if self.tls:  # here, in a thread of its own: whoever shakes hands slowly holds up nobody
            self.request.settimeout(READ_TIMEOUT_S)
            self.request = self.tls.wrap_socket(self.request, server_side=True)
        super().setup()

    def finish(self) -> None:
        super().finish()
        if self.tls:  # the server closes only what it accepted, which the wrapping took over
            self.request.close()

    def do_GET(self) -> None:
        if self.tokens and self.tokens.user_of(self.headers.get("authorization", "")) is None:
            self.send_response(HTTPStatus.UNAUTHORIZED)
            self.send_header("www-authenticate", "Bearer")
            self.send_header("content-length", "0")
            self.end_headers()
            return
        super().do_GET()
