"""The datasets that are served: those of a folder, one folder each, and those behind URLs that the
operator named. Each is opened when first asked for.

What is on disk counts: a dataset that another process has just finished is served at once, and one
that was replaced is opened anew. A folder without a manifest is no dataset yet. Of a remote one the
manifest is asked for again after REFRESH_S; while the other side is away, the last one stands.
"""

import logging
import re
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from services.common.errors import FailedPrecondition, InvalidArgument, NotFound, TdbError
from services.dataset import manifest
from services.dataset.manifest import ManifestError
from services.dataset.openai_remote import OpenAIReader
from services.dataset.reader import DatasetReader
from services.dataset.remote import RemoteStorage
from services.dataset.storage import LocalStorage, Storage
from services.dataset.store import BUILD

HOW_TO_GET_ONE = (
    "`tdb dataset build` makes one from a corpus, `tdb dataset import` from OpenAI's or "
    "Neuronpedia's records"
)
BUILDING = "building"
"""The folder within a dataset's that holds a build which is not finished."""
REFRESH_S = 60.0
RETRY_S = 5.0
"""How long a remote dataset that could not be opened is not asked for again."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_DELETED = ".deleted-"
_log = logging.getLogger("tdb.dataset")


def check_name(name: str) -> str:
    """A name that can be a folder's. Raises InvalidArgument."""
    if not name:
        raise InvalidArgument("the name of a dataset is required", reason="REQUIRED")
    if not _NAME.fullmatch(name):
        raise InvalidArgument(
            f"{name[:100]!r} cannot be the name of a dataset: use at most 100 letters, digits, "
            "`.`, `_` and `-`, the first a letter or digit"
        )
    return name


@dataclass
class _Remote:
    """A remote dataset; the time is one of the library's clock."""

    storage: RemoteStorage
    lock: Lock
    reader: DatasetReader | None = None
    error: TdbError | None = None
    ask_after: float = 0.0


class Library:
    """Safe to use from several threads."""

    def __init__(
        self,
        folder: Path,
        remotes: Sequence[RemoteStorage] = (),
        clock: Callable[[], float] = time.monotonic,
        published: Sequence[OpenAIReader] = (),
    ) -> None:
        """`clock` gives seconds; `published` need no opening."""
        self._folder = folder
        self._clock = clock
        self._remotes = {each.name: _Remote(each, Lock()) for each in remotes}
        self._published = {each.name: each for each in published}
        self._opened: dict[str, tuple[tuple[int, ...], DatasetReader]] = {}
        self._lock = Lock()
        for left in folder.glob(_DELETED + "*"):
            shutil.rmtree(left, ignore_errors=True)

    def warm_up(self) -> int:
        """Opens the local datasets, so that the first call need not; how many can be served. What
        is wrong with one is said when it is asked for."""
        served = 0
        for name in self.names():
            if not self.is_remote(name):
                with suppress(TdbError):
                    self.open(name).vocabulary()
                    served += 1
        return served

    def close(self) -> None:
        """Ends connections to remote datasets."""
        for remote in self._remotes.values():
            remote.storage.close()
        for published in self._published.values():
            published.close()

    def names(self) -> list[str]:
        """All remote datasets and all folders with a manifest, readable or not."""
        local = (path.parent.name for path in self._folder.glob(f"*/{manifest.NAME}"))
        return sorted(
            {*self._remotes, *self._published, *(name for name in local if _NAME.fullmatch(name))}
        )

    def is_remote(self, name: str) -> bool:
        return name in self._remotes or name in self._published

    def open(self, name: str) -> DatasetReader:
        """Raises InvalidArgument, NotFound, FailedPrecondition (damaged); for a remote one also
        Unavailable and ResourceExhausted."""
        check_name(name)
        if (remote := self._remotes.get(name)) is not None:
            return self._open_remote(remote)
        if (published := self._published.get(name)) is not None:
            return published
        return self._open_local(name)

    def _open_local(self, name: str) -> DatasetReader:
        folder = self._folder / name
        try:
            stat = (folder / manifest.NAME).stat()
        except OSError:
            raise self._not_found(name) from None
        identity = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
        with self._lock:
            known = self._opened.get(name)
        if known is not None and known[0] == identity:
            return known[1]
        try:
            reader = _reader(LocalStorage(folder))
        except FileNotFoundError:
            raise self._not_found(name) from None
        with self._lock:
            self._opened[name] = (identity, reader)
        return reader

    def _open_remote(self, remote: _Remote) -> DatasetReader:
        """One thread asks; others wait for its answer."""
        with remote.lock:
            if self._clock() >= remote.ask_after:
                self._ask(remote)
            if remote.reader is not None:
                return remote.reader
            assert remote.error is not None
            raise copy(remote.error)  # whoever passes it on puts its own field in front

    def _ask(self, remote: _Remote) -> None:
        try:
            reader = _reader(remote.storage)
        except TdbError as error:
            remote.error, remote.ask_after = error, self._clock() + RETRY_S
            if remote.reader is not None:
                _log.warning(
                    "a remote dataset does not answer; what is known of it is served",
                    extra={"fields": {"dataset": remote.storage.name, "why": error.message}},
                )
            return
        known = remote.reader
        if known is None or known.manifest.hash != reader.manifest.hash:
            remote.reader = reader
        remote.ask_after = self._clock() + REFRESH_S

    def delete(self, name: str) -> int:
        """Deletes a dataset, readable or not, finished or not; the bytes freed.

        Raises InvalidArgument, NotFound, FailedPrecondition (it is remote, or the disk refuses).
        """
        folder = self._folder / check_name(name)
        if self.is_remote(name):
            setting = "TDB_REMOTE_DATASETS" if name in self._remotes else "TDB_OPENAI_RECORDS"
            raise FailedPrecondition(
                f"the dataset {name!r} is remote: {setting} no longer naming it is all that can "
                "be done here"
            )
        if not any((folder / mark).exists() for mark in (manifest.NAME, BUILD, BUILDING)):
            raise self._not_found(name)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        # Gone at once for every reader; what takes time comes after.
        away = self._folder / f"{_DELETED}{uuid.uuid4().hex}"
        try:
            folder.rename(away)
            shutil.rmtree(away)
        except OSError as error:
            raise FailedPrecondition(
                f"the dataset {name!r} cannot be deleted: {error.strerror}"
            ) from None
        with self._lock:
            self._opened.pop(name, None)
        return size

    def _not_found(self, name: str) -> NotFound:
        there = ", ".join(self.names()[:10])
        what = f"there are: {there}" if there else f"there is none yet; {HOW_TO_GET_ONE}"
        return NotFound(f"there is no dataset {name!r} here; {what}")


def _reader(storage: Storage) -> DatasetReader:
    try:
        return DatasetReader(storage)
    except ManifestError as error:
        raise FailedPrecondition(
            f"the dataset {storage.name!r} cannot be served: {error}", reason="DAMAGED"
        ) from None
