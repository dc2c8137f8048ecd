"""OpenAI's published records, read where they are: one GET for each component that is asked for.

Nothing is listed over there: the layers and counts are those of the models, and a component without
a file is NOT_FOUND. A file becomes a record here, whole or not at all, and the record stays in the
local cache; a published file does not change, so it is not asked for again.
"""

import hashlib
import zlib
from collections.abc import Iterator

from google.protobuf.message import DecodeError
from tdb.dataset.v1 import dataset_pb2

from services.common.addresses import Kind
from services.common.errors import InvalidArgument, NotFound
from services.dataset import groups
from services.dataset.block_cache import BlockCache
from services.dataset.damage import Damaged
from services.dataset.http_files import Missing
from services.dataset.importers import openai_records
from services.dataset.importers.importing import OPENAI_NEURON_NOTE, OPENAI_NOTE
from services.dataset.manifest import SUFFIXES, Manifest, ShardEntry, StoredFile
from services.dataset.openai_catalogue import Published
from services.dataset.reader import DatasetReader, Record
from services.dataset.remote_files import RemoteFiles
from services.dataset.search_file import SearchFile
from services.dataset.storage import PartlyRead

MAX_FILE_BYTES = 32 * 2**20
STREAM_RECORDS = 4_096
BATCH_RECORDS = 8
"""Fewer than of stored records: each waits for the other side."""

_PARSED_AS = 1
"""Counts up when a file becomes another record than before, so that no old one is taken."""


class OpenAIStorage:
    """What is known of a published dataset without asking: its manifest."""

    def __init__(self, published: Published, base_url: str) -> None:
        """`base_url` is shown, so it holds no query."""
        self._published = published
        self._base_url = base_url

    @property
    def name(self) -> str:
        return self._published.name

    def manifest(self) -> bytes:
        published = self._published
        layers = list(published.groups())
        where = f"Read as asked for from {self._base_url}/{published.path}."
        header = dataset_pb2.DatasetHeader(
            source=dataset_pb2.SOURCE_OPENAI,
            model=dataset_pb2.RecordedModel(
                id=published.model,
                dictionaries=[
                    dataset_pb2.RecordedDictionary(id=group.dictionary)
                    for group, _ in layers
                    if group.dictionary
                ],
            ),
            notes=[
                OPENAI_NOTE,
                *([OPENAI_NEURON_NOTE] if published.kind is Kind.NEURON else []),
                where,
            ],
        )
        shards = tuple(
            ShardEntry(
                name=f"{group}.00000",
                group=group,
                part=0,
                runs=((0, published.components - 1),),
                files=tuple(StoredFile(f"{group}.00000{end}", 0, "") for end in SUFFIXES),
            )
            for group, _ in layers
        )
        return Manifest(header, shards, has_token_ids=False, vocabulary=None).content()

    def whole(self, stored: StoredFile) -> bytes:
        raise AssertionError("a published dataset has no files of ours")

    def parts(self, stored: StoredFile) -> PartlyRead:
        raise AssertionError("a published dataset has no files of ours")

    def check_there(self) -> None:
        """It is there for as long as it is configured."""


class OpenAIReader(DatasetReader):
    """Raises Unavailable, ResourceExhausted and FailedPrecondition where the other side does not
    answer as it should."""

    stream_records = STREAM_RECORDS
    batch_records = BATCH_RECORDS
    unsearchable = (
        "OpenAI's published records are read one by one, so they cannot be searched: import them "
        "with `tdb dataset import`, or build a dataset with `tdb dataset build`"
    )
    unexplained = (
        "OpenAI's published records are read one by one, without their explanations: import them "
        "with `tdb dataset import`, which keeps both"
    )

    def __init__(self, published: Published, files: RemoteFiles, cache: BlockCache) -> None:
        super().__init__(OpenAIStorage(published, files.shown))
        self._published = published
        self._layers = dict(published.groups())
        self._files = files
        self._cache = cache

    def close(self) -> None:
        self._files.close()

    def read(self, place: int) -> Record:
        """Raises NotFound where there is no file, Damaged where it is no record of this."""
        component = self.component(place)
        group, index = groups.parse_component(component)
        name = f"{self._published.path}/{self._layers[group]}/{index}.json"
        key = self._key(name)
        if (record := self._cached(key, component)) is not None:
            return record
        try:
            content = self._files.get(name, MAX_FILE_BYTES)
        except Missing as missing:
            raise NotFound(
                f"OpenAI has published no record of {component}: there is no {missing}"
            ) from None
        try:
            record = openai_records.parse(content, group, index)
        except InvalidArgument as error:
            what = f"{error.field}: {error.message}" if error.field else error.message
            raise Damaged(
                name, f"is not served, {what}", component, "what is published there must change"
            ) from None
        self._cache.put(key, zlib.compress(record.SerializeToString(deterministic=True)))
        return record

    def read_many(self, place: int, count: int, most_bytes: int) -> Iterator[bytes | Damaged]:
        for each in range(place, min(place + count, self.records)):
            try:
                data = self.read(each).SerializeToString(deterministic=True)
            except NotFound as error:
                yield Damaged("", "", self.component(each), said=error.message)
            except Damaged as damaged:
                yield damaged
            else:
                yield data
                most_bytes -= len(data)
                if most_bytes <= 0:
                    return

    def search_file(self, entry: ShardEntry) -> SearchFile:
        raise AssertionError(self.unsearchable)

    def _key(self, name: str) -> str:
        what = f"openai {_PARSED_AS} {self._files.shown}/{name}"
        return f"{hashlib.sha256(what.encode()).hexdigest()}-record"

    def _cached(self, key: str, component: str) -> Record | None:
        packed = self._cache.get(key)
        if packed is None:
            return None
        try:
            record = Record.FromString(zlib.decompress(packed))
        except (zlib.error, DecodeError):
            return None
        return record if record.component == component else None
