"""A shard: three files that hold some neighbouring components of one group.

    NAME.records   one zlib stream per component, one after another, each the bytes of its
                   ComponentRecord
    NAME.index     where each begins, and its checksum (below)
    NAME.search    its statistics and peak tokens (`search_file`)

The index, little-endian:

    8 bytes    "TDBINDEX"
    u32        format version, 1
    u32        count of records
    32 bytes   SHA-256 of NAME.records
    u64[count + 1]   offsets into NAME.records; the last is its length
    u32[count]       CRC-32 of each record's compressed bytes
    u32              CRC-32 of everything before it

A record is read by its place in the shard with one positional read.
"""

import hashlib
import os
import struct
import sys
import zlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tdb.dataset.v1 import record_pb2

from services.common.errors import InvalidArgument
from services.dataset import files, records, search_file
from services.dataset.damage import Damaged
from services.dataset.groups import Group

FORMAT_VERSION = 1
MAX_RECORDS = 2**16
RECORDS, INDEX, SEARCH = ".records", ".index", ".search"

_MAGIC = b"TDBINDEX"
_HEAD = struct.Struct("<8sII32s")
_CRC = struct.Struct("<I")
_LEVEL = 6

if sys.byteorder != "little" or array("Q").itemsize != 8 or array("I").itemsize != 4:
    raise ImportError("shards are read and written on little-endian machines only")


def name(group: Group, part: int) -> str:
    return f"{group}.{part:05d}"


@dataclass(frozen=True)
class Written:
    """A finished shard: which components it holds, as runs of (first, last) index."""

    runs: tuple[tuple[int, int], ...]
    has_token_ids: bool | None
    """None: no record of it has an example."""


def write(
    folder: Path, group: Group, part: int, items: Iterable[record_pb2.ComponentRecord]
) -> Written:
    """Writes the three files of a shard, each of them whole or not at all.

    Raises InvalidArgument for a record that is not whole, not of this group or out of order.
    """
    base = folder / name(group, part)
    offsets, checksums = array("Q", [0]), array("I")
    digest = hashlib.sha256()
    runs: list[tuple[int, int]] = []
    search = search_file.Builder()
    with files.atomic(base.with_name(base.name + RECORDS)) as file:
        for record in items:
            index = _next_index(record, group, runs[-1][1] if runs else -1)
            if runs and index == runs[-1][1] + 1:
                runs[-1] = (runs[-1][0], index)
            else:
                runs.append((index, index))
            if len(checksums) == MAX_RECORDS:
                raise InvalidArgument(f"a shard holds at most {MAX_RECORDS} records")
            packed = zlib.compress(record.SerializeToString(deterministic=True), _LEVEL)
            file.write(packed)
            digest.update(packed)
            offsets.append(offsets[-1] + len(packed))
            checksums.append(zlib.crc32(packed))
            search.add(record)
    if not runs:
        raise InvalidArgument(f"the shard {base.name} would be empty")
    with files.atomic(base.with_name(base.name + SEARCH)) as file:
        file.write(search.content())
    head = _HEAD.pack(_MAGIC, FORMAT_VERSION, len(checksums), digest.digest())
    content = head + offsets.tobytes() + checksums.tobytes()
    with files.atomic(base.with_name(base.name + INDEX)) as file:
        file.write(content + _CRC.pack(zlib.crc32(content)))
    return Written(tuple(runs), search.has_token_ids)


def _next_index(record: record_pb2.ComponentRecord, group: Group, last: int) -> int:
    found, index = records.check(record)
    if found != group:
        raise InvalidArgument(f"{record.component} does not belong to {group}")
    if index <= last:
        raise InvalidArgument(f"{record.component} comes after {group.component(last)}")
    return index


class Shard:
    """A shard open for reading; safe to use from several threads. Closed when nobody holds it."""

    def __init__(self, path: Path, descriptor: int, count: int, content: bytes) -> None:
        self.path = path
        self.count = count
        self._descriptor = descriptor
        tables = memoryview(content)[_HEAD.size : -_CRC.size]
        self.records_hash = _HEAD.unpack_from(content)[3].hex()
        self._offsets = tables[: 8 * (count + 1)].cast("Q")
        self._checksums = tables[8 * (count + 1) :].cast("I")

    @classmethod
    def open(cls, folder: Path, shard: str) -> Self:
        """Raises Damaged when the index or the records cannot be read as a whole."""
        index = folder / (shard + INDEX)
        content = _read_file(index)
        count = _check_index(index, content)
        path = folder / (shard + RECORDS)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise Damaged(path, f"cannot be opened: {error.strerror}") from None
        return cls(path, descriptor, count, content)

    def __del__(self) -> None:
        os.close(self._descriptor)

    def record_size(self, row: int) -> int:
        """Compressed bytes of a record."""
        return self._offsets[row + 1] - self._offsets[row]

    @property
    def size(self) -> int:
        """Bytes that the records file should hold."""
        return self._offsets[self.count]

    def read(self, row: int, component: str) -> bytes:
        """The record at `row`, which must be `component`'s. Raises Damaged."""
        packed = os.pread(self._descriptor, self.record_size(row), self._offsets[row])
        return self._unpack(packed, row, component)

    def read_rows(
        self, start: int, stop: int, components: Iterable[str]
    ) -> Iterator[bytes | Damaged]:
        """Neighbouring records, with one read; damage in their place."""
        begin = self._offsets[start]
        data = os.pread(self._descriptor, self._offsets[stop] - begin, begin)
        for row, component in zip(range(start, stop), components, strict=True):
            packed = data[self._offsets[row] - begin : self._offsets[row + 1] - begin]
            try:
                yield self._unpack(packed, row, component)
            except Damaged as damaged:
                yield damaged

    def _unpack(self, packed: bytes, row: int, component: str) -> bytes:
        if len(packed) != self.record_size(row):
            raise Damaged(self.path, "is shorter than its index says", component)
        if zlib.crc32(packed) != self._checksums[row]:
            raise Damaged(self.path, "does not match its checksum", component)
        try:
            unpacking = zlib.decompressobj()
            data = unpacking.decompress(packed, records.MAX_RECORD_BYTES)
        except zlib.error:
            raise Damaged(self.path, "is no compressed record", component) from None
        # The component is the message's first field, so it stands at the front.
        name = component.encode()
        if not unpacking.eof or not data.startswith(b"\n" + bytes([len(name)]) + name):
            raise Damaged(self.path, "holds another record than its index says", component)
        return data


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise Damaged(path, "is missing") from None
    except OSError as error:
        raise Damaged(path, f"cannot be read: {error.strerror}") from None


def _check_index(path: Path, content: bytes) -> int:
    """The count of records. Raises Damaged."""
    if len(content) < _HEAD.size + _CRC.size or not content.startswith(_MAGIC):
        raise Damaged(path, "is no index")
    _, version, count, _ = _HEAD.unpack_from(content)
    if version != FORMAT_VERSION:
        raise Damaged(path, f"has format version {version}, this version reads {FORMAT_VERSION}")
    whole = len(content) == _HEAD.size + 8 * (count + 1) + 4 * count + _CRC.size
    body, stated = content[: -_CRC.size], content[-_CRC.size :]
    if not whole or zlib.crc32(body) != _CRC.unpack(stated)[0]:
        raise Damaged(path, "does not match its checksum")
    return int(count)
