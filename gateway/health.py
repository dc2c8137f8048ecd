"""`/healthz`: this process runs. `/readyz`: every service behind it is SERVING.

Of a service with several replicas one is enough, since that one gets the calls.
"""

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

_SERVING = health_pb2.HealthCheckResponse.SERVING
_REQUEST = health_pb2.HealthCheckRequest()
_NO_STORE = {"cache-control": "no-store"}


def routes(backends: Iterable[Backend]) -> list[Route]:
    probes = [_Probe(each) for each in backends]

    async def healthz(request: Request) -> JSONResponse:
        return JSONResponse({"status": "ok"}, headers=_NO_STORE)

    async def readyz(request: Request) -> JSONResponse:
        reasons = await asyncio.gather(*(probe.awaited() for probe in probes))
        awaited = {probe.name: why for probe, why in zip(probes, reasons, strict=True) if why}
        if awaited:
            body = {"status": "not ready", "awaited": awaited}
            return JSONResponse(body, 503, _NO_STORE)
        return JSONResponse({"status": "ready", "awaited": {}}, headers=_NO_STORE)

    return [Route("/healthz", healthz), Route("/readyz", readyz)]


class _Probe:
    """Asks one backend what it is still to do."""

    def __init__(self, backend: Backend) -> None:
        self.name = backend.name
        self._tls_trouble = backend.tls_trouble
        self._balanced = health_pb2_grpc.HealthStub(backend.channel)
        self._direct = health_pb2_grpc.HealthStub(backend.direct)

    async def awaited(self) -> str:
        """What the service is still to do before it serves; "" when nothing."""
        try:
            answer = await self._balanced.Check(_REQUEST, timeout=CHECK_TIMEOUT_S)
        except grpc.aio.AioRpcError:
            return await self._why_not()
        # The channel hears of a change a moment after it: the one it asked may serve no more.
        return "" if answer.status == _SERVING else await self._why_not()

    async def _why_not(self) -> str:
        try:
            await self._direct.Check(_REQUEST, timeout=CHECK_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
                return "it does not answer"
            return await asyncio.to_thread(self._tls_trouble) or "it cannot be reached"
        return "it is loading, or stopping"
