"""The datasets of a folder, one folder each, opened when first asked for.

What is on disk counts: a dataset that another process has just finished is served at once, and one
that was replaced is opened anew. A folder without a manifest is no dataset yet.
"""

import re
import shutil
import uuid
from pathlib import Path
from threading import Lock

from services.common.errors import FailedPrecondition, InvalidArgument, NotFound
from services.dataset import manifest
from services.dataset.manifest import ManifestError
from services.dataset.reader import DatasetReader
from services.dataset.storage import LocalStorage
from services.dataset.store import BUILD

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_DELETED = ".deleted-"

HOW_TO_GET_ONE = "`tdb dataset import` makes one from OpenAI's or Neuronpedia's records"


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


class Library:
    """Safe to use from several threads."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._opened: dict[str, tuple[tuple[int, ...], DatasetReader]] = {}
        self._lock = Lock()
        for left in folder.glob(_DELETED + "*"):
            shutil.rmtree(left, ignore_errors=True)

    def names(self) -> list[str]:
        """All folders with a manifest, readable or not."""
        return sorted(
            path.parent.name
            for path in self._folder.glob(f"*/{manifest.NAME}")
            if _NAME.fullmatch(path.parent.name)
        )

    def open(self, name: str) -> DatasetReader:
        """Raises InvalidArgument, NotFound, FailedPrecondition (damaged)."""
        folder = self._folder / check_name(name)
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
            reader = DatasetReader(LocalStorage(folder))
        except FileNotFoundError:
            raise self._not_found(name) from None
        except ManifestError as error:
            raise FailedPrecondition(
                f"the dataset {name!r} cannot be served: {error}", reason="DAMAGED"
            ) from None
        with self._lock:
            self._opened[name] = (identity, reader)
        return reader

    def delete(self, name: str) -> int:
        """Deletes a dataset, readable or not, finished or not; the bytes freed.

        Raises InvalidArgument, NotFound, FailedPrecondition (the disk refuses).
        """
        folder = self._folder / check_name(name)
        if not any((folder / mark).exists() for mark in (manifest.NAME, BUILD)):
            raise self._not_found(name)
        size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
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
