"""NAME.search: what components of a shard are found by, without reading their records.

8 bytes    "TDBFINDS"
u32        format version, 1
u32        count of records
u32        count of peaks
u32        length of the texts in bytes; 0 where peaks are token ids
f64[6][count]   statistics, in the order of COLUMNS; NaN where a record has none
u32[count + 1]  where each record's peaks begin
u32[peaks]      tokens at which its top examples peak, ascending, each once: ids, or places in the
                list of texts
texts           a JSON list of text, UTF-8
u32             CRC-32 of everything before it
"""

import json
import math
import struct
import zlib
from array import array
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tdb.dataset.v1 import record_pb2

from services.common.errors import InvalidArgument
from services.dataset import records
from services.dataset.damage import Damaged

FORMAT_VERSION = 1
COLUMNS = ("max", "mean", "variance", "skewness", "kurtosis", "fraction_active")
"""Fields of Statistics."""

_MAGIC = b"TDBFINDS"
_HEAD = struct.Struct("<8sIIII")
_CRC = struct.Struct("<I")


class Builder:
    """Collects the file while a shard is written."""

    def __init__(self) -> None:
        self.has_token_ids: bool | None = None
        self._columns = tuple(array("d") for _ in COLUMNS)
        self._starts = array("I", [0])
        self._peaks = array("I")
        self._texts: dict[str, int] = {}

    def add(self, record: record_pb2.ComponentRecord) -> None:
        """Raises InvalidArgument where some examples have ids and others only text."""
        for example in records.examples(record):
            has_ids = bool(example.token_ids)
            if self.has_token_ids is None:
                self.has_token_ids = has_ids
            elif self.has_token_ids != has_ids:
                raise InvalidArgument(
                    f"{record.component}: some examples have token ids and others only text"
                )
        for name, column in zip(COLUMNS, self._columns, strict=True):
            known = record.statistics.HasField(name)  # type: ignore[arg-type]
            column.append(getattr(record.statistics, name) if known else math.nan)
        peaks = {token for example in record.top for token in self._peak_tokens(example)}
        self._peaks.extend(sorted(peaks))
        self._starts.append(len(self._peaks))

    def content(self) -> bytes:
        texts = json.dumps(list(self._texts), ensure_ascii=False).encode() if self._texts else b""
        head = _HEAD.pack(
            _MAGIC, FORMAT_VERSION, len(self._starts) - 1, len(self._peaks), len(texts)
        )
        columns = b"".join(column.tobytes() for column in self._columns)
        content = head + columns + self._starts.tobytes() + self._peaks.tobytes() + texts
        return content + _CRC.pack(zlib.crc32(content))

    def _peak_tokens(self, example: record_pb2.Example) -> list[int]:
        positions = records.peak_positions(example)
        if example.token_ids:
            return [example.token_ids[position] for position in positions]
        texts = [example.token_texts[position] for position in positions]
        return [self._texts.setdefault(text, len(self._texts)) for text in texts]


@dataclass(frozen=True)
class SearchFile:
    """Parsed as a whole: about 130 bytes per record."""

    columns: dict[str, NDArray[np.float64]]
    """[count] for each of COLUMNS."""
    starts: NDArray[np.uint32]
    peaks: NDArray[np.uint32]
    texts: tuple[str, ...] | None

    @classmethod
    def parse(cls, name: str, content: bytes, count: int) -> "SearchFile":
        """`name` is the file's, `count` that of the shard's records. Raises Damaged."""
        if len(content) < _HEAD.size + _CRC.size or not content.startswith(_MAGIC):
            raise Damaged(name, "is no search file")
        _, version, records_in, peaks, text_bytes = _HEAD.unpack_from(content)
        if version != FORMAT_VERSION:
            raise Damaged(name, f"has format version {version}, not {FORMAT_VERSION}")
        sizes = (8 * count * len(COLUMNS), 4 * (count + 1), 4 * peaks, text_bytes)
        whole = records_in == count and len(content) == _HEAD.size + sum(sizes) + _CRC.size
        checksum = _CRC.unpack_from(content, len(content) - _CRC.size)[0]
        if not whole or zlib.crc32(memoryview(content)[: -_CRC.size]) != checksum:
            raise Damaged(name, "does not match its checksum")
        places = np.cumsum((_HEAD.size, *sizes))
        table = np.frombuffer(content, "<f8", count * len(COLUMNS), int(places[0]))
        texts = json.loads(content[places[3] : places[4]]) if text_bytes else None
        return cls(
            columns=dict(zip(COLUMNS, table.reshape(len(COLUMNS), count), strict=True)),
            starts=np.frombuffer(content, "<u4", count + 1, int(places[1])),
            peaks=np.frombuffer(content, "<u4", peaks, int(places[2])),
            texts=None if texts is None else tuple(texts),
        )

    def peak_at(self, tokens: NDArray[np.uint32]) -> NDArray[np.bool_]:
        """[count]: whether a record's top examples peak at one of these tokens."""
        found = np.zeros(len(self.starts) - 1, dtype=np.bool_)
        places = np.flatnonzero(np.isin(self.peaks, tokens))
        found[np.searchsorted(self.starts, places, side="right") - 1] = True
        return found
