"""What keeps other web pages and other people out.

Host     a page on the internet can point its own name at this machine (DNS rebinding), and
         then the browser takes it for the same origin: only known names are answered
Origin   a page elsewhere can make a browser post here: its Origin must be this host
Token    where TDB_TOKENS is set, calls need one; the page itself and health do not, since the
         page is what asks for it
Headers  the page loads nothing from elsewhere, and nobody frames it
"""

from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway import connect
from services.common.errors import PermissionDenied, TdbError, Unauthenticated
from services.common.settings import Settings
from services.common.tokens import Tokens

OPEN_PATHS = ("/healthz", "/readyz")
READING = ("GET", "HEAD")
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")

HEADERS = {
    "content-security-policy": (
        "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; "
        "frame-ancestors 'none'; base-uri 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


class Security:
    """Pure ASGI middleware: checks on the way in, headers on the way out."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._tokens: Tokens = settings.tokens
        self._hosts = _names([*LOOPBACK_NAMES, settings.host, *settings.allowed_hosts])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        try:
            self._check(scope["method"], scope["path"], Headers(scope=scope))
        except TdbError as refusal:
            await connect.of_tdb_error(refusal)(scope, receive, send_with_headers)
            return
        await self._app(scope, receive, send_with_headers)

    def _check(self, method: str, path: str, headers: Headers) -> None:
        if path in OPEN_PATHS and method in READING:  # probes come by address and without a token
            return
        host = headers.get("host", "")
        name = _host_name(host)
        if name not in self._hosts:
            raise PermissionDenied(
                f"this gateway is not known as {name[:100]!r}; if it should be, name it in "
                "TDB_ALLOWED_HOSTS",
                reason="HOST_NOT_ALLOWED",
            )
        if method in READING:
            return
        origin = headers.get("origin")
        if origin is not None and _netloc(origin) != host.lower():
            raise PermissionDenied(
                "pages of another origin may not call this gateway", reason="ORIGIN_NOT_ALLOWED"
            )
        if self._tokens and self._tokens.user_of(headers.get("authorization", "")) is None:
            raise Unauthenticated(
                "this gateway asks for a token: send authorization: Bearer TOKEN",
                reason="TOKEN_REQUIRED",
            )


def _names(hosts: Iterable[str]) -> frozenset[str]:
    return frozenset(host.lower() for host in hosts)


def _host_name(host: str) -> str:
    """`Host` without its port: "[::1]:8080" is "::1"."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""
