"""Reading a dataset: any record by its place, with one positional read, from any thread.

Components have places 0..records-1 in the dataset's order. The manifest alone says which component
is at which place, so a damaged shard costs its own records and nothing else. Memory is bounded by
the open shards: the manifest, and 12 bytes a record for each of at most OPEN_SHARDS.
"""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from threading import Lock

from google.protobuf.message import DecodeError
from tdb.dataset.v1 import record_pb2

from services.dataset import explanations, records
from services.dataset.damage import Damaged
from services.dataset.explanations import Explanation
from services.dataset.groups import Group
from services.dataset.manifest import Manifest, ShardEntry
from services.dataset.search_file import SearchFile
from services.dataset.shards import Shard
from services.dataset.storage import Storage
from services.dataset.vocabulary import Vocabulary

OPEN_SHARDS = 64
MAX_RECORDS = 2**31 - 1

Record = record_pb2.ComponentRecord


class DatasetReader:
    stream_records = MAX_RECORDS
    """How many one stream may ask for."""
    batch_records = 64
    """How many at most come in one batch of a stream."""
    unsearchable = ""
    """Why it cannot be searched; empty where it can."""
    unexplained = ""
    """Why its explanations cannot be read; empty where they can."""

    def __init__(self, storage: Storage) -> None:
        """Raises ManifestError where this is no dataset that can be served, FileNotFoundError where
        it is none at all."""
        self._storage = storage
        self.manifest = Manifest.parse(storage.manifest())
        self._first_places = _starts(self.manifest.shards)
        self._shards_of: dict[Group, list[int]] = {}
        for number, entry in enumerate(self.manifest.shards):
            self._shards_of.setdefault(entry.group, []).append(number)
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._vocabulary: Vocabulary | None = None
        self._lock = Lock()

    @property
    def name(self) -> str:
        return self._storage.name

    @property
    def records(self) -> int:
        return self._first_places[-1]

    @property
    def groups(self) -> list[Group]:
        """In the dataset's order."""
        return list(self._shards_of)

    def shards_of(self, group: Group) -> list[tuple[ShardEntry, int]]:
        """The shards of a group, each with the place of its first record."""
        numbers = self._shards_of.get(group, [])
        return [(self.manifest.shards[each], self._first_places[each]) for each in numbers]

    def place(self, group: Group, index: int) -> int | None:
        """Where a component's record is; None where the dataset has none."""
        if group not in self._shards_of:
            return None
        place = self.first_place(group, index)
        found = place < self.records and self.component(place) == group.component(index)
        return place if found else None

    def first_place(self, group: Group, index: int) -> int:
        """The place of the group's first component that is not below `index`, else the place behind
        the group. The group must be one of `groups`."""
        for entry, first_place in self.shards_of(group):
            if index <= entry.runs[-1][1]:
                return first_place + entry.row(index)
        last, first_place = self.shards_of(group)[-1]
        return first_place + last.count

    def component(self, place: int) -> str:
        """The address of the component at a place."""
        number = bisect_right(self._first_places, place) - 1
        entry = self.manifest.shards[number]
        return next(entry.components(place - self._first_places[number]))

    def read(self, place: int) -> Record:
        """The record at a place. Raises Damaged, and NotFound when the dataset was deleted."""
        number = bisect_right(self._first_places, place) - 1
        component = self.component(place)
        try:
            shard = self._shard(number)
            data = shard.read(place - self._first_places[number], component)
        except Damaged as damaged:
            raise damaged.of(component) from None
        return self.parse(place, data)

    def parse(self, place: int, data: bytes) -> Record:
        """The message of a record as it is stored. Raises Damaged."""
        try:
            return Record.FromString(data)
        except DecodeError:
            entry = self.manifest.shards[bisect_right(self._first_places, place) - 1]
            what, component = "holds what is no record", self.component(place)
            raise Damaged(entry.records.name, what, component) from None

    def read_many(self, place: int, count: int, most_bytes: int) -> Iterator[bytes | Damaged]:
        """Records from `place` on, as they are stored and sent: at least one and at most `count`,
        all of one shard, until they reach `most_bytes` compressed; damage in their place."""
        number = bisect_right(self._first_places, place) - 1
        entry, start = self.manifest.shards[number], place - self._first_places[number]
        stop = min(start + count, entry.count)
        try:
            shard = self._shard(number)
            size = 0
            for row in range(start, stop):
                size += shard.record_size(row)
                if size > most_bytes:
                    stop = max(row, start + 1)
                    break
            yield from shard.read_rows(start, stop, islice(entry.components(start), stop - start))
        except Damaged as damaged:
            components = islice(entry.components(start), stop - start)
            yield from (damaged.of(component) for component in components)

    def search_file(self, entry: ShardEntry) -> SearchFile:
        """Raises Damaged."""
        with self._unless_deleted():
            content = self._storage.whole(entry.search)
        return SearchFile.parse(entry.search.name, content, entry.count)

    def explanations(self, start: int) -> Iterator[tuple[Explanation, int]]:
        """What the source says of components, from a byte of its file on, each with the byte behind
        it; nothing where it says nothing. Raises Damaged."""
        stored = self.manifest.explanations
        if stored is None:
            return
        with self._unless_deleted():
            file = self._storage.parts(stored)
            explanations.check(stored, file)
            yield from explanations.read(stored, file, start)

    def vocabulary(self) -> Vocabulary | None:
        """The text of each token id; None where the dataset has none. Raises Damaged."""
        stored = self.manifest.vocabulary
        if stored is not None and self._vocabulary is None:
            with self._unless_deleted():
                content = self._storage.whole(stored)
            self._vocabulary = Vocabulary(content)
        return self._vocabulary

    def texts(self, example: record_pb2.Example) -> list[str]:
        """The text of an example's tokens; empty where it is unknown. Raises Damaged."""
        if example.token_texts or (vocabulary := self.vocabulary()) is None:
            return list(example.token_texts)
        return vocabulary.texts(example.token_ids)

    def fill_texts(self, record: Record) -> None:
        """Puts the text of tokens into a record that has their ids, where the dataset knows it.

        Raises Damaged.
        """
        for example in records.examples(record):
            if not example.token_texts:
                example.token_texts.extend(self.texts(example))
        if (vocabulary := self.vocabulary()) is not None:
            for each in (*record.token_statistics, *record.key_token_statistics):
                (each.token_text,) = vocabulary.texts([each.token_id])
            for score in (*record.promoted, *record.suppressed):
                if score.HasField("token_id"):
                    (score.text,) = vocabulary.texts([score.token_id])

    def _shard(self, number: int) -> Shard:
        with self._lock:
            if (shard := self._open.get(number)) is not None:
                self._open.move_to_end(number)
                return shard
        entry = self.manifest.shards[number]
        with self._unless_deleted():
            index, file = self._storage.whole(entry.index), self._storage.parts(entry.records)
        shard = Shard(entry.name, index, file)
        if shard.count != entry.count:
            what = "holds another count of records than the manifest says"
            raise Damaged(entry.index.name, what)
        with self._lock:
            self._open[number] = shard
            while len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        return shard

    @contextmanager
    def _unless_deleted(self) -> Iterator[None]:
        """A file that is missing is no damage where the whole dataset is gone."""
        try:
            yield
        except Damaged:
            self._storage.check_there()
            raise


def _starts(entries: tuple[ShardEntry, ...]) -> list[int]:
    """The place of each shard's first record, and behind them the count of all."""
    starts = [0]
    for entry in entries:
        starts.append(starts[-1] + entry.count)
    return starts
