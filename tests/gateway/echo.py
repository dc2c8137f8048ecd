"""A service with a server stream, behind a real gRPC server and the real gateway.

Our own protos have no stream yet; this one is compiled here, from the same file that the
TypeScript client's code is made from.
"""

import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import Message
from grpc_tools import protoc
from tdb.inference.v1 import service_pb2_grpc

from gateway import backends
from services.common.server import ServiceServer
from services.common.tracing import Tracing
from tests.common.backend import Backend, settings

CLIENT = Path(__file__).parent / "connect_client"
SERVICE = "tdb.test.v1.EchoService"
ITEMS = f"/{SERVICE}/Items"
ECHO = f"/{SERVICE}/Echo"


def _service() -> ServiceDescriptor:
    pool: Any = descriptor_pool.Default()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "set"
        code = protoc.main(
            ["protoc", f"-I{CLIENT}", f"--descriptor_set_out={out}", str(CLIENT / "echo.proto")]
        )
        assert code == 0
        for file in descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file:
            pool.Add(file)
    service: ServiceDescriptor = pool.FindServiceByName(SERVICE)
    return service


DESCRIPTOR = _service()


def _kind(name: str) -> type[Message]:
    return message_factory.GetMessageClass(DESCRIPTOR.file.message_types_by_name[name])


EchoRequest: Any = _kind("EchoRequest")
EchoResponse: Any = _kind("EchoResponse")
ItemsRequest: Any = _kind("ItemsRequest")
ItemsResponse: Any = _kind("ItemsResponse")

Context = grpc.aio.ServicerContext[Any, Any]
Items = Callable[[Any, Context], AsyncIterator[Any]]
Echo = Callable[[Any, Context], Awaitable[Any]]


async def count(request: Any, context: Context) -> AsyncIterator[Any]:
    for index in range(request.count):
        yield ItemsResponse(index=index, text=request.text)


async def echo(request: Any, context: Context) -> Any:
    return EchoResponse(text=request.text, size=len(request.text))


@asynccontextmanager
async def echo_server(
    items: Items = count,
    unary: Echo = echo,
    inference: Backend | None = None,
    tracing: Tracing | None = None,
) -> AsyncIterator[ServiceServer]:
    """The service on a free port, with the interceptor that every service of ours has; beside it
    the inference service where one is given."""
    handlers = {
        "Items": grpc.unary_stream_rpc_method_handler(
            items,
            request_deserializer=ItemsRequest.FromString,
            response_serializer=ItemsResponse.SerializeToString,
        ),
        "Echo": grpc.unary_unary_rpc_method_handler(
            unary,
            request_deserializer=EchoRequest.FromString,
            response_serializer=EchoResponse.SerializeToString,
        ),
    }

    def add(server: grpc.aio.Server) -> None:
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, handlers)])
        if inference is not None:
            service_pb2_grpc.add_InferenceServiceServicer_to_server(inference, server)

    server = ServiceServer(
        "inference",
        settings(),
        port=0,
        add_servicers=add,
        service_names=[SERVICE],
        tracing=tracing,
    )
    async with server:
        await server.set_serving()
        yield server


def expose(monkeypatch: pytest.MonkeyPatch, *services: ServiceDescriptor) -> None:
    """Puts services on the gateway's allow-list, beside those that are."""
    everything = (*backends.EXPOSED["inference"], *services)
    monkeypatch.setattr(backends, "EXPOSED", {"inference": everything})
