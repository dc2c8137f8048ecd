"""Where documents come from, one after another and always in the same order.

    files   .txt (a file is a document), .jsonl (a line is one), .parquet or .arrow (a row is
            one; the latter in a folder that `datasets` has saved); text as .gz too
    demo    the generator of the demo's corpus, as a process: services do not import it
    hub     the files of a Hugging Face dataset (`hub`)

A document's id says where it stands: `texts/a.txt`, `news.jsonl:17` (lines count from 1),
`part.parquet:0` (rows count from 0), `demo:3`.
"""

import gzip
import hashlib
import io
import json
import subprocess
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol, cast

from tdb.dataset.v1 import build_pb2

from services.common.errors import FailedPrecondition, InvalidArgument, NotFound, inside

TEXT_FIELD = "text"
DEMO_SEED = "dataset"
MAX_DOCUMENT_CHARACTERS = 50_000_000
SUFFIXES = (".txt", ".jsonl", ".parquet", ".arrow", ".txt.gz", ".jsonl.gz")
TABLES = (".parquet", ".arrow")


@dataclass(frozen=True)
class Document:
    id: str
    text: str


class Corpus(Protocol):
    @property
    def name(self) -> str:
        """What readers of the dataset are told."""
        ...

    def identity(self) -> str:
        """Changes when the documents do, as far as can be seen without reading them all.

        Raises NotFound, FailedPrecondition."""
        ...

    def documents(self) -> Generator[Document, None, None]:
        """All of them, from the first. Raises FailedPrecondition where one cannot be read,
        Unavailable where that may pass."""
        ...


class FilesCorpus:
    """A file, or all files of a folder that have one of the known suffixes, by name."""

    def __init__(self, folder: Path, request: build_pb2.CorpusFiles) -> None:
        """`folder` is where corpora are. Raises InvalidArgument for a path that leads out of it.

        Links in the folder are followed: whoever put them there may."""
        self.name = request.path
        with inside("path"):
            self._root = _within(folder, request.path)
        self._field = request.field or TEXT_FIELD
        self._names_field = bool(request.field)

    def identity(self) -> str:
        digest = hashlib.sha256()
        paths = self._paths()
        if self._names_field and all(_is_text(path) for path in paths):
            raise InvalidArgument("text files have no fields", field="corpus.files.field")
        for path in paths:
            stat = path.stat()
            line = f"{self._id(path)}\0{stat.st_size}\0{stat.st_mtime_ns}\n"
            digest.update(line.encode())
        return digest.hexdigest()

    def documents(self) -> Generator[Document, None, None]:
        for path in self._paths():
            name = self._id(path)
            with _about(path), path.open("rb") as file:
                if name.endswith(TABLES):
                    yield from numbered(name, table_texts(file, self._field, name), 0)
                else:
                    yield from read(name, file, self._field)

    def _id(self, path: Path) -> str:
        if path == self._root:
            return path.name
        return path.relative_to(self._root).as_posix()

    def _paths(self) -> list[Path]:
        if not self._root.exists():
            raise NotFound(
                f"there is no {self.name} in `corpora` in the service's data folder",
                field="corpus.files.path",
            )
        if self._root.is_file():
            found = [self._root]
        else:
            found = sorted(path for path in self._root.rglob("*") if path.is_file())
        known = [path for path in found if path.name.endswith(SUFFIXES)]
        if not known:
            raise FailedPrecondition(
                f"{self.name} has no file that ends in {', '.join(SUFFIXES)}",
                field="corpus.files.path",
            )
        return known


def _within(folder: Path, path: str) -> Path:
    parts = path.split("/")
    if not path or path.startswith("/") or any(part in ("", ".", "..") for part in parts):
        raise InvalidArgument(
            f"{path[:200]!r} must be a file or folder in `corpora` in the service's data folder, "
            "written like texts/news.jsonl"
        )
    return folder.joinpath(*parts)


