"""A gRPC service's process: listening, health, reflection, draining.

    server = ServiceServer("inference", settings, port=..., add_servicers=..., service_names=[...])
    async with server:              # listening, NOT_SERVING
        ...                         # load the model, warm up
        await server.set_serving()  # health says SERVING from here on

`run_service` is that as a process: it prints one JSON line when it listens, prepares, serves until
SIGTERM or SIGINT, drains, and answers the exit code. What stops it before it serves is one sentence
on stderr and exit code 1.
"""

import asyncio
import contextlib
import json
import logging
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Self

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry
from tdb.channel import MAX_MESSAGE_BYTES

from services.common import logs
from services.common.errors import TdbError
from services.common.interceptor import CallInterceptor
from services.common.metrics import CallMetrics, MetricsServer, new_registry
from services.common.parent import follow_parent
from services.common.settings import Settings, SettingsError, is_loopback, listen_address
from services.common.tls import ServerTls
from services.common.tracing import Tracing, Untraced

# The last line of defence, which knows no health checks and no pushback: the interceptor lets in
# far fewer and answers the others.
MAX_CALLS_AT_THE_DOOR = 16_384

_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Of calls that no handler has taken yet gRPC would throw some away as CANCELLED: beyond 1,000,
    # and those that wait for 30 s.
    ("grpc.server.max_pending_requests", MAX_CALLS_AT_THE_DOOR),
    ("grpc.server.max_pending_requests_hard_limit", MAX_CALLS_AT_THE_DOOR),
    ("grpc.server_max_unrequested_time_in_server", 600),
    # Otherwise a second server binds the same port without an error and steals calls.
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Clients ping every 30 s; the default server would cut them off for "too many pings".
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
)

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_log = logging.getLogger("tdb.server")


class StartError(Exception):
    """Why a process cannot start, or go on, in one sentence."""


def cannot_listen(service: str, host: str, port: int) -> StartError:
    return StartError(
        f"the {service} service cannot listen on {host} port {port}: is the port in use? "
        f"TDB_{service.upper()}_PORT chooses another."
    )


def serve_metrics(
    service: str, settings: Settings, port: int | None, registry: CollectorRegistry
) -> MetricsServer | None:
    """Opens the metrics' own port and tells of it; does nothing where there is to be none. Raises
    StartError when the port is taken."""
    if port is None:
        return None
    # Who may read them is told by tokens only.
    host = settings.host if settings.tokens or is_loopback(settings.host) else "127.0.0.1"
    tls = ServerTls.of(settings)
    context = tls.context("TDB_TLS_CERT", "TDB_TLS_KEY") if tls else None
    try:
        server = MetricsServer(registry, host, port, settings.tokens, context)
    except OSError:
        raise StartError(
            f"the {service} service cannot listen on {host} port {port} for its metrics: is the "
            f"port in use? TDB_{service.upper()}_METRICS_PORT chooses another."
        ) from None
    announce(service, host, server.port, event="metrics")
    return server


