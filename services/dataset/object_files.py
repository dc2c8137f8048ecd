"""Files in an object store, `az://CONTAINER/PATH` or `s3://BUCKET/PATH`, through fsspec.

Account, endpoint and credentials are what the store's own package finds in the environment
(`AZURE_STORAGE_CONNECTION_STRING`, `AWS_ACCESS_KEY_ID` and so on), so a URL holds none of them and
every URL can be shown. What those packages say in their errors may hold a signature, so of errors
only the status and the kind are passed on. They do not try again here: this does, once.
"""

import importlib.util
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from services.common.errors import FailedPrecondition, ResourceExhausted, Unavailable
from services.dataset import http_files
from services.dataset.http_files import Missing

PART_TIMEOUT_S = 20.0
"""For a part of a file, whatever the store's package does meanwhile."""


@dataclass(frozen=True)
class Store:
    name: str
    package: str
    where_from: str
    """Where account and credentials come from."""

    def options(self) -> dict[str, Any]:
        """What its filesystem is made with: time-outs, and no attempts but the first."""
        timeout = http_files.TIMEOUT_S
        if self.package == "adlfs":
            return {"connection_timeout": timeout, "read_timeout": timeout}
        config = {"connect_timeout": timeout, "read_timeout": timeout}
        return {"config_kwargs": {**config, "retries": {"total_max_attempts": 1}}}


STORES = {
    "az": Store(
        "Azure Blob Storage",
        "adlfs",
        "AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT_NAME with "
        "AZURE_STORAGE_SAS_TOKEN, AZURE_STORAGE_ACCOUNT_KEY or, for a public container, "
        "AZURE_STORAGE_ANON=1",
    ),
    "s3": Store(
        "S3",
        "s3fs",
        "AWS_ACCESS_KEY_ID with AWS_SECRET_ACCESS_KEY, a profile or, for a public bucket, "
        "FSSPEC_S3_ANON=1; AWS_ENDPOINT_URL names a server that is not Amazon's",
    ),
}
"""By the scheme of their URLs."""

_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "ClientAuthenticationError")
_UNREACHABLE = (
    *("AzureError", "HTTPClientError", "ConnectionError", "IncompleteReadError"),
    *("ClientPayloadError", "ClientConnectionError"),
)
"""Names of the packages' own classes of errors."""


