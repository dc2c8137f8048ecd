"""What the gateway counts, in the terms of Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from gateway import backends
from services.common.metrics import LATENCY_S

PROBES = ("/healthz", "/readyz")
PAGE = "page"
OTHER = "other"


class GatewayMetrics:
    """HTTP requests by route: an RPC's path, a probe, "page" for its files, "other"."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._streams = {
            f"/{service.full_name}/{method.name}": method.server_streaming
            for services in backends.EXPOSED.values()
            for service in services
            for method in backends.methods(service)
        }
        self._requests = Counter(
            "tdb_gateway_requests",
            "HTTP requests that ended, by route and by Connect code ('ok' among them): for streams "
            "the code in their last frame.",
            ("route", "code"),
            registry=registry,
        )
        self._seconds = Histogram(
            "tdb_gateway_request_seconds",
            "How long HTTP requests took, from the first byte to the last.",
            ("route",),
            buckets=LATENCY_S,
            registry=registry,
        )
        self._in_flight = Gauge(
            "tdb_gateway_requests_in_flight", "HTTP requests being answered.", registry=registry
        )
        self._open_streams = Gauge(
            "tdb_gateway_open_streams",
            "Streams being answered, by route; they are among the requests in flight.",
            ("route",),
            registry=registry,
        )
        self._response_bytes = Counter(
            "tdb_gateway_response_bytes",
            "Bytes of response bodies.",
            ("route",),
            registry=registry,
        )

    def route(self, method: str, path: str) -> str:
        """The label of a request; there are only so many, whatever paths are asked for."""
        if path in PROBES or path in self._streams:
            return path
        return PAGE if method in ("GET", "HEAD") else OTHER

    def began(self, route: str) -> None:
        self._in_flight.inc()
        if self._streams.get(route):
            self._open_streams.labels(route).inc()

    def ended(self, route: str, code: str, seconds: float, sent_bytes: int) -> None:
        self._in_flight.dec()
        if self._streams.get(route):
            self._open_streams.labels(route).dec()
        self._requests.labels(route, code).inc()
        self._seconds.labels(route).observe(seconds)
        self._response_bytes.labels(route).inc(sent_bytes)
