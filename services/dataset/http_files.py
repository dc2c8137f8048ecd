"""Files behind an https URL, whole or in part: one GET each, over connections that are kept.

The URL is the operator's, never a caller's, and redirects are not followed, so nobody can make this
process ask elsewhere. Its query (where a signature may stand) is sent and never shown.
"""

import http.client
import threading
import time
from urllib.parse import quote, urlsplit

from services.common.errors import FailedPrecondition, ResourceExhausted, Unavailable

TIMEOUT_S = 10.0
"""For a connection, and for each piece of an answer."""
WHOLE_TIMEOUT_S = 60.0
AT_ONCE = 12
_PIECE = 1 << 16


class Missing(Exception):
    """There is no such file."""


class HttpFiles:
    """The files below a URL; safe to use from several threads."""

    def __init__(self, url: str, at_once: threading.Semaphore | None = None) -> None:
        """`at_once` is shared by all that must not ask more often than it allows."""
        parts = urlsplit(url)
        self._secure = parts.scheme == "https"
        self._host, self._port = parts.hostname or "", parts.port
        self._path = parts.path.rstrip("/")
        self._query = f"?{parts.query}" if parts.query else ""
        self._at_once = at_once or threading.BoundedSemaphore(AT_ONCE)
        self._idle: list[http.client.HTTPConnection] = []
        self._lock = threading.Lock()
        self.shown = f"{parts.scheme}://{parts.netloc}{self._path}"

    def close(self) -> None:
        """Ends the connections that nobody uses."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def get(self, name: str, most_bytes: int) -> bytes:
        """A whole file. Raises Missing, FailedPrecondition, Unavailable, ResourceExhausted."""
        return self._get(name, {}, most_bytes)

    def get_part(self, name: str, offset: int, size: int) -> bytes:
        """A part of a file; fewer bytes where it ends early. Raises as `get`."""
        last = offset + size - 1
        return self._get(name, {"range": f"bytes={offset}-{last}"}, size)

    def _get(self, name: str, headers: dict[str, str], most_bytes: int) -> bytes:
        if not self._at_once.acquire(blocking=False):
            raise ResourceExhausted(
                "too many reads of remote datasets are under way", retry_after_s=1.0
            )
        try:
            # A connection that was kept may have been closed by the other side meanwhile.
            for attempt in (1, 2):
                connection = self._connection(new=attempt == 2)
                try:
                    content = self._ask(connection, name, headers, most_bytes)
                except (http.client.HTTPException, OSError) as error:
                    connection.close()
                    if attempt == 2 or isinstance(error, TimeoutError):
                        raise Unavailable(
                            f"{self.shown}/{name} cannot be read: {_said(error)}",
                            retry_after_s=5.0,
                        ) from None
                except BaseException:
                    connection.close()
                    raise
                else:
                    with self._lock:
                        self._idle.append(connection)
                    return content
            raise AssertionError("the second attempt ends it")
        finally:
            self._at_once.release()

    def _ask(
        self,
        connection: http.client.HTTPConnection,
        name: str,
        headers: dict[str, str],
        most_bytes: int,
    ) -> bytes:
        ends = time.monotonic() + WHOLE_TIMEOUT_S
        target = f"{self._path}/{quote(name)}{self._query}"
        connection.request("GET", target, headers={**headers, "accept-encoding": "identity"})
        response = connection.getresponse()
        if not self._has_content(name, response, wanted=206 if headers else 200):
            return b""
        content = bytearray()
        while piece := response.read(_PIECE):
            content += piece
            if len(content) > most_bytes:
                raise FailedPrecondition(f"{self.shown}/{name} is larger than it should be")
            if time.monotonic() > ends:
                raise TimeoutError(f"not all of it within {WHOLE_TIMEOUT_S:g} s")
        if response.length:  # what was announced and did not come
            raise http.client.IncompleteRead(bytes(content), response.length)
        return bytes(content)

    def _has_content(self, name: str, response: http.client.HTTPResponse, wanted: int) -> bool:
        """False for a part behind the end of the file. Raises for every other answer than `wanted`;
        the connection is of no more use then."""
        status = response.status
        where = f"{self.shown}/{name}"
        if status == wanted:
            return True
        if status in (404, 410):
            raise Missing(where)
        if status == 416 and wanted == 206:
            response.read(_PIECE)
            return False
        if status == 429 or status >= 500:
            raise Unavailable(f"{where} is answered with status {status}", retry_after_s=5.0)
        if status == 200:
            why = "the whole file, so it cannot be read in parts"
        elif 300 <= status < 400:
            why = f"a redirect (status {status}), which is not followed"
        else:
            why = f"status {status}"
        raise FailedPrecondition(f"{where} is answered with {why}")

    def _connection(self, *, new: bool) -> http.client.HTTPConnection:
        with self._lock:
            if self._idle and not new:
                return self._idle.pop()
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        return kind(self._host, self._port, timeout=TIMEOUT_S)


def _said(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
