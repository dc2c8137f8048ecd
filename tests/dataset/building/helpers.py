"""A corpus, requests to build from it, and the dataset service on real gRPC."""

import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
from google.protobuf.json_format import ParseDict
from tdb.dataset.v1 import build_pb2, dataset_pb2, service_pb2_grpc

from services.common.server import ServiceServer
from services.dataset.building.builds import Builds
from services.dataset.importers.imports import Imports
from services.dataset.library import Library
from services.dataset.server import build_server
from services.dataset.servicer import DatasetServicer
from tests.common.backend import settings

WORDS = [
    "When",
    "Mary",
    "and",
    "John",
    "went",
    "to",
    "the",
    "store,",
    "gave",
    "a",
    "drink",
    ".",
    "the",
]
DOCUMENTS = 30


def documents() -> list[str]:
    chosen = random.Random(1)
    made = [" ".join(chosen.choices(WORDS, k=chosen.randint(1, 40))) for _ in range(DOCUMENTS - 2)]
    return [*made, "", "Mary " * 200]


def corpus_lines() -> str:
    return "".join(json.dumps({"body": text, "id": 1}) + "\n" for text in documents())


def request(**more: Any) -> build_pb2.BuildDatasetRequest:
    fields: dict[str, Any] = {
        "dataset": "built",
        "corpus": {"files": {"path": "news.jsonl", "field": "body"}},
        "tokens": "1000",
        "sequenceLength": 12,
        "topK": 3,
        "random": 2,
        "quantiles": 2,
        "segmentTokens": 150,
        **more,
    }
    return ParseDict(fields, build_pb2.BuildDatasetRequest())


@asynccontextmanager
async def serving_at(data: Path, inference_port: int, **variables: str) -> AsyncIterator[int]:
    """The dataset service over a data folder, and its port."""
    found = settings(TDB_DATA_DIR=str(data), TDB_INFERENCE_PORT=str(inference_port), **variables)
    folder = found.folder("datasets")
    library = Library(folder)
    builds = Builds(found, library, folder)
    servicer = DatasetServicer(library, builds, Imports(found, library, folder))
    try:
        async with build_server(found, servicer, 0) as server:
            servicer.stopped = server.stopped
            builds.resume()
            if found.demo_dataset:
                builds.keep_demo()
            await server.set_serving()
            yield server.port
    finally:
        servicer.close()


@asynccontextmanager
async def serving(
    data: Path, inference_port: int, **variables: str
) -> AsyncIterator["service_pb2_grpc.DatasetServiceAsyncStub"]:
    """A stub to that."""
    async with (
        serving_at(data, inference_port, **variables) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        yield service_pb2_grpc.DatasetServiceStub(channel)


async def build(
    stub: Any, asked: build_pb2.BuildDatasetRequest
) -> tuple[list[dataset_pb2.Build], dataset_pb2.Dataset]:
    """Everything that a build said, and what came of it."""
    said: list[dataset_pb2.Build] = []
    async for response in stub.BuildDataset(asked):
        if response.WhichOneof("event") == "progress":
            said.append(response.progress)
        else:
            return said, response.dataset
    raise AssertionError("a build ends with its dataset")


async def built_by(
    data: Path, inference: ServiceServer, asked: build_pb2.BuildDatasetRequest
) -> dict[str, bytes]:
    """The files of a dataset that was built without a break."""
    async with serving(data, inference.port) as stub:
        await build(stub, asked)
    return files_of(data / "datasets" / asked.dataset)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
