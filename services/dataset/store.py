"""Writing a dataset: shard by shard, so that a writer that was killed goes on where it was.

    with DatasetWriter(folder, header, plan) as writer:
        for group, part in ...:
            if not writer.has(group, part):
                writer.write(group, part, records)
        writer.finish(texts)

A folder under construction holds `build.json` instead of a manifest: what is being built and how
(`plan`); a later writer goes on only with an equal one. A shard with a NAME.done beside it is
whole, and `finish` moves what that says into the manifest. The same records give the same bytes,
interrupted or not. One writer at a time: it holds a lock that dies with its process.
"""

import fcntl
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from google.protobuf.json_format import MessageToDict
from tdb.dataset.v1 import dataset_pb2, record_pb2

from services.common.errors import FailedPrecondition, InvalidArgument
from services.dataset import files, groups, manifest, shards, vocabulary
from services.dataset.groups import Group
from services.dataset.manifest import ExplanationsFile, Manifest, ShardEntry, StoredFile
from services.dataset.storage import LocalFile

BUILD = "build.json"
LOCK = "build.lock"
DONE = ".done"


class DatasetWriter:
    """Writes the dataset in `folder`, which is made where it does not exist.

    Raises FailedPrecondition where a dataset is there already, another writer is at work, or an
    unfinished build is of something else.
    """

    def __init__(
        self,
        folder: Path,
        header: dataset_pb2.DatasetHeader,
        plan: Mapping[str, object] | None = None,
    ) -> None:
        if header.source == dataset_pb2.SOURCE_UNSPECIFIED:
            raise InvalidArgument("the header must state the records' source", field="source")
        self._folder = folder
        self._header = header
        self._plan = {
            "header": MessageToDict(header, preserving_proto_field_name=True),
            "plan": dict(plan or {}),
        }
        self._lock = -1

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self._folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            self._take_over()
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._lock)

    def _take_over(self) -> None:
        name = self._folder.name
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FailedPrecondition(
                f"the dataset {name!r} is being written by another process"
            ) from None
        if (self._folder / manifest.NAME).exists():
            raise FailedPrecondition(
                f"there is a dataset {name!r} already: delete it or choose another name"
            )
        for left in self._folder.glob("*" + files.PARTIAL):
            left.unlink()
        text = json.dumps(self._plan, indent=1, sort_keys=True)
        build = self._folder / BUILD
        if not build.exists():
            with files.atomic(build) as file:
                file.write(text.encode())
        elif build.read_text() != text:
            raise FailedPrecondition(
                f"the dataset {name!r} was begun from something else and not finished: delete it "
                "or choose another name"
            )

    def has(self, group: Group, part: int) -> bool:
        """Whether this shard is written."""
        return (self._folder / (shards.name(group, part) + DONE)).exists()

    def write(self, group: Group, part: int, items: Iterable[record_pb2.ComponentRecord]) -> None:
        """Writes a shard, replacing what a killed writer may have left of it.

        `items` come by component index, ascending; a shard's components come before those of the
        group's next part. Raises InvalidArgument for records that are not whole or out of order.
        """
        written = shards.write(self._folder, group, part, items)
        files.sync_folder(self._folder)
        done = {"runs": written.runs, "has_token_ids": written.has_token_ids}
        with files.atomic(self._folder / (shards.name(group, part) + DONE)) as file:
            file.write(json.dumps(done).encode())

    def finish(self, texts: Sequence[str] | None = None, explanations: int = 0) -> Manifest:
        """Makes the dataset readable. `texts` are those of each token id, from 0; of
        `explanations` there are so many, written by `explanations.write`.

        Raises InvalidArgument where shards do not fit together.
        """
        found = [self._entry(path.name.removesuffix(DONE)) for path in self._done()]
        found.sort(key=lambda each: (each[0].group.order, each[0].part))
        entries = tuple(entry for entry, _ in found)
        if not entries:
            raise InvalidArgument("a dataset needs at least one record")
        if not manifest.ascending(entries):
            raise InvalidArgument("parts of a group overlap or are out of order")
        forms = {has_ids for _, has_ids in found if has_ids is not None}
        if len(forms) > 1:
            raise InvalidArgument("some shards have token ids and others only text")
        has_token_ids = forms == {True}
        if texts is not None and not has_token_ids:
            raise InvalidArgument("a vocabulary is of no use without token ids")
        written = Manifest(
            header=self._header,
            shards=entries,
            has_token_ids=has_token_ids,
            vocabulary=None if texts is None else self._write_vocabulary(texts),
            explanations=self._explanations(explanations) if explanations else None,
        )
        written.write(self._folder)
        for path in (*self._done(), self._folder / BUILD, self._folder / LOCK):
            path.unlink()
        return Manifest.read(self._folder)

    def _done(self) -> list[Path]:
        return sorted(self._folder.glob("*" + DONE))

    def _entry(self, name: str) -> tuple[ShardEntry, bool | None]:
        done = json.loads((self._folder / (name + DONE)).read_bytes())
        group, _, part = name.rpartition(".")
        index = (self._folder / (name + shards.INDEX)).read_bytes()
        opened = shards.Shard(name, index, LocalFile(self._folder / (name + shards.RECORDS)))
        stored = [
            StoredFile(name + shards.RECORDS, opened.size, opened.records_hash),
            self._stored(name + shards.INDEX),
            self._stored(name + shards.SEARCH),
        ]
        runs = tuple((first, last) for first, last in done["runs"])
        entry = ShardEntry(name, groups.parse(group), int(part), runs, tuple(stored))
        return entry, done["has_token_ids"]

    def _explanations(self, count: int) -> ExplanationsFile:
        return ExplanationsFile(**vars(self._stored(manifest.EXPLANATIONS)), count=count)

    def _stored(self, name: str) -> StoredFile:
        path = self._folder / name
        return StoredFile(name, path.stat().st_size, files.sha256(path))

    def _write_vocabulary(self, texts: Sequence[str]) -> StoredFile:
        content = vocabulary.encode(texts)
        with files.atomic(self._folder / manifest.VOCABULARY) as file:
            file.write(content)
        return self._stored(manifest.VOCABULARY)
