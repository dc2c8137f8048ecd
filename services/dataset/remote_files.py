"""Files that lie elsewhere: behind https (`http_files`) or in an object store (`object_files`).

The operator names the places, never a caller.
"""

import threading
from typing import Protocol
from urllib.parse import urlsplit

from services.dataset.http_files import HttpFiles
from services.dataset.object_files import STORES, ObjectFiles


class RemoteFiles(Protocol):
    """The files below a URL; safe to use from several threads.

    Both ways of reading raise Missing where there is no such file, FailedPrecondition where the
    other side does not answer as it should, Unavailable while it does not answer, and
    ResourceExhausted where too much is asked at once.
    """

    shown: str
    """The URL, without what must not be shown."""

    def get(self, name: str, most_bytes: int) -> bytes:
        """A whole file."""
        ...

    def get_part(self, name: str, offset: int, size: int) -> bytes:
        """A part of a file; fewer bytes where it ends early."""
        ...

    def close(self) -> None:
        """Ends the connections that nobody uses."""
        ...


def below(url: str, at_once: threading.Semaphore | None = None) -> RemoteFiles:
    """The files below a URL; `at_once` is shared by all who must not ask more often than it says.

    Raises FailedPrecondition where the package that reads such a place is missing."""
    if urlsplit(url).scheme in STORES:
        return ObjectFiles(url, at_once)
    return HttpFiles(url, at_once)
