"""The outermost layer: a request id for everyone, one log line per request, no traceback out.

A line's `code` is how the request ended: a stream whose HTTP status is 200 may have failed after.
Its `user` is known of calls that were let in.
"""

import asyncio
import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway import connect
from gateway.metrics import PROBES, GatewayMetrics
from services.common.errors import TdbError
from services.common.status import REQUEST_ID
from services.common.tracing import Tracing

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}\Z")
_log = logging.getLogger("tdb.gateway")


class Access:
    def __init__(self, app: ASGIApp, metrics: GatewayMetrics, tracing: Tracing) -> None:
        self._app = app
        self._metrics = metrics
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID, "")
        request_id = given if _REQUEST_ID.match(given) else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        started = time.monotonic()
        http_status = sent_bytes = 0
        route = self._metrics.route(scope["method"], scope["path"])
        self._metrics.began(route)
        span = self._tracing.serve(route, Headers(scope=scope), request_id=request_id)
        state["trace_headers"] = span.headers()

        async def send_with_id(message: Message) -> None:
            nonlocal http_status, sent_bytes
            sent_bytes += len(message.get("body", b""))
            if message["type"] == "http.response.start":
                http_status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except asyncio.CancelledError:  # the server stops, and did not wait any longer
            connect.note(scope, "canceled")
            raise
        except Exception:
            error_id = uuid.uuid4().hex[:12]
            _log.exception("unexpected error", extra={"fields": {"error_id": error_id}})
            if http_status:  # half an answer is out already: only the connection can say so
                connect.note(scope, "internal")
                raise
            bug = TdbError(f"internal error {error_id}; the gateway's log has more")
            await connect.of_tdb_error(bug)(scope, receive, send_with_id)
        finally:
            seconds = time.monotonic() - started
            code = state.get("code") or connect.code_of(http_status)
            self._metrics.ended(route, code, seconds, sent_bytes)
            user = state.get("user", "")
            span.end(code, user=user)
            fields = {
                "request_id": request_id,
                "user": user,
                "method": scope["method"],
                "path": scope["path"],
                "status": http_status,
                "code": code,
                "ms": round(seconds * 1000, 1),
            }
            # Probes ask every few seconds.
            level = logging.DEBUG if route in PROBES else logging.INFO
            _log.log(level, "request", extra={"fields": fields})
