"""manifest.json: what a dataset is and which shards it has. Written last: a folder with a manifest
is a whole dataset, and readers look at no other.

The header is the DatasetHeader message in JSON; everything else is below. Equal content gives an
equal file, so its SHA-256 names the dataset's content.
"""

import hashlib
import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict, ParseDict, ParseError
from tdb.dataset.v1 import dataset_pb2

from services.common.errors import InvalidArgument
from services.dataset import files, groups
from services.dataset.groups import Group

NAME = "manifest.json"
FORMAT = "tdb-dataset"
FORMAT_VERSION = 1
SUFFIXES = (".records", ".index", ".search")
VOCABULARY = "vocabulary"
EXPLANATIONS = "explanations.jsonl"


class ManifestError(Exception):
    """Why a folder is not a dataset that can be served, in one sentence."""


@dataclass(frozen=True)
class StoredFile:
    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ExplanationsFile(StoredFile):
    """What the source says of components, as `explanations` keeps it."""

    count: int


@dataclass(frozen=True)
class ShardEntry:
    name: str
    group: Group
    part: int
    runs: tuple[tuple[int, int], ...]
    """Component indices held, as (first, last) runs, ascending."""
    files: tuple[StoredFile, ...]
    """Its records, index and search file."""

    @property
    def records(self) -> StoredFile:
        return self.files[0]

    @property
    def index(self) -> StoredFile:
        return self.files[1]

    @property
    def search(self) -> StoredFile:
        return self.files[2]

    @cached_property
    def _rows(self) -> list[int]:
        """The row of each run's first component, and behind them the count of all."""
        lengths = (last - first + 1 for first, last in self.runs)
        return list(accumulate(lengths, initial=0))

    @property
    def count(self) -> int:
        return self._rows[-1]

    def components(self, row: int) -> Iterator[str]:
        """The addresses of the shard's components, from a row on."""
        start = bisect_right(self._rows, row) - 1
        for (first, last), first_row in zip(self.runs[start:], self._rows[start:], strict=False):
            for index in range(first + max(0, row - first_row), last + 1):
                yield self.group.component(index)

    def row(self, index: int) -> int:
        """The row of the first component whose index is not below `index`; `count` if none is."""
        run = bisect_left(self.runs, index, key=lambda run: run[1])
        if run == len(self.runs):
            return self.count
        return self._rows[run] + max(0, index - self.runs[run][0])


@dataclass(frozen=True)
class Manifest:
    header: dataset_pb2.DatasetHeader
    shards: tuple[ShardEntry, ...]
    """In the dataset's order."""
    has_token_ids: bool
    vocabulary: StoredFile | None
    explanations: ExplanationsFile | None = None
    hash: str = ""
    """SHA-256 of the file, once written or read."""

    @property
    def records(self) -> int:
        return sum(shard.count for shard in self.shards)

    @property
    def size(self) -> int:
        """Bytes on disk, without the manifest itself."""
        shards = sum(file.bytes for shard in self.shards for file in shard.files)
        return shards + sum(each.bytes for each in (self.vocabulary, self.explanations) if each)

    def write(self, folder: Path) -> None:
        files.sync_folder(folder)
        with files.atomic(folder / NAME) as file:
            file.write(self.content())
        files.sync_folder(folder)

    def content(self) -> bytes:
        """The file."""
        document = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "header": MessageToDict(self.header, preserving_proto_field_name=True),
            "records": self.records,
            "bytes": self.size,
            "has_token_ids": self.has_token_ids,
            "vocabulary": self.vocabulary and vars(self.vocabulary),
            "explanations": self.explanations and vars(self.explanations),
            "shards": [
                {
                    "name": shard.name,
                    "group": str(shard.group),
                    "part": shard.part,
                    "runs": shard.runs,
                    "files": [vars(file) for file in shard.files],
                }
                for shard in self.shards
            ],
        }
        return json.dumps(document, indent=1, sort_keys=True).encode() + b"\n"

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Raises ManifestError, and FileNotFoundError where there is none."""
        return cls.parse((folder / NAME).read_bytes())

    @classmethod
    def parse(cls, content: bytes) -> "Manifest":
        """Raises ManifestError."""
        try:
            document = json.loads(content)
            return cls._parse(document, hashlib.sha256(content).hexdigest())
        except (ValueError, KeyError, TypeError, ParseError, InvalidArgument) as error:
            raise ManifestError(f"its {NAME} is damaged ({error})") from None

    @classmethod
    def _parse(cls, document: Any, hash: str) -> "Manifest":
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        if document["format_version"] != FORMAT_VERSION:
            raise ManifestError(
                f"it has format version {document['format_version']}, this version of tdb reads "
                f"{FORMAT_VERSION}: build or import it again, or use the tdb that wrote it"
            )
        header = dataset_pb2.DatasetHeader()
        ParseDict(document["header"], header)
        shards = tuple(
            ShardEntry(
                name=str(shard["name"]),
                group=groups.parse(shard["group"]),
                part=int(shard["part"]),
                runs=tuple((int(first), int(last)) for first, last in shard["runs"]),
                files=tuple(StoredFile(**file) for file in shard["files"]),
            )
            for shard in document["shards"]
        )
        for shard in shards:
            if shard.name != f"{shard.group}.{shard.part:05d}":
                raise ValueError(f"shard {shard.name!r} is not named for its group and part")
            if [file.name for file in shard.files] != [shard.name + end for end in SUFFIXES]:
                raise ValueError(f"shard {shard.name!r} has other files than a shard has")
        vocabulary = document["vocabulary"]
        if vocabulary and vocabulary["name"] != VOCABULARY:
            raise ValueError(f"its vocabulary is not called {VOCABULARY}")
        explained = document.get("explanations")
        if explained and explained["name"] != EXPLANATIONS:
            raise ValueError(f"its explanations are not called {EXPLANATIONS}")
        manifest = cls(
            header=header,
            shards=shards,
            has_token_ids=bool(document["has_token_ids"]),
            vocabulary=StoredFile(**vocabulary) if vocabulary else None,
            explanations=ExplanationsFile(**explained) if explained else None,
            hash=hash,
        )
        if manifest.records != document["records"] or not ascending(shards):
            raise ValueError("its shards do not add up")
        return manifest


def ascending(shards: tuple[ShardEntry, ...]) -> bool:
    """Whether components come in the dataset's order, each at most once."""
    places = [
        (*shard.group.order, index)
        for shard in shards
        for first, last in shard.runs
        for index in (first, last)
    ]
    # A run of one component names it twice, so only steps from run to run must go up.
    steps = zip(places[1::2], places[2::2], strict=False)
    backwards = any(first > last for shard in shards for first, last in shard.runs)
    return not backwards and all(earlier < later for earlier, later in steps)
