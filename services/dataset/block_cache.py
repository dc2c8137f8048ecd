"""A bounded folder of pieces of remote files, the least recently used given up first.

Pieces are named for the content they belong to, so nothing in here can be out of date. Each carries
a checksum: one that was damaged on this disk is a miss. A cache that cannot write costs speed only.
"""

import re
import zlib
from collections import OrderedDict
from pathlib import Path
from threading import Lock

from services.dataset.files import PARTIAL

_NAME = re.compile(r"[0-9a-f]{64}-[0-9a-z]+")
_CRC_BYTES = 4


class BlockCache:
    """Safe to use from several threads, by one process."""

    def __init__(self, folder: Path, most_bytes: int) -> None:
        """Takes over what an earlier process left in `folder`."""
        self._folder = folder
        self._most_bytes = most_bytes
        self._lock = Lock()
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._bytes = 0
        left = [(path.stat(), path) for path in folder.glob("*") if path.is_file()]
        for stat, path in sorted(left, key=lambda each: each[0].st_mtime_ns):
            if _NAME.fullmatch(path.name):
                self._sizes[path.name] = stat.st_size
                self._bytes += stat.st_size
            else:
                path.unlink(missing_ok=True)
        self._shrink()

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return self._bytes

    def get(self, name: str) -> bytes | None:
        """A piece, or None."""
        with self._lock:
            if name not in self._sizes:
                return None
            self._sizes.move_to_end(name)
        try:
            content = (self._folder / name).read_bytes()
        except OSError:
            content = b""
        data, checksum = content[:-_CRC_BYTES], content[-_CRC_BYTES:]
        if zlib.crc32(data).to_bytes(_CRC_BYTES, "little") != checksum:
            self.forget(name)
            return None
        return data

    def put(self, name: str, data: bytes) -> None:
        size = len(data) + _CRC_BYTES
        if size > self._most_bytes:
            return
        path = self._folder / name
        partial = path.with_name(f"{name}{PARTIAL}")
        with self._lock:
            try:
                partial.write_bytes(data + zlib.crc32(data).to_bytes(_CRC_BYTES, "little"))
                partial.replace(path)
            except OSError:
                partial.unlink(missing_ok=True)
                return
            self._bytes += size - self._sizes.pop(name, 0)
            self._sizes[name] = size
            self._shrink()

    def forget(self, name: str) -> None:
        with self._lock:
            self._bytes -= self._sizes.pop(name, 0)
            (self._folder / name).unlink(missing_ok=True)

    def _shrink(self) -> None:
        while self._bytes > self._most_bytes:
            name, size = self._sizes.popitem(last=False)
            self._bytes -= size
            (self._folder / name).unlink(missing_ok=True)
