"""All three services around one model, in this process, each over real gRPC."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tdb.dataset.v1 import build_pb2
from tdb.explainer.v1 import service_pb2_grpc

from services.common.settings import DictionarySource, ModelSource
from services.explainer import server as processes
from services.explainer.servicer import ExplainerServicer
from services.explainer.steering import ModelSteering
from services.explainer.upstream import Upstream
from services.inference.engine.model import Model
from services.inference.scheduler import Scheduler
from services.inference.server import build_server, load_model
from tests.common.backend import channel_to, settings
from tests.dataset.building import helpers

if TYPE_CHECKING:
    from tdb.explainer.v1.service_pb2_grpc import ExplainerServiceAsyncStub


class Services:
    """Of the model `name`; `data` holds the datasets that were built with it."""

    def __init__(
        self, name: str, folder: Path, dictionaries: Sequence[DictionarySource], data: Path
    ) -> None:
        self.name, self.folder, self.data = name, folder, data
        self.model: Model = load_model(ModelSource(name, str(folder)), None, dictionaries)

    async def build(self, request: build_pb2.BuildDatasetRequest) -> None:
        async with self.inference() as port, helpers.serving(self.data, port) as stub:
            await helpers.build(stub, request)

    @asynccontextmanager
    async def inference(self) -> AsyncIterator[int]:
        found = settings(TDB_MODEL=f"{self.name}={self.folder}", TDB_CACHE_MIB="0")
        worker = Scheduler()
        try:
            async with build_server(found, worker, {self.name: self.model}, port=0) as server:
                await server.set_serving()
                yield server.port
        finally:
            worker.close()

    @asynccontextmanager
    async def serving(
        self, store: Path, **variables: str
    ) -> AsyncIterator["ExplainerServiceAsyncStub"]:
        """All three services; the explanations are in the folder `store`."""
        async with AsyncExitStack() as opened:
            inference = await opened.enter_async_context(self.inference())
            dataset = await opened.enter_async_context(helpers.serving_at(self.data, inference))
            found = settings(
                TDB_DATA_DIR=str(store),
                TDB_DATASET_ADDRESS=f"127.0.0.1:{dataset}",
                TDB_INFERENCE_ADDRESS=f"127.0.0.1:{inference}",
                **variables,
            )
            database, lock = processes.open_database(found)
            opened.callback(lock.close)
            opened.callback(database.close)
            upstream = Upstream(found)
            opened.push_async_callback(upstream.close)
            embeddings = processes.open_embeddings(found)
            if embeddings:
                opened.push_async_callback(embeddings.close)
            servicer = ExplainerServicer(
                database, upstream, None, steering=ModelSteering(upstream), embeddings=embeddings
            )
            server = await opened.enter_async_context(processes.build_server(found, servicer, 0))
            await servicer.start(asyncio.Event(), 1.0)
            opened.push_async_callback(servicer.close)
            await server.set_serving()
            channel = await opened.enter_async_context(channel_to(server))
            stub: Any = service_pb2_grpc.ExplainerServiceStub(channel)
            yield stub
