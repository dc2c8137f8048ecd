"""Where a stream or a search goes on: opaque text that fits one question and one dataset's state.

It holds the place reached and the hashes of what was asked and of the dataset's manifest, so that a
cursor in the wrong hands is refused rather than read as a place in something else.
"""

import base64
import binascii
import hashlib
import struct
import zlib

from services.common.errors import FailedPrecondition, InvalidArgument

_LAYOUT = struct.Struct("<B8s8sQ")
_VERSION = 1


def question_hash(*parts: bytes) -> bytes:
    """A hash of what is asked."""
    return hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).digest()


def write(question: bytes, manifest_hash: str, place: int) -> str:
    """A cursor; `question` is a `question_hash`."""
    state = bytes.fromhex(manifest_hash)
    data = _LAYOUT.pack(_VERSION, question[:8], state[:8], place)
    checked = data + zlib.crc32(data).to_bytes(4, "little")
    return base64.urlsafe_b64encode(checked).decode().rstrip("=")


def read(cursor: str, question: bytes, manifest_hash: str, total: int) -> int:
    """The place reached, at most `total`.

    Raises InvalidArgument; FailedPrecondition when the dataset has changed since.
    """
    try:
        checked = base64.b64decode(cursor + "=" * (-len(cursor) % 4), b"-_", validate=True)
    except (ValueError, binascii.Error):
        checked = b""
    data, checksum = checked[:-4], checked[-4:]
    if len(data) != _LAYOUT.size or zlib.crc32(data).to_bytes(4, "little") != checksum:
        raise InvalidArgument("this is no cursor that this service gave", field="cursor")
    version, asked, state, place = _LAYOUT.unpack(data)
    if version != _VERSION or asked != question[:8] or place > total:
        raise InvalidArgument(
            "the cursor belongs to a call that asked for something else", field="cursor"
        )
    if state != bytes.fromhex(manifest_hash)[:8]:
        raise FailedPrecondition(
            "the dataset has changed since this cursor was given: start again without it",
            field="cursor",
            reason="DATASET_CHANGED",
        )
    return int(place)
