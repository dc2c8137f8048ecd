"""Batches of a stream of records.

A stored record is the bytes of its message, so a batch is put together from bytes and parsed once
as a whole: parsing each record only to copy and write it again would take most of a stream's time.
"""

from google.protobuf.message import DecodeError
from tdb.dataset.v1 import read_pb2

from services.dataset import cursors, views, wire
from services.dataset.damage import Damaged
from services.dataset.reader import DatasetReader
from services.dataset.requests import Stream

MOST_BYTES = 512 * 1024
"""As sent. A larger record travels alone, and with what came before it fits one message."""

_RECORDS = read_pb2.RecordBatch.RECORDS_FIELD_NUMBER


class Batch:
    """Collects records and damage in the order of places; `request` says in which form."""

    def __init__(self, reader: DatasetReader, request: read_pb2.StreamRecordsRequest) -> None:
        self._reader = reader
        self._view = request.view
        self._texts = request.token_texts
        self._as_stored = not request.token_texts and request.view == read_pb2.View()
        self._records: list[tuple[int, bytes]] = []
        self._damaged: list[Damaged] = []
        self.size = 0

    @property
    def count(self) -> int:
        return len(self._records) + len(self._damaged)

    @property
    def room(self) -> int:
        """How many more fit."""
        return self._reader.batch_records - self.count

    @property
    def is_full(self) -> bool:
        return self.room <= 0 or self.size >= MOST_BYTES

    def add(self, place: int, item: bytes | Damaged) -> None:
        """Adds what the reader found at `place`."""
        if isinstance(item, bytes) and not self._as_stored:
            item = self._formed(place, item)
        if isinstance(item, Damaged):
            self._damaged.append(item)
        else:
            self._records.append((place, item))
            self.size += len(item)

    def message(self, wanted: Stream, done: int) -> read_pb2.RecordBatch:
        """`done` components of the stream are dealt with after this batch."""
        try:
            fields = (wire.field(_RECORDS, data) for _, data in self._records)
            batch = read_pb2.RecordBatch.FromString(b"".join(fields))
        except DecodeError:
            batch = self._one_by_one()
        for each in self._damaged:
            batch.damaged.add(component=each.component, file=each.file, reason=each.message)
        batch.cursor = cursors.write(wanted.question, self._reader.manifest.hash, done)
        batch.done, batch.total = done, wanted.total
        return batch

    def _formed(self, place: int, data: bytes) -> bytes | Damaged:
        """The record in the form that is wanted."""
        try:
            record = self._reader.parse(place, data)
        except Damaged as damaged:
            return damaged
        if self._texts:
            self._reader.fill_texts(record)
        views.apply(self._view, record)
        return record.SerializeToString()

    def _one_by_one(self) -> read_pb2.RecordBatch:
        """A batch without the records that are none, whatever their checksums say."""
        batch = read_pb2.RecordBatch()
        for place, data in self._records:
            try:
                batch.records.append(self._reader.parse(place, data))
            except Damaged as damaged:
                self._damaged.append(damaged)
        return batch
