"""A real gRPC server around a servicer whose methods each test decides."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
from tdb.inference.v1 import model_pb2, service_pb2_grpc

from services.common.server import ServiceServer
from services.common.settings import Settings

SERVICE = "tdb.inference.v1.InferenceService"

Answer = Callable[[Any, grpc.aio.ServicerContext[Any, Any]], Awaitable[Any]]


class Backend(service_pb2_grpc.InferenceServiceServicer):
    """Each RPC calls `answer`; by default it lists no models."""

    def __init__(self) -> None:
        self.answer: Answer = self.list_no_models
        self.requests: list[Any] = []

    async def list_no_models(self, request: Any, context: Any) -> Any:
        return model_pb2.ListModelsResponse()

    async def _call(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        return await self.answer(request, context)

    ListModels = GetModel = Tokenize = Run = Attribute = DescribeComponent = _call
    GetQueue = GetStatus = _call

    async def _stream(self, request: Any, context: Any) -> AsyncIterator[Any]:
        yield await self._call(request, context)

    Verify = Generate = StreamActivations = Harvest = StreamOutputTokens = _stream


class StreamingBackend:
    """A server-streaming method whose items each test decides."""

    METHOD = "/test.v1.StreamService/Items"

    def __init__(self, items: Callable[[Any, Any], AsyncIterator[Any]]) -> None:
        self._items = items

    def add_to(self, server: grpc.aio.Server) -> None:
        handler = grpc.unary_stream_rpc_method_handler(
            self._items,
            request_deserializer=model_pb2.GetModelRequest.FromString,
            response_serializer=model_pb2.GetModelRequest.SerializeToString,
        )
        server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler("test.v1.StreamService", {"Items": handler})]
        )


def settings(**variables: str) -> Settings:
    """Settings as the environment would give them, and none of this machine's."""
    return Settings.from_env({"TDB_DRAIN_SECONDS": "1", **variables})


@asynccontextmanager
async def serving(
    backend: Backend, *streams: StreamingBackend, **variables: str
) -> AsyncIterator[ServiceServer]:
    """`backend` behind a real server on a free port, SERVING."""

    def add(server: grpc.aio.Server) -> None:
        service_pb2_grpc.add_InferenceServiceServicer_to_server(backend, server)
        for stream in streams:
            stream.add_to(server)

    server = ServiceServer(
        "inference", settings(**variables), port=0, add_servicers=add, service_names=[SERVICE]
    )
    async with server:
        await server.set_serving()
        yield server


def channel_to(server: ServiceServer) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(f"127.0.0.1:{server.port}")


@asynccontextmanager
async def connected(
    server: ServiceServer,
) -> AsyncIterator["service_pb2_grpc.InferenceServiceAsyncStub"]:
    """A stub over a real channel to `server`."""
    async with channel_to(server) as channel:
        yield service_pb2_grpc.InferenceServiceStub(channel)
