"""Finding components: by statistics and peak tokens from search files, by text from the records.

Search files are read shard by shard for each call, so memory is 16 bytes for each component that
meets the conditions. Text is looked for in the order of the result, in as many records as a page
needs and at most READ_RECORDS.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from tdb.dataset.v1 import record_pb2

from services.common.errors import FailedPrecondition, InvalidArgument
from services.dataset.damage import Damaged
from services.dataset.groups import Group
from services.dataset.manifest import ShardEntry
from services.dataset.reader import DatasetReader, Record
from services.dataset.search_file import SearchFile

READ_RECORDS = 5_000


@dataclass(frozen=True)
class Condition:
    """`column` is one of search_file.COLUMNS; both ends belong to the range."""

    column: str
    at_least: float
    at_most: float


@dataclass(frozen=True)
class Question:
    groups: tuple[Group, ...]
    """Empty: all."""
    conditions: tuple[Condition, ...] = ()
    peak_token: int | str | None = None
    """A token id, or the text of a token."""
    text: str = ""
    order_by: str = ""
    """One of search_file.COLUMNS, or empty: the dataset's own order."""
    ascending: bool = False


@dataclass
class Found:
    components: list[tuple[str, record_pb2.Statistics]] = field(default_factory=list)
    next_rank: int | None = None
    """Where the next page starts; None at the end."""
    candidates: int = 0
    damaged: list[str] = field(default_factory=list)
    damaged_groups: list[str] = field(default_factory=list)


def search(reader: DatasetReader, question: Question, rank: int, limit: int) -> Found:
    """A page of at most `limit` components, from `rank` in the order of the result on.

    Raises InvalidArgument, FailedPrecondition (what the dataset does not know).
    """
    found = Found()
    token = _TokenWanted.of(reader, question.peak_token)
    places = _ordered(*_candidates(reader, question, token, found), question.ascending)
    found.candidates = len(places)
    stop = min(len(places), rank + (READ_RECORDS if question.text else limit))
    text = question.text.casefold()
    while rank < stop and len(found.components) < limit:
        place = int(places[rank])
        rank += 1
        try:
            record = reader.read(place)
            if not text or _contains(reader, record, text):
                record.statistics.ClearField("histogram")
                found.components.append((record.component, record.statistics))
        except Damaged as damaged:
            found.damaged.append(damaged.component)
    found.next_rank = rank if rank < len(places) else None
    return found


@dataclass(frozen=True)
class _TokenWanted:
    """A peak token as search files know it: one text, or ids."""

    text: str | None
    ids: NDArray[np.uint32]

    @classmethod
    def of(cls, reader: DatasetReader, token: int | str | None) -> "_TokenWanted | None":
        if token is None:
            return None
        if not reader.manifest.has_token_ids:
            if isinstance(token, int):
                raise FailedPrecondition(
                    f"the dataset {reader.name!r} knows tokens by their text only: name it by text",
                    field="peak_token.id",
                )
            return cls(token, np.zeros(0, np.uint32))
        if isinstance(token, int):
            return cls(None, np.array([token], np.uint32))
        vocabulary = reader.vocabulary()
        if vocabulary is None:
            raise FailedPrecondition(
                f"the dataset {reader.name!r} does not know the text of its tokens: name it by id",
                field="peak_token.text",
            )
        ids = vocabulary.ids(token)
        if not ids:
            raise InvalidArgument(
                f"no token of the dataset {reader.name!r} reads {token!r}; a leading space counts",
                field="peak_token.text",
            )
        return cls(None, np.array(ids, np.uint32))

    def rows(self, file: SearchFile) -> NDArray[np.bool_]:
        if self.text is None:
            return file.peak_at(self.ids)
        places = [place for place, text in enumerate(file.texts or ()) if text == self.text]
        return file.peak_at(np.array(places, np.uint32))


def _candidates(
    reader: DatasetReader, question: Question, token: _TokenWanted | None, found: Found
) -> tuple[NDArray[np.int64], NDArray[np.float64] | None]:
    """The places of components that meet all but the text, and what they are ordered by."""
    places: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
    keys: list[NDArray[np.float64]] = [np.zeros(0)]
    for entry, first_place in _shards(reader, question.groups):
        try:
            file = reader.search_file(entry)
        except Damaged:
            if str(entry.group) not in found.damaged_groups:
                found.damaged_groups.append(str(entry.group))
            continue
        meets = np.ones(entry.count, np.bool_) if token is None else token.rows(file)
        for condition in question.conditions:
            column = file.columns[condition.column]
            meets &= (column >= condition.at_least) & (column <= condition.at_most)
        rows = np.flatnonzero(meets)
        places.append(rows + first_place)
        if question.order_by:
            keys.append(file.columns[question.order_by][rows])
    return np.concatenate(places), np.concatenate(keys) if question.order_by else None


def _shards(reader: DatasetReader, wanted: Sequence[Group]) -> Iterable[tuple[ShardEntry, int]]:
    for group in reader.groups:
        if not wanted or group in wanted:
            yield from reader.shards_of(group)


def _ordered(
    places: NDArray[np.int64], keys: NDArray[np.float64] | None, ascending: bool
) -> NDArray[np.int64]:
    """Places by their keys, unknown ones last, ties in the dataset's order."""
    if keys is None:
        return places
    return places[np.argsort(keys if ascending else -keys, kind="stable")]


def _contains(reader: DatasetReader, record: Record, text: str) -> bool:
    """Whether a top example contains `text`, which is case-folded."""
    return any(text in "".join(reader.texts(example)).casefold() for example in record.top)