class ServiceServer:
    """One gRPC server with the interceptor, health and reflection that every service has."""

    def __init__(
        self,
        name: str,
        settings: Settings,
        *,
        port: int,
        add_servicers: Callable[[grpc.aio.Server], None],
        service_names: Sequence[str],
        metrics_port: int | None = None,
        registry: CollectorRegistry | None = None,
        tracing: Tracing | None = None,
        on_stop: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """`port` 0 takes any free port. `service_names` are full proto names, for health and
        reflection. `registry` holds what the service counts itself; None for `metrics_port` keeps
        all of it inside. `tracing` is the caller's to close. `on_stop` runs after the last
        call."""
        self.name = name
        self.settings = settings
        self.port = port
        self._add_servicers = add_servicers
        self._service_names = tuple(service_names)
        self._on_stop = on_stop
        self.registry = registry or new_registry()
        self.metrics_port = metrics_port
        self._metrics = CallMetrics(self.registry)
        self._interceptor = CallInterceptor(settings, self._metrics, tracing or Untraced())
        self._metrics_server: MetricsServer | None = None
        self._health = HealthServicer()
        self._server: grpc.aio.Server | None = None
        self.stopped = asyncio.Event()
        """Set once the process is to stop."""
        self.failure: StartError | None = None
        """Why it stops, if it failed."""

    async def __aenter__(self) -> Self:
        """Listens. Raises StartError when the port is taken, SettingsError where TLS cannot be."""
        tls = ServerTls.of(self.settings)
        server = grpc.aio.server(
            interceptors=[self._interceptor],
            options=[*_OPTIONS, *self._connection_age()],
            maximum_concurrent_rpcs=MAX_CALLS_AT_THE_DOOR,
        )
        self._add_servicers(server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if self.settings.reflection:
            names = [*self._service_names, "grpc.health.v1.Health", reflection.SERVICE_NAME]
            reflection.enable_server_reflection(names, server)
        await self._set_health(_NOT_SERVING)
        try:
            address = listen_address(self.settings.host, self.port)
            self.port = (
                server.add_secure_port(address, tls.credentials())
                if tls
                else server.add_insecure_port(address)
            )
        except RuntimeError:
            raise cannot_listen(self.name, self.settings.host, self.port) from None
        self._metrics_server = serve_metrics(
            self.name, self.settings, self.metrics_port, self.registry
        )
        if self._metrics_server:
            self.metrics_port = self._metrics_server.port
        await server.start()
        self._server = server
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.drain()

    async def set_serving(self) -> None:
        """Health says SERVING, for each service and for the whole server ("")."""
        await self._set_health(_SERVING)

    async def set_not_serving(self) -> None:
        """Health says NOT_SERVING until `set_serving`; calls are still let in."""
        await self._set_health(_NOT_SERVING)

    def fail(self, sentence: str) -> None:
        """Ends the process, with exit code 1: a supervisor starts it again."""
        self.failure = StartError(sentence)
        self.stopped.set()

    async def drain(self) -> None:
        """Refuses new calls, gives those in flight `drain_s` to end, cancels the rest."""
        if self._server is None:
            return
        server, self._server = self._server, None
        await self._health.enter_graceful_shutdown()
        await self._interceptor.in_flight.end(self.settings.drain_s)
        await server.stop(None)
        if self._metrics_server:
            await asyncio.to_thread(self._metrics_server.close)
        if self._on_stop:
            await self._on_stop()

    def _connection_age(self) -> list[tuple[str, int]]:
        """gRPC varies it by a tenth, so that connections do not all end together; without a grace
        of its own it lets what runs on an old connection run."""
        age_s = self.settings.max_connection_age_s
        return [("grpc.max_connection_age_ms", round(age_s * 1000))] if age_s else []

    async def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for name in ("", *self._service_names):
            await self._health.set(name, status)


def announce(service: str, host: str, port: int, *, event: str = "listening") -> None:
    """Tells whoever started this process where it listens: one JSON line on standard output."""
    line = {"event": event, "service": service, "host": host, "port": port}
    print(json.dumps(line), flush=True)


def run_service(server: ServiceServer, prepare: Callable[[ServiceServer], Awaitable[None]]) -> int:
    """Runs a service until it is told to stop; the exit code.

    `prepare` runs once the server listens: it loads the model, warms it up and calls
    `server.set_serving()`. A TdbError, SettingsError or StartError from it ends the process with
    its sentence. SIGTERM cancels it.
    """
    logs.configure(server.settings)
    follow_parent(server.settings.drain_s + 5)
    try:
        asyncio.run(_serve(server, prepare))
    except (TdbError, SettingsError, StartError) as error:
        print(error, file=sys.stderr, flush=True)
        return 1
    return 0


async def _serve(
    server: ServiceServer, prepare: Callable[[ServiceServer], Awaitable[None]]
) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.stopped.set)
    async with server:
        announce(server.name, server.settings.host, server.port)
        preparing = asyncio.ensure_future(prepare(server))
        stopping = asyncio.ensure_future(server.stopped.wait())
        await asyncio.wait({preparing, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if preparing.done():
            stopping_early = preparing.exception() is not None
            if stopping_early:
                stopping.cancel()
            preparing.result()
            await stopping
        else:
            preparing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await preparing
        _log.info("stopping", extra={"fields": {"service": server.name}})
        if server.failure:
            raise server.failure
