"""The gateway's process: uvicorn on a socket of our own, so that a busy port is one sentence and
port 0 can be announced."""

import contextlib
import os
import signal
import socket
import sys
from collections.abc import Iterator
from types import FrameType

import uvicorn

from gateway.app import create_app
from services.common import logs, tracing
from services.common.metrics import new_registry
from services.common.parent import follow_parent
from services.common.server import StartError, announce, cannot_listen, serve_metrics
from services.common.settings import Settings, SettingsError


class _Server(uvicorn.Server):
    """uvicorn that announces itself, and ends with exit code 0 when it is told to end."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and sockets:
            host, port = sockets[0].getsockname()[:2]
            announce("gateway", host, port)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        def stop(number: int, frame: FrameType | None) -> None:
            self.should_exit = True

        numbers = (signal.SIGTERM, signal.SIGINT)
        before = [signal.signal(number, stop) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)


def main() -> int:
    """Runs until told to stop; the exit code."""
    try:
        settings = Settings.from_env(os.environ)
        settings.check_gateway()
        logs.configure(settings)
        follow_parent(settings.drain_s + 5)
        registry = new_registry()
        with contextlib.ExitStack() as stack:
            traces = tracing.start(settings, "gateway")
            stack.callback(traces.close)
            app = create_app(settings, registry=registry, tracing=traces)
            listener = stack.enter_context(_listening(settings))
            port = settings.gateway_metrics_port
            if metrics := serve_metrics("gateway", settings, port, registry):
                stack.enter_context(metrics)
            config = uvicorn.Config(
                app,
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                ws="none",
                timeout_graceful_shutdown=max(1, round(settings.drain_s)),
            )
            _Server(config).run(sockets=[listener])
    except (SettingsError, StartError) as error:
        print(error, file=sys.stderr, flush=True)
        return 1
    return 0


def _listening(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.gateway_port))
        listener.listen(1024)
    except OSError:
        listener.close()
        raise cannot_listen("gateway", settings.host, settings.gateway_port) from None
    return listener
