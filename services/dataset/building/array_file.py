"""Arrays and what is to be known of them, in one file that is whole or not there.

    8 bytes    "TDBARRAY"
    u32        length of the head
    head       JSON: {"about": ..., "arrays": [[name, data type, shape], ...]}
    arrays     their bytes one after another, little-endian, row-major
    32 bytes   SHA-256 of everything before it

What a killed build left is read again by the next, so nothing of it is believed unchecked.
"""

import hashlib
import json
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.dataset import files
from services.dataset.damage import Damaged

Array = NDArray[Any]

_MAGIC = b"TDBARRAY"
_LENGTH = struct.Struct("<I")
_HASH_BYTES = 32


def write(path: Path, about: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
    """Raises FailedPrecondition where it cannot be written."""
    listed = [[name, _little(array).dtype.str, array.shape] for name, array in arrays.items()]
    head = json.dumps({"about": about, "arrays": listed}).encode()
    digest = hashlib.sha256()
    with files.atomic(path) as file:
        for part in (_MAGIC, _LENGTH.pack(len(head)), head, *_bytes(arrays)):
            digest.update(part)
            file.write(part)
        file.write(digest.digest())


def read(path: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    """What was written, the arrays mapped from the file rather than read. Raises Damaged."""
    try:
        mapped: Array = np.memmap(path, np.uint8, "r")
    except (OSError, ValueError):  # absent, or empty
        raise Damaged(path.name, "cannot be read") from None
    content, stated = mapped[:-_HASH_BYTES], mapped[-_HASH_BYTES:].tobytes()
    if hashlib.sha256(content.data).digest() != stated:
        raise Damaged(path.name, "does not match its checksum")
    start = len(_MAGIC) + _LENGTH.size
    (length,) = _LENGTH.unpack(content[len(_MAGIC) : start].tobytes())
    head = json.loads(content[start : start + length].tobytes())
    arrays: dict[str, Array] = {}
    start += length
    for name, kind, shape in head["arrays"]:
        dtype = np.dtype(kind)
        size = math.prod(shape) * dtype.itemsize
        # Not aligned in the file, which numpy minds nowhere that these go.
        arrays[name] = np.frombuffer(content[start : start + size], dtype).reshape(shape)
        start += size
    return head["about"], arrays


def _bytes(arrays: Mapping[str, Array]) -> Iterator["memoryview[int] | bytes"]:
    for array in arrays.values():
        whole = np.ascontiguousarray(_little(array))
        if whole.size:
            yield whole.reshape(-1).view(np.uint8).data


def _little(array: Array) -> Array:
    return array.astype(array.dtype.newbyteorder("<"), copy=False)
