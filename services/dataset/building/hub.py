"""A dataset of the Hugging Face Hub, its files read one after another as they come.

Text, JSON Lines, Parquet and Arrow files are read, nothing of the dataset's own code is run. Text
comes as a stream; a Parquet file is fetched in the parts that hold the wanted column.
"""

import os
from collections.abc import Generator
from functools import cached_property
from typing import Any

from tdb.dataset.v1 import build_pb2

from services.common.errors import FailedPrecondition, InvalidArgument, NotFound, Unavailable
from services.dataset.building.corpora import (
    SUFFIXES,
    TABLES,
    TEXT_FIELD,
    Document,
    numbered,
    read,
    table_texts,
)


class HubCorpus:
    def __init__(self, request: build_pb2.HubCorpus) -> None:
        """Raises InvalidArgument."""
        if not request.id:
            raise InvalidArgument("the id of a dataset is required", field="id", reason="REQUIRED")
        self._id, self._revision = request.id, request.revision or None
        self._folder = request.folder.strip("/")
        self._field = request.field or TEXT_FIELD

    @property
    def name(self) -> str:
        return f"{self._id}/{self._folder}" if self._folder else self._id

    def identity(self) -> str:
        return self._found[0]

    def documents(self) -> Generator[Document, None, None]:
        hub = _hub()
        revision, names = self._found
        system = hub.HfFileSystem()
        for name in names:
            path = f"datasets/{self._id}@{revision}/{name}"
            try:
                with system.open(path, "rb") as file:
                    if name.endswith(TABLES):
                        yield from numbered(name, table_texts(file, self._field, name), 0)
                    else:
                        yield from read(name, file, self._field)
            except OSError as error:
                raise Unavailable(f"{path} cannot be read now: {error}") from None

    @cached_property
    def _found(self) -> tuple[str, list[str]]:
        """The revision's hash, and the files."""
        hub = _hub()
        try:
            info = hub.HfApi().dataset_info(self._id, revision=self._revision, timeout=10)
        except hub.errors.HFValidationError:
            raise InvalidArgument(f"{self._id!r} is no id of a dataset", field="id") from None
        except (hub.errors.RepositoryNotFoundError, hub.errors.RevisionNotFoundError):
            raise NotFound(
                f"the Hub has no dataset {self._id!r} that this service may read"
                + (f" at {self._revision!r}" if self._revision else "")
                + "; HF_TOKEN is what it would show",
                field="corpus.hub.id",
            ) from None
        except Exception as error:  # whatever a connection may end with
            if os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"):
                raise FailedPrecondition("HF_HUB_OFFLINE is set: the Hub is not asked") from None
            raise FailedPrecondition(
                f"the Hub cannot be asked for {self._id!r}: {type(error).__name__}"
            ) from None
        below = f"{self._folder}/" if self._folder else ""
        names = sorted(each.rfilename for each in info.siblings or ())
        known = [each for each in names if each.endswith(SUFFIXES) and each.startswith(below)]
        if not known:
            raise FailedPrecondition(
                f"{self.name} has no file that ends in {', '.join(SUFFIXES)}: datasets that are "
                "made by code of their own are not read",
                field="corpus.hub.id",
            )
        return str(info.sha), known


def _hub() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError:
        raise FailedPrecondition(
            "reading from the Hub needs huggingface_hub, which is not installed: pip install "
            "'transformer-debugger[hub]'",
            reason="NOT_INSTALLED",
        ) from None
    return huggingface_hub
