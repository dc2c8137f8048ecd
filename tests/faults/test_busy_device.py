"""While one long piece of work holds the device: health, readiness and facts are answered."""

import asyncio

import grpc
import httpx
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tdb.inference.v1 import model_pb2, queue_pb2, service_pb2_grpc

from services.common.server import ServiceServer
from tests.faults.test_leaving_clients import grpc_call
from tests.faults.watching import SlowDevice, until


async def test_what_needs_no_device_is_answered(
    server: ServiceServer, gateway: str, device: SlowDevice
) -> None:
    device.seconds = 2.0
    async with (
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
        httpx.AsyncClient(base_url=gateway) as client,
    ):
        stub = service_pb2_grpc.InferenceServiceStub(channel)
        pass_of_2_s = asyncio.ensure_future(grpc_call(channel, "Attribute"))
        await until("the pass runs", lambda: device.begun == ["Attribute"])
        health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        assert (await stub.GetModel(model_pb2.GetModelRequest())).architecture == "gpt2"
        (entry,) = (await stub.GetQueue(queue_pb2.GetQueueRequest())).entries
        assert entry.running
        for path in ("/healthz", "/readyz"):
            assert (await client.get(path)).status_code == 200
        assert not pass_of_2_s.done()
        assert (await pass_of_2_s).rows
