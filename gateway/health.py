"""`/healthz`: this process runs. `/readyz`: every service behind it is SERVING."""

import asyncio
from collections.abc import Iterable

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from gateway.backends import Backend

CHECK_TIMEOUT_S = 2.0

_NO_STORE = {"cache-control": "no-store"}


def routes(backends: Iterable[Backend]) -> list[Route]:
    stubs = {each.name: health_pb2_grpc.HealthStub(each.channel) for each in backends}

    async def healthz(request: Request) -> JSONResponse:
        return JSONResponse({"status": "ok"}, headers=_NO_STORE)

    async def readyz(request: Request) -> JSONResponse:
        reasons = await asyncio.gather(*(_awaited(stub) for stub in stubs.values()))
        awaited = {name: reason for name, reason in zip(stubs, reasons, strict=True) if reason}
        if awaited:
            body = {"status": "not ready", "awaited": awaited}
            return JSONResponse(body, 503, _NO_STORE)
        return JSONResponse({"status": "ready", "awaited": {}}, headers=_NO_STORE)

    return [Route("/healthz", healthz), Route("/readyz", readyz)]


async def _awaited(stub: health_pb2_grpc.HealthStub) -> str:
    """What a service is still to do before it serves; "" when nothing."""
    try:
        answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=CHECK_TIMEOUT_S)
    except grpc.aio.AioRpcError as error:
        if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
            return "it does not answer"
        return "it cannot be reached"
    if answer.status == health_pb2.HealthCheckResponse.SERVING:
        return ""
    return "it is loading its model, or stopping"
