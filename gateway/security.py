"""What keeps other web pages and other people out.

Host     a page on the internet can point its own name at this machine (DNS rebinding), and
         then the browser takes it for the same origin: only known names are answered
Origin   a page elsewhere can make a browser post here: its Origin must be this host. A trusted
         proxy that talks to us under another name says in X-Forwarded-Host what it was asked for
User     calls need a token where TDB_TOKENS is set, or come from a trusted proxy that names the
         user (`identity`); the page itself and health do not, since the page is what asks for it
Headers  the page loads nothing from elsewhere, and nobody frames it
"""

from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway import connect
from services.common.errors import InvalidArgument, PermissionDenied, TdbError
from services.common.identity import USER_METADATA, Identity
from services.common.settings import Settings

OPEN_PATHS = ("/healthz", "/readyz")
READING = ("GET", "HEAD")
MAX_AUTHORIZATION = 4096
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
        self._identity = Identity.of_gateway(settings)
        self._proxies = settings.trusted_proxies
        self._user_header = settings.user_header
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
            self._check(scope, Headers(scope=scope))
        except TdbError as refusal:
            await connect.of_tdb_error(refusal)(scope, receive, send_with_headers)
            return
        await self._app(scope, receive, send_with_headers)

    def _check(self, scope: Scope, headers: Headers) -> None:
        """Lets a request in, and notes the user of a call in its state."""
        method = scope["method"]
        if scope["path"] in OPEN_PATHS and method in READING:  # probes: by address, without a token
            return
        peer = (scope.get("client") or ("",))[0]
        host = headers.get("host", "")
        if peer in self._proxies:
            host = headers.get("x-forwarded-host", host)
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
        if origin is not None and not _same_host(origin, host):
            raise PermissionDenied(
                "pages of another origin may not call this gateway", reason="ORIGIN_NOT_ALLOWED"
            )
        if USER_METADATA in headers and self._user_header != USER_METADATA:
            raise PermissionDenied(
                f"{USER_METADATA} is what the gateway tells its services, not what it is told",
                reason="USER_NOT_BELIEVED",
            )
        authorization = headers.get("authorization", "")
        if len(authorization) > MAX_AUTHORIZATION:  # gRPC's metadata have room for 8 KiB in all
            raise InvalidArgument(
                f"authorization has {len(authorization)} characters; at most {MAX_AUTHORIZATION} "
                "are read"
            )
        named = headers.getlist(self._user_header)
        user = self._identity.user(named, peer, authorization)
        scope.setdefault("state", {}).update(user=user, user_named=bool(named))


def _names(hosts: Iterable[str]) -> frozenset[str]:
    return frozenset(host.lower() for host in hosts)


def _host_name(host: str) -> str:
    """`Host` without its port: "[::1]:8080" is "::1"."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _same_host(origin: str, host: str) -> bool:
    """Whether `origin` is a page of `host`. Browsers leave a scheme's own port out of both, but
    what stands between may have added it."""
    try:
        found = urlsplit(origin)
        default = {"http": 80, "https": 443}.get(found.scheme)
        asked = urlsplit(f"//{host}")
        return bool(found.hostname) and (
            (found.hostname, found.port or default) == (asked.hostname, asked.port or default)
        )
    except ValueError:
        return False
