"""Imports that callers ask for: from the places that the operator has allowed, and no others.

A caller names a place and a folder in it, never a URL or a path of the machine. One import works at
a time. Of an export behind a URL the files are fetched first, into the data folder, each whole or
not at all; they go once the dataset is there.
"""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from tdb.dataset.v1 import import_pb2

from services.common.addresses import Kind
from services.common.errors import (
    Cancelled,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    inside,
)
from services.common.settings import Settings
from services.dataset import files, remote_files
from services.dataset.groups import Group
from services.dataset.http_files import Missing
from services.dataset.importers import importing
from services.dataset.library import BUILDING, Library, check_name

OURS = "imports"
"""The folder in the data folder that is always allowed."""
FETCHED = "fetched"
MAX_FETCHED_BYTES = 256 * 2**20
ROOM_BYTES = 1 << 30

Say = Callable[[import_pb2.ImportProgress], None]


class Imports:
    """Safe to use from several threads."""

    def __init__(self, settings: Settings, library: Library, folder: Path) -> None:
        """`folder` is where the datasets are."""
        self._folder = folder
        self._data = settings.data_dir
        self._most_bytes = settings.datasets_bytes
        self._places = {each.name: each.location for each in settings.import_sources}
        self._library = library
        self._at_work = threading.Lock()

    def run(
        self, request: import_pb2.ImportDatasetRequest, say: Say, stop: threading.Event
    ) -> None:
        """Imports, until `stop`. Raises TdbError."""
        with inside("dataset"):
            name = check_name(request.dataset)
            target = self._folder / name
            if self._library.is_remote(name) or (target / BUILDING).exists():
                raise FailedPrecondition(
                    f"there is a dataset {name!r} already: delete it or choose another name"
                )
        _check_format(request)
        location = self._location(request.place)
        with inside("path"):
            path = _relative(request.path)
        if not self._at_work.acquire(blocking=False):
            raise ResourceExhausted("another import is under way", retry_after_s=10.0)
        try:
            if isinstance(location, Path):
                _import(request, _within(location, path), target, say, stop, self._most_bytes)
            else:
                fetched = self._data / OURS / f".{FETCHED}" / name
                url = "/".join((location.rstrip("/"), *path.parts))
                _fetch(url, request, fetched, say, stop)
                _import(request, fetched, target, say, stop, self._most_bytes)
                shutil.rmtree(fetched, ignore_errors=True)
        finally:
            self._at_work.release()

    def _location(self, place: str) -> Path | str:
        if not place:
            return self._data / OURS
        if place not in self._places:
            there = ", ".join(sorted(self._places)) or "none"
            raise InvalidArgument(
                f"{place[:100]!r} is not a place that TDB_IMPORT_SOURCES allows; there are: "
                f"{there}, and the empty name for `{OURS}` in the data folder",
                field="place",
            )
        return self._places[place]


def _check_format(request: import_pb2.ImportDatasetRequest) -> None:
    match request.WhichOneof("format"):
        case None:
            raise InvalidArgument(
                "say how the files are laid out: openai or neuronpedia",
                field="format",
                reason="REQUIRED",
            )
        case "openai":
            with inside("openai"):
                kinds = ("neuron", "head", "latent")
                if request.openai.components not in kinds:
                    raise InvalidArgument(f"must be one of {', '.join(kinds)}", field="components")
                if not request.openai.model:
                    raise InvalidArgument("is required", field="model", reason="REQUIRED")
                if (request.openai.components == "latent") != bool(request.openai.dictionary):
                    raise InvalidArgument(
                        "is what latents need and others have not", field="dictionary"
                    )


def _relative(text: str) -> PurePosixPath:
    path = PurePosixPath(text)
    bad = any(character in text for character in "\\\0?#%:")
    if path.is_absolute() or ".." in path.parts or bad or len(text) > 1_000:
        raise InvalidArgument(
            "is a folder within the place: no `..`, not from the root, none of \\ ? # % :"
        )
    return path


def _within(place: Path, path: PurePosixPath) -> Path:
    """The folder, which no link leads out of the place."""
    with inside("path"):
        try:
            root = place.resolve(strict=True)
            folder = (root / path).resolve(strict=True)
        except OSError:
            raise NotFound(f"there is no folder {str(path)!r} in the place") from None
        if not folder.is_relative_to(root) or not folder.is_dir():
            raise NotFound(f"there is no folder {str(path)!r} in the place")
    return folder


def _import(
    request: import_pb2.ImportDatasetRequest,
    source: Path,
    target: Path,
    say: Say,
    stop: threading.Event,
    most_bytes: int,
) -> None:
    def progress(group: Group, done: int, total: int) -> None:
        say(import_pb2.ImportProgress(phase="writing", group=str(group), done=done, total=total))

    def check() -> None:
        _check(stop)

    if request.HasField("openai"):
        given = request.openai
        importing.import_openai(
            source,
            target,
            Kind(given.components),
            given.model,
            given.dictionary,
            progress,
            check,
            most_bytes,
        )
    else:
        importing.import_neuronpedia(
            source, target, request.neuronpedia.dictionary, progress, check, most_bytes
        )


def _fetch(
    url: str,
    request: import_pb2.ImportDatasetRequest,
    folder: Path,
    say: Say,
    stop: threading.Event,
) -> None:
    """The files of an export, until a number is missing. Raises TdbError."""
    if not request.HasField("neuronpedia"):
        raise FailedPrecondition(
            "a URL does not list its files, so OpenAI's records are imported from folders only; "
            "TDB_OPENAI_RECORDS serves them where they are",
            field="place",
        )
    with inside("place"):
        there = remote_files.below(url)
    done = 0
    try:
        for kind in ("features", "activations", "explanations"):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            for number in range(1_000_000):
                _check(stop)
                name = f"{kind}/batch-{number}.jsonl.gz"
                if not (folder / name).exists():
                    if shutil.disk_usage(folder).free < ROOM_BYTES:
                        raise FailedPrecondition(
                            f"less than {ROOM_BYTES / 2**20:,.0f} MiB are free in {folder}: make "
                            "room first",
                            reason="DISK_FULL",
                        )
                    try:
                        content = there.get(name, MAX_FETCHED_BYTES)
                    except Missing as missing:
                        if kind == "features" and number == 0:
                            raise NotFound(f"there is no {missing}", field="path") from None
                        break
                    with files.atomic(folder / name) as file:
                        file.write(content)
                done += 1
                say(import_pb2.ImportProgress(phase="fetching", done=done))
    finally:
        there.close()


def _check(stop: threading.Event) -> None:
    if stop.is_set():
        raise Cancelled("the import was stopped; the same request goes on with it")