def read(name: str, file: IO[bytes], field: str) -> Generator[Document, None, None]:
    """The documents of one text or JSON Lines file. Raises FailedPrecondition."""
    name_inside = name.removesuffix(".gz")
    if name != name_inside:
        file = cast(IO[bytes], gzip.GzipFile(fileobj=file))
    newline = "" if name_inside.endswith(".txt") else None
    try:
        with io.TextIOWrapper(file, encoding="utf-8", newline=newline) as text:
            if name_inside.endswith(".txt"):
                yield Document(name, _bounded(name, text.read(MAX_DOCUMENT_CHARACTERS + 1)))
            else:
                yield from numbered(name, _json_texts(name, text, field), 1)
    except UnicodeDecodeError:
        raise FailedPrecondition(f"{name} is not UTF-8 text") from None
    except (gzip.BadGzipFile, EOFError):
        raise FailedPrecondition(f"{name} is no whole gzip file") from None


def _json_texts(name: str, lines: IO[str], field: str) -> Iterator[str]:
    number = 0
    while line := lines.readline(MAX_DOCUMENT_CHARACTERS + 1):
        number += 1
        where = f"{name}, line {number}"
        _bounded(where, line)
        if not line.strip():
            yield ""
            continue
        try:
            row = json.loads(line)
        except ValueError:
            raise FailedPrecondition(f"{where}: this is no JSON") from None
        yield text_of(row, field, where)


def text_of(row: object, field: str, where: str) -> str:
    """The text of a row. Raises FailedPrecondition."""
    if not isinstance(row, dict):
        raise FailedPrecondition(f"{where}: a JSON object is needed, with the text in {field!r}")
    text = row.get(field)
    if not isinstance(text, str):
        there = ", ".join(list(map(str, row))[:10])
        raise FailedPrecondition(f"{where}: there is no text in {field!r}; it has {there}")
    # JSON can hold halves of characters, which are no text.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def table_texts(file: IO[bytes], field: str, name: str) -> Iterator[str]:
    """The texts of a Parquet or Arrow file. Raises FailedPrecondition where it cannot be read
    here."""
    kind = "Arrow" if name.endswith(".arrow") else "Parquet"
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise FailedPrecondition(
            f"reading {kind} needs pyarrow, which is not installed: pip install "
            "'transformer-debugger[parquet]', or give the corpus as JSON Lines",
            reason="NOT_INSTALLED",
        ) from None
    try:
        if kind == "Arrow":
            opened = pyarrow.ipc.open_stream(file)
            names, batches = opened.schema.names, iter(opened)
        else:
            opened = pyarrow.parquet.ParquetFile(file)
            names = opened.schema_arrow.names
            batches = (
                opened.iter_batches(batch_size=1024, columns=[field]) if field in names else ()
            )
        if field not in names:
            raise FailedPrecondition(
                f"{name} has no column {field!r}; it has {', '.join(names[:10])}"
            )
        for batch in batches:
            for value in batch.column(field).to_pylist():
                if value is not None and not isinstance(value, str):
                    raise FailedPrecondition(f"the column {field!r} of {name} holds no text")
                yield value or ""
    except pyarrow.ArrowException as error:
        raise FailedPrecondition(f"{name} is no {kind} file that can be read: {error}") from None


class DemoCorpus:
    """Documents without end."""

    def __init__(self, request: build_pb2.DemoCorpus) -> None:
        self._seed = request.seed or DEMO_SEED
        self.name = f"demo (seed {self._seed})"

    def identity(self) -> str:
        return f"demo/{self._seed}"

    def documents(self) -> Generator[Document, None, None]:
        arguments = ["-m", "demo.corpus", "--seed", self._seed, "--documents", str(2**40)]
        process = subprocess.Popen(
            [sys.executable, "-P", *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert process.stdout is not None
        number = 0
        try:
            for line in process.stdout:
                yield Document(f"demo:{number}", json.loads(line)["text"])
                number += 1
            raise FailedPrecondition(
                "the generator of the demo's corpus ended: is the demo part of this installation?"
            )
        finally:
            process.kill()
            process.stdout.close()
            process.wait()


def numbered(name: str, texts: Iterator[str], first: int) -> Generator[Document, None, None]:
    """A document per row."""
    for number, text in enumerate(texts, first):
        yield Document(f"{name}:{number}", text)


def _is_text(path: Path) -> bool:
    return path.name.removesuffix(".gz").endswith(".txt")


def _bounded(where: str, text: str) -> str:
    if len(text) > MAX_DOCUMENT_CHARACTERS:
        raise FailedPrecondition(
            f"{where}: a document has at most {MAX_DOCUMENT_CHARACTERS:,} characters"
        )
    return text


@contextmanager
def _about(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FailedPrecondition(f"{path} cannot be read: {error.strerror}") from None
