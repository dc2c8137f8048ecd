"""The outermost layer: a request id for everyone, one log line per request, no traceback out."""

import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway import connect
from services.common.errors import TdbError

REQUEST_ID = "x-request-id"
QUIET_PATHS = ("/healthz", "/readyz")  # asked every few seconds by whoever watches us

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}\Z")
_log = logging.getLogger("tdb.gateway")


class Access:
    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID, "")
        request_id = given if _REQUEST_ID.match(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        started = time.monotonic()
        http_status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal http_status
            if message["type"] == "http.response.start":
                http_status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            error_id = uuid.uuid4().hex[:12]
            _log.exception("unexpected error", extra={"fields": {"error_id": error_id}})
            if http_status:  # half an answer is out already: only the connection can say so
                raise
            bug = TdbError(f"internal error {error_id}; the gateway's log has more")
            await connect.of_tdb_error(bug)(scope, receive, send_with_id)
        finally:
            fields = {
                "request_id": request_id,
                "method": scope["method"],
                "path": scope["path"],
                "status": http_status,
                "ms": round((time.monotonic() - started) * 1000, 1),
            }
            level = logging.DEBUG if scope["path"] in QUIET_PATHS else logging.INFO
            _log.log(level, "request", extra={"fields": fields})
