"""An inference service without a model, as a process: `python replica.py`; it begins to listen
when it may read a line.

`GetModel` answers after as many seconds as `model` says, `Generate` with four tokens that far
apart; both say by their process id who answered.
"""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from typing import Any

from tdb.inference.v1 import generate_pb2, model_pb2, service_pb2_grpc

from services.common.server import ServiceServer, run_service
from services.common.settings import Settings
from tests.common.backend import SERVICE, Backend

TOKENS = 4


class Replica(Backend):
    async def GetModel(self, request: Any, context: Any) -> model_pb2.GetModelResponse:
        await asyncio.sleep(float(request.model))
        return model_pb2.GetModelResponse(engine_version=str(os.getpid()))

    async def Generate(
        self, request: Any, context: Any
    ) -> AsyncIterator[generate_pb2.GenerateResponse]:
        for _ in range(TOKENS):
            token = generate_pb2.GeneratedToken(position=os.getpid())
            yield generate_pb2.GenerateResponse(token=token)
            await asyncio.sleep(float(request.model))


async def prepare(server: ServiceServer) -> None:
    await server.set_serving()


if __name__ == "__main__":
    settings = Settings.from_env(os.environ)
    sys.stdin.readline()
    server = ServiceServer(
        "inference",
        settings,
        port=settings.inference_port,
        add_servicers=lambda server: service_pb2_grpc.add_InferenceServiceServicer_to_server(
            Replica(), server
        ),
        service_names=[SERVICE],
    )
    sys.exit(run_service(server, prepare))
