"""Random records, written as a dataset and served over real gRPC."""

from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
from tdb.dataset.v1 import dataset_pb2, record_pb2, service_pb2_grpc

from services.common.server import ServiceServer
from services.dataset import groups, records
from services.dataset.building.builds import Builds
from services.dataset.importers.imports import Imports
from services.dataset.library import Library
from services.dataset.reader import DatasetReader
from services.dataset.server import build_server
from services.dataset.servicer import DatasetServicer
from services.dataset.storage import LocalStorage
from services.dataset.store import DatasetWriter
from tests.common.backend import channel_to, settings

Record = record_pb2.ComponentRecord
Records = Iterator[Record]

VOCABULARY = [f" w{number}" for number in range(50)]


def header() -> dataset_pb2.DatasetHeader:
    return dataset_pb2.DatasetHeader(
        source=dataset_pb2.SOURCE_BUILT,
        model=dataset_pb2.RecordedModel(id="tiny", weights_hash="ab"),
        corpus=dataset_pb2.Corpus(name="corpus", tokens=1000),
    )


def example(random: np.random.Generator, tokens: int, *, pairs: bool = False) -> record_pb2.Example:
    made = record_pb2.Example(
        token_ids=random.integers(0, len(VOCABULARY), tokens).tolist(),
        document_id=f"doc-{random.integers(100)}",
        document_offset=int(random.integers(100)),
    )
    count = tokens * (tokens + 1) // 2 if pairs else tokens
    values = random.standard_normal(count).astype(np.float32).tolist()
    (made.pair_activations if pairs else made.activations).extend(values)
    return made


def record(
    component: str, random: np.random.Generator, *, tokens: int = 8, examples: int = 3
) -> record_pb2.ComponentRecord:
    """A whole record of random numbers; a head's has pairs."""
    pairs = component.startswith("head")
    top = [example(random, tokens, pairs=pairs) for _ in range(examples)]
    made = record_pb2.ComponentRecord(
        component=component,
        top=sorted(top, key=records.peak, reverse=True),
        random=[example(random, tokens, pairs=pairs) for _ in range(2)],
    )
    made.quantiles.add(lower=0, upper=1, examples=[example(random, tokens, pairs=pairs)])
    for name in ("mean", "skewness", "kurtosis"):
        setattr(made.statistics, name, float(random.standard_normal()))
    made.statistics.max = records.peak(made.top[0])
    made.statistics.variance = float(random.random())
    made.statistics.fraction_active = float(random.random())
    made.statistics.histogram.edges.extend([0.0, 1.0, 2.0])
    made.statistics.histogram.counts.extend([3, 1])
    made.token_statistics.add(token_id=3, count=9, mean=1.5)
    made.token_statistics.add(token_id=1, count=2, mean=1.5)
    if pairs:
        made.key_token_statistics.add(token_id=4, count=1, mean=-0.5)
    return made


def random_records(
    seed: int, components: Iterable[str], **shape: int
) -> list[record_pb2.ComponentRecord]:
    random = np.random.default_rng(seed)
    return [record(component, random, **shape) for component in components]


COMPONENTS = (
    *(f"neuron.0.{index}" for index in range(20)),
    *(f"neuron.1.{index}" for index in (0, 1, 2, 7, 8, 19)),
    *(f"neuron.10.{index}" for index in range(3)),
    *(f"head.0.{index}" for index in range(4)),
    *(f"latent.demo-mlp-2.{index}" for index in range(10)),
)
"""In the dataset's order, one group with holes."""


def write(
    folder: Path,
    items: Sequence[record_pb2.ComponentRecord],
    *,
    part_size: int = 7,
    vocabulary: Sequence[str] | None = VOCABULARY,
) -> None:
    """Writes `items`, in the dataset's order, with at most `part_size` records in a shard."""
    of_group: dict[groups.Group, list[record_pb2.ComponentRecord]] = {}
    for item in items:
        of_group.setdefault(groups.parse_component(item.component)[0], []).append(item)
    with DatasetWriter(folder, header()) as writer:
        for group, found in of_group.items():
            for part, start in enumerate(range(0, len(found), part_size)):
                if not writer.has(group, part):
                    writer.write(group, part, found[start : start + part_size])
        writer.finish(vocabulary)


def servicer_of(library: Library, folder: Path, **variables: str) -> DatasetServicer:
    """Serves the datasets in `folder`, in whose parent corpora are."""
    found = settings(**{"TDB_DATA_DIR": str(folder.parent), **variables})
    return DatasetServicer(library, Builds(found, library, folder), Imports(found, library, folder))


@asynccontextmanager
async def serving(folder: Path, **variables: str) -> AsyncIterator[ServiceServer]:
    """The datasets in `folder` behind a real server on a free port."""
    servicer = servicer_of(Library(folder), folder, **variables)
    try:
        async with build_server(settings(**variables), servicer, 0) as server:
            await server.set_serving()
            yield server
    finally:
        servicer.close()


@asynccontextmanager
async def connected_to(
    library: Library,
) -> AsyncIterator["service_pb2_grpc.DatasetServiceAsyncStub"]:
    """A stub to a service over `library`."""
    servicer = servicer_of(library, Path("/nowhere"))
    try:
        async with build_server(settings(), servicer, 0) as server, channel_to(server) as channel:
            yield service_pb2_grpc.DatasetServiceStub(channel)
    finally:
        servicer.close()


@asynccontextmanager
async def connected(
    folder: Path, **variables: str
) -> AsyncIterator["service_pb2_grpc.DatasetServiceAsyncStub"]:
    async with serving(folder, **variables) as server, channel_to(server) as channel:
        yield service_pb2_grpc.DatasetServiceStub(channel)


def opened(folder: Path) -> DatasetReader:
    return DatasetReader(LocalStorage(folder))


def with_texts(item: record_pb2.ComponentRecord) -> record_pb2.ComponentRecord:
    """A copy with the text of its tokens."""
    copy = record_pb2.ComponentRecord()
    copy.CopyFrom(item)
    for each in records.examples(copy):
        each.token_texts.extend(VOCABULARY[token] for token in each.token_ids)
    for statistic in (*copy.token_statistics, *copy.key_token_statistics):
        statistic.token_text = VOCABULARY[statistic.token_id]
    return copy


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
