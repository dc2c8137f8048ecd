"""vocabulary: the text of each token id, kept once for a dataset rather than in its records.

    8 bytes    "TDBVOCAB"
    u32        format version, 1
    u32        count of tokens
    u32[count + 1]   where each text begins in the texts; the last is their length
    texts      UTF-8
    u32        CRC-32 of everything before it

Texts are decoded when first asked for, so that a dataset is open within a millisecond.
"""

import struct
import zlib
from array import array
from collections.abc import Iterable, Sequence

from services.common.errors import InvalidArgument
from services.dataset import manifest
from services.dataset.damage import Damaged

FORMAT_VERSION = 1
MAX_BYTES = 64 * 2**20

_MAGIC = b"TDBVOCAB"
_HEAD = struct.Struct("<8sII")
_CRC = struct.Struct("<I")


def encode(texts: Sequence[str]) -> bytes:
    """The file's content. Raises InvalidArgument when it would be larger than MAX_BYTES."""
    encoded = [text.encode() for text in texts]
    offsets = array("I", [0])
    for each in encoded:
        offsets.append(offsets[-1] + len(each))
    head = _HEAD.pack(_MAGIC, FORMAT_VERSION, len(texts))
    content = head + offsets.tobytes() + b"".join(encoded)
    if len(content) > MAX_BYTES:
        raise InvalidArgument(f"a vocabulary has at most {MAX_BYTES} bytes, not {len(content)}")
    return content + _CRC.pack(zlib.crc32(content))


class Vocabulary:
    """Safe to use from several threads."""

    def __init__(self, content: bytes) -> None:
        """Raises Damaged."""
        if len(content) < _HEAD.size + _CRC.size or not content.startswith(_MAGIC):
            raise Damaged(manifest.VOCABULARY, "is no vocabulary")
        _, version, count = _HEAD.unpack_from(content)
        if version != FORMAT_VERSION:
            raise Damaged(
                manifest.VOCABULARY, f"has format version {version}, not {FORMAT_VERSION}"
            )
        begin = _HEAD.size + 4 * (count + 1)
        checked = memoryview(content)[: -_CRC.size]
        if len(checked) < begin or zlib.crc32(checked) != _CRC.unpack(content[-_CRC.size :])[0]:
            raise Damaged(manifest.VOCABULARY, "does not match its checksum")
        self._offsets = checked[_HEAD.size : begin].cast("I")
        self._encoded = checked[begin:]
        self._texts: list[str | None] = [None] * count
        self._ids: dict[str, list[int]] | None = None

    def __len__(self) -> int:
        return len(self._texts)

    def texts(self, ids: Iterable[int]) -> list[str]:
        """The text of each id; `<17>` for one that the vocabulary does not have."""
        known = self._texts
        try:
            return [known[id] or self._decode(id) for id in ids]
        except IndexError:
            size = len(known)
            return [self._decode(id) if id < size else f"<{id}>" for id in ids]

    def ids(self, text: str) -> list[int]:
        """The ids that read exactly so."""
        if self._ids is None:
            found: dict[str, list[int]] = {}
            for id, each in enumerate(self.texts(range(len(self)))):
                found.setdefault(each, []).append(id)
            self._ids = found
        return self._ids.get(text, [])

    def _decode(self, id: int) -> str:
        text = str(self._encoded[self._offsets[id] : self._offsets[id + 1]], "utf-8")
        self._texts[id] = text
        return text