class ObjectFiles:
    """The files below a URL; safe to use from several threads."""

    def __init__(self, url: str, at_once: threading.Semaphore | None = None) -> None:
        """Raises FailedPrecondition where the package that reads the store is missing."""
        scheme, _, path = url.rstrip("/").partition("://")
        self._scheme, self._path = scheme, path
        self._store = STORES[scheme]
        self._at_once = at_once or threading.BoundedSemaphore(http_files.AT_ONCE)
        self._lock = threading.Lock()
        self._opened: Any = None
        self.shown = f"{scheme}://{path}"
        if any(importlib.util.find_spec(each) is None for each in ("fsspec", self._store.package)):
            raise FailedPrecondition(
                f"{self.shown} is in {self._store.name}, which is read with the package "
                f"{self._store.package}: install transformer-debugger[object-stores]",
                reason="MISSING_PACKAGE",
            )

    def close(self) -> None:
        """Ends its connections."""
        with self._lock:
            opened, self._opened = self._opened, None
        if opened is None:
            return
        from fsspec import asyn

        if self._scheme == "az":
            asyn.sync(opened.loop, opened.service_client.close, timeout=http_files.TIMEOUT_S)
        elif opened._s3 is not None:
            opened.close_session(opened.loop, opened._s3)

    def get(self, name: str, most_bytes: int) -> bytes:
        """A whole file. Raises Missing, FailedPrecondition, Unavailable, ResourceExhausted."""
        # One byte more than there may be shows what is too long without reading all of it.
        return self._get(name, 0, most_bytes + 1, most_bytes, http_files.WHOLE_TIMEOUT_S)

    def get_part(self, name: str, offset: int, size: int) -> bytes:
        """A part of a file; fewer bytes where it ends early. Raises as `get`."""
        return self._get(name, offset, offset + size, size, PART_TIMEOUT_S)

    def _get(self, name: str, start: int, end: int, most_bytes: int, timeout_s: float) -> bytes:
        if not self._at_once.acquire(blocking=False):
            raise ResourceExhausted(
                "too many reads of remote datasets are under way", retry_after_s=1.0
            )
        where = f"{self.shown}/{name}"
        try:
            # A connection that was kept may have been closed by the other side meanwhile.
            for attempt in (1, 2):
                try:
                    content = self._ask(name, start, end, timeout_s)
                except FailedPrecondition:
                    raise
                except Exception as error:
                    again = attempt == 1 and _may_be_of_the_connection(error)
                    if not again:
                        return self._refused(where, error)
                else:
                    break
        finally:
            self._at_once.release()
        if len(content) > most_bytes:
            raise FailedPrecondition(f"{where} is larger than it should be")
        return content

    def _ask(self, name: str, start: int, end: int, timeout_s: float) -> bytes:
        from fsspec import asyn

        filesystem = self._filesystem()
        path = f"{self._path}/{name}"
        content: bytes = asyn.sync(
            filesystem.loop, filesystem._cat_file, path, start=start, end=end, timeout=timeout_s
        )
        return content

    def _filesystem(self) -> Any:
        import fsspec

        with self._lock:
            if self._opened is None:
                # Of this object alone: what is shared cannot be closed.
                try:
                    opened = fsspec.filesystem(
                        self._scheme, skip_instance_cache=True, **self._store.options()
                    )
                except Exception:
                    raise self._no_account(self.shown) from None
                opened.retries = 1
                # adlfs passes these on to every read, and has no other way to say it.
                vars(opened).get("_timeout_kwargs", {})["retry_total"] = 0
                self._opened = opened
            return self._opened

    def _refused(self, where: str, error: Exception) -> bytes:
        """b"" for a part behind the end of the file. Raises for everything else."""
        status = _status(error)
        if status == 416:
            return b""
        if isinstance(error, FileNotFoundError) or status in (404, 410):
            raise Missing(where) from None
        kind = type(error).__name__
        if _has_timed_out(error):
            raise Unavailable(f"{where} cannot be read: timed out", retry_after_s=5.0) from None
        if status is not None and (status == 429 or status >= 500):
            raise Unavailable(
                f"{where} is answered with status {status}", retry_after_s=5.0
            ) from None
        if (
            status in (401, 403)
            or isinstance(error, PermissionError)
            or _is(error, _NO_CREDENTIALS)
        ):
            raise self._no_account(where) from None
        if status is not None:
            raise FailedPrecondition(f"{where} is answered with status {status}") from None
        if isinstance(error, OSError) or _is(error, _UNREACHABLE):
            raise Unavailable(f"{where} cannot be read: {kind}", retry_after_s=5.0) from None
        raise FailedPrecondition(f"{where} cannot be read: {kind}") from None

    def _no_account(self, where: str) -> FailedPrecondition:
        return FailedPrecondition(
            f"{where} cannot be read: its credentials are refused, or there are none. The account "
            f"for {self._store.name} comes from the environment of the dataset service: "
            f"{self._store.where_from}",
            reason="CREDENTIALS",
        )


def _may_be_of_the_connection(error: Exception) -> bool:
    """Whether another one may do better: not where there was an answer, or nothing for long."""
    unreachable = isinstance(error, OSError) or _is(error, _UNREACHABLE)
    answered = isinstance(error, FileNotFoundError | PermissionError)
    return unreachable and not (answered or _has_timed_out(error)) and _status(error) is None


def _has_timed_out(error: Exception) -> bool:
    return isinstance(error, TimeoutError) or "Timeout" in type(error).__name__


def _status(error: Exception) -> int | None:
    """The status of the HTTP answer that is behind an error."""
    for each in _causes(error):
        response = getattr(each, "response", None)
        if isinstance(response, dict):  # botocore's
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:
            status = getattr(each, "status_code", None)
        if isinstance(status, int):
            return status
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _is(error: Exception, names: tuple[str, ...]) -> bool:
    return any(kind.__name__ in names for kind in type(error).__mro__)
