"""A dataset behind a URL, read through the local cache.

Small files are fetched once and checked against the manifest. Of records, blocks of BLOCK_BYTES are
kept; what is missing of a read is fetched with one request.
"""

import hashlib

from services.common.errors import NotFound
from services.dataset import manifest
from services.dataset.block_cache import BlockCache
from services.dataset.damage import Damaged
from services.dataset.http_files import Missing
from services.dataset.manifest import StoredFile
from services.dataset.remote_files import RemoteFiles

BLOCK_BYTES = 64 * 1024
MAX_MANIFEST_BYTES = 64 * 2**20


class RemoteStorage:
    """Raises Unavailable and FailedPrecondition where the other side does not answer as it should,
    besides what Storage says."""

    def __init__(self, name: str, files: RemoteFiles, cache: BlockCache) -> None:
        self._name = name
        self._files = files
        self._cache = cache

    @property
    def name(self) -> str:
        return self._name

    def manifest(self) -> bytes:
        try:
            return self._files.get(manifest.NAME, MAX_MANIFEST_BYTES)
        except Missing as missing:
            raise NotFound(f"the dataset {self._name!r} is not there: no {missing}") from None

    def whole(self, stored: StoredFile) -> bytes:
        key = f"{stored.sha256}-whole"
        content = self._cache.get(key)
        if content is None:
            try:
                content = self._files.get(stored.name, stored.bytes)
            except Missing:
                raise Damaged(stored.name, "is missing") from None
            if hashlib.sha256(content).hexdigest() != stored.sha256:
                raise Damaged(stored.name, "does not match the manifest's checksum")
            self._cache.put(key, content)
        return content

    def parts(self, stored: StoredFile) -> "RemoteFile":
        return RemoteFile(stored, self._files, self._cache)

    def close(self) -> None:
        self._files.close()

    def check_there(self) -> None:
        """A remote dataset is there for as long as it is configured."""


class RemoteFile:
    def __init__(self, stored: StoredFile, files: RemoteFiles, cache: BlockCache) -> None:
        self._stored = stored
        self._files = files
        self._cache = cache

    def read(self, offset: int, size: int) -> bytes:
        first, last = offset // BLOCK_BYTES, (offset + max(size, 1) - 1) // BLOCK_BYTES
        blocks = {number: self._cache.get(self._key(number)) for number in range(first, last + 1)}
        missing = [number for number, block in blocks.items() if block is None]
        if missing:
            blocks |= self._fetch(missing[0], missing[-1] + 1)
        content = b"".join(block for block in blocks.values() if block is not None)
        begin = offset - first * BLOCK_BYTES
        return content[begin : begin + size]

    def read_again(self, offset: int, size: int) -> bytes:
        for number in range(offset // BLOCK_BYTES, (offset + size) // BLOCK_BYTES + 1):
            self._cache.forget(self._key(number))
        return self.read(offset, size)

    def _fetch(self, first: int, stop: int) -> dict[int, bytes]:
        """Blocks from the other side, with one request."""
        begin = first * BLOCK_BYTES
        end = min(stop * BLOCK_BYTES, self._stored.bytes)
        try:
            content = self._files.get_part(self._stored.name, begin, end - begin)
        except Missing:
            raise Damaged(self._stored.name, "is missing") from None
        blocks = {}
        for number in range(first, stop):
            at = (number - first) * BLOCK_BYTES
            blocks[number] = content[at : at + BLOCK_BYTES]
            if len(content) == end - begin:
                self._cache.put(self._key(number), blocks[number])
        return blocks

    def _key(self, number: int) -> str:
        return f"{self._stored.sha256}-{number}"
