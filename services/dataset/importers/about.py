"""Refusals of what a file holds name the file."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from services.common.errors import FailedPrecondition, InvalidArgument, TdbError


class FileRefused(InvalidArgument):
    """Names its file already."""


@contextmanager
def about(path: Path) -> Iterator[None]:
    try:
        yield
    except FileRefused:
        raise
    except TdbError as error:
        where = f"{path}, {error.field}" if error.field else str(path)
        raise FileRefused(f"{where}: {error.message}") from None
    except OSError as error:
        raise FailedPrecondition(f"{path} cannot be read: {error.strerror}") from None
