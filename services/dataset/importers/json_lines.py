"""Files of one JSON object a line, gzipped or not. What is cut off or is no JSON is refused with
its line; nothing of a file is taken for whole that is not."""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from services.common.errors import InvalidArgument
from services.dataset.importers import json_text

MAX_LINE_BYTES = 64 * 2**20


def read(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Lines, counted from 1, and their objects. Raises InvalidArgument, OSError."""
    number = 0
    with _open(path) as file:
        while True:
            number += 1
            try:
                line = file.readline(MAX_LINE_BYTES + 1)
            except (EOFError, zlib.error, gzip.BadGzipFile):
                raise InvalidArgument(
                    f"line {number}: this is no whole gzip file: it is cut off or damaged"
                ) from None
            if not line:
                return
            if len(line) > MAX_LINE_BYTES:
                raise InvalidArgument(f"line {number} has more than {MAX_LINE_BYTES} bytes")
            if not line.strip():
                continue
            try:
                value = json_text.loads(line)
            except InvalidArgument:
                raise InvalidArgument(f"line {number} is no JSON") from None
            if not isinstance(value, dict):
                raise InvalidArgument(f"line {number} is no JSON object")
            yield number, value


def _open(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    return path.open("rb")
