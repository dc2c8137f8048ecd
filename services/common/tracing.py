"""Traces, where they are wanted: one for each request, from the gateway to the work on the device.

This is all that other code knows of them; OpenTelemetry is imported only where TDB_OTEL turns it on
(`otel`). A span is passed on by hand, in `Call.trace` and in headers: what is current in a task
means nothing on the device's thread, and a stream's generator may be closed from another task.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from services.common.calls import Call
from services.common.settings import Settings, SettingsError

Value = str | int | float | bool


class Span(Protocol):
    """One request as one process serves it."""

    @property
    def trace(self) -> object:
        """What `Call.trace` holds for the work done for it; None where nothing is traced."""

    def headers(self) -> list[tuple[str, str]]:
        """What the next service must be sent so that its span is part of the same trace."""

    def end(self, code: str, **attributes: Value) -> None:
        """Ends it with the call's code, by gRPC's name or Connect's."""


class Tracing(Protocol):
    def serve(self, name: str, headers: Mapping[str, str], **attributes: Value) -> Span:
        """Begins the span of a request; `headers` are those that it came with."""

    def working(
        self, name: str, calls: Sequence[Call], **attributes: Value
    ) -> AbstractContextManager[None]:
        """Surrounds one piece of work that is done for all of `calls`; each has it in its trace."""

    def onward(self, call: Call) -> list[tuple[str, str]]:
        """What another service must be sent so that its work for `call` is in the same trace."""

    def close(self) -> None:
        """Sends what has not been sent; waits no longer than a few seconds."""


class _NoSpan:
    trace = None

    def headers(self) -> list[tuple[str, str]]:
        return []

    def end(self, code: str, **attributes: Value) -> None: ...


class Untraced:
    """Nothing is traced."""

    def serve(self, name: str, headers: Mapping[str, str], **attributes: Value) -> Span:
        return _NoSpan()

    @contextmanager
    def working(self, name: str, calls: Sequence[Call], **attributes: Value) -> Iterator[None]:
        yield

    def onward(self, call: Call) -> list[tuple[str, str]]:
        return []

    def close(self) -> None: ...


def start(settings: Settings, service: str) -> Tracing:
    """The tracing of a process. Raises SettingsError where it is asked for and not installed."""
    if not settings.otel:
        return Untraced()
    try:
        from services.common.otel import exporting
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"TDB_OTEL asks for traces, but {error.name} is not installed: install "
            "`transformer-debugger[otel]`, or set TDB_OTEL=0."
        ) from None
    return exporting(service)
