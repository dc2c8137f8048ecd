"""Where the files of a dataset lie: in a folder here, or behind a URL (`remote`).

The manifest names every file with its size and SHA-256. Small files are read whole; of records only
the part that is wanted.
"""

import os
from pathlib import Path
from typing import Protocol

from services.common.errors import NotFound
from services.dataset import manifest
from services.dataset.damage import Damaged
from services.dataset.manifest import StoredFile


class PartlyRead(Protocol):
    """A file that is read in parts; safe to use from several threads."""

    def read(self, offset: int, size: int) -> bytes:
        """Fewer bytes where the file ends early. Raises Damaged."""
        ...

    def read_again(self, offset: int, size: int) -> bytes:
        """The same, past every copy that was kept: what was read before is not what was written."""
        ...


class Storage(Protocol):
    """The files of one dataset; safe to use from several threads."""

    @property
    def name(self) -> str:
        """The dataset's name."""
        ...

    def manifest(self) -> bytes:
        """The content of its manifest. Raises FileNotFoundError."""
        ...

    def whole(self, stored: StoredFile) -> bytes:
        """The content of a small file. Raises Damaged."""
        ...

    def parts(self, stored: StoredFile) -> PartlyRead:
        """A file of records, open until nobody holds it. Raises Damaged."""
        ...

    def check_there(self) -> None:
        """Raises NotFound when the whole dataset is gone."""
        ...


class LocalFile:
    def __init__(self, path: Path) -> None:
        self._descriptor = -1
        self._path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise _cannot_read(path, error) from None

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def read(self, offset: int, size: int) -> bytes:
        try:
            return os.pread(self._descriptor, size, offset)
        except OSError as error:
            raise _cannot_read(self._path, error) from None

    read_again = read


class LocalStorage:
    """The files of a folder, which has the dataset's name."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def name(self) -> str:
        return self._folder.name

    def manifest(self) -> bytes:
        return (self._folder / manifest.NAME).read_bytes()

    def whole(self, stored: StoredFile) -> bytes:
        path = self._folder / stored.name
        try:
            return path.read_bytes()
        except OSError as error:
            raise _cannot_read(path, error) from None

    def parts(self, stored: StoredFile) -> LocalFile:
        return LocalFile(self._folder / stored.name)

    def check_there(self) -> None:
        if not (self._folder / manifest.NAME).exists():
            raise NotFound(f"the dataset {self.name!r} was deleted", field="dataset")


def _cannot_read(path: Path, error: OSError) -> Damaged:
    missing = isinstance(error, FileNotFoundError)
    return Damaged(path.name, "is missing" if missing else f"cannot be read: {error.strerror}")
