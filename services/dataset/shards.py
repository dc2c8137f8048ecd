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
import struct
import sys
import zlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tdb.dataset.v1 import record_pb2

from services.common.errors import InvalidArgument
from services.dataset import files, manifest, records, search_file, wire
from services.dataset.damage import Damaged
from services.dataset.groups import Group
from services.dataset.storage import PartlyRead

FORMAT_VERSION = 1
MAX_RECORDS = 2**16
RECORDS, INDEX, SEARCH = manifest.SUFFIXES

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
    """A shard open for reading; safe to use from several threads."""

    def __init__(self, name: str, index: bytes, file: PartlyRead) -> None:
        """`index` is the content of NAME.index. Raises Damaged where it is none."""
        self._name = name + RECORDS
        self._file = file
        self.count = _check_index(name + INDEX, index)
        self.records_hash = _HEAD.unpack_from(index)[3].hex()
        tables = memoryview(index)[_HEAD.size : -_CRC.size]
        self._offsets = tables[: 8 * (self.count + 1)].cast("Q")
        self._checksums = tables[8 * (self.count + 1) :].cast("I")

    def record_size(self, row: int) -> int:
        """Compressed bytes of a record."""
        return self._offsets[row + 1] - self._offsets[row]

    @property
    def size(self) -> int:
        """Bytes that the records file should hold."""
        return self._offsets[self.count]

    def read(self, row: int, component: str) -> bytes:
        """The record at `row`, which must be `component`'s. Raises Damaged."""
        packed = self._file.read(self._offsets[row], self.record_size(row))
        return self._unpack(packed, row, component)

    def read_rows(
        self, start: int, stop: int, components: Iterable[str]
    ) -> Iterator[bytes | Damaged]:
        """Neighbouring records, with one read; damage in their place. Raises Damaged where the
        file cannot be read at all."""
        begin = self._offsets[start]
        data = self._file.read(begin, self._offsets[stop] - begin)
        for row, component in zip(range(start, stop), components, strict=True):
            packed = data[self._offsets[row] - begin : self._offsets[row + 1] - begin]
            try:
                yield self._unpack(packed, row, component)
            except Damaged as damaged:
                yield damaged.of(component)

    def _unpack(self, packed: bytes, row: int, component: str) -> bytes:
        if not self._is_right(packed, row):
            packed = self._file.read_again(self._offsets[row], self.record_size(row))
        if len(packed) != self.record_size(row):
            raise Damaged(self._name, "is shorter than its index says", component)
        if not self._is_right(packed, row):
            raise Damaged(self._name, "does not match its checksum", component)
        try:
            unpacking = zlib.decompressobj()
            data = unpacking.decompress(packed, records.MAX_RECORD_BYTES)
        except zlib.error:
            raise Damaged(self._name, "is no compressed record", component) from None
        # The component is the message's first field, so it stands at the front.
        if not unpacking.eof or not data.startswith(wire.field(1, component.encode())):
            raise Damaged(self._name, "holds another record than its index says", component)
        return data

    def _is_right(self, packed: bytes, row: int) -> bool:
        return len(packed) == self.record_size(row) and zlib.crc32(packed) == self._checksums[row]


def _check_index(name: str, content: bytes) -> int:
    """The count of records. Raises Damaged."""
    if len(content) < _HEAD.size + _CRC.size or not content.startswith(_MAGIC):
        raise Damaged(name, "is no index")
    _, version, count, _ = _HEAD.unpack_from(content)
    if version != FORMAT_VERSION:
        raise Damaged(name, f"has format version {version}, this version reads {FORMAT_VERSION}")
    whole = len(content) == _HEAD.size + 8 * (count + 1) + 4 * count + _CRC.size
    body, stated = content[: -_CRC.size], content[-_CRC.size :]
    if not whole or zlib.crc32(body) != _CRC.unpack(stated)[0]:
        raise Damaged(name, "does not match its checksum")
    return int(count)
