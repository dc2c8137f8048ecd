"""The server as a library and as a process."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from typing import Any

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tdb.inference.v1 import model_pb2

from services.common.server import ServiceServer, StartError
from tests.common.backend import SERVICE, Backend, channel_to, connected, serving, settings


async def health(server: ServiceServer, name: str) -> str:
    async with channel_to(server) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


async def test_health_serves_only_once_told_so_and_needs_no_token() -> None:
    server = ServiceServer(
        "inference",
        settings(TDB_TOKENS="ann:t0ken"),
        port=0,
        add_servicers=lambda server: None,
        service_names=[SERVICE],
    )
    async with server:
        for name in ("", SERVICE):
            assert await health(server, name) == "NOT_SERVING"
        await server.set_serving()
        for name in ("", SERVICE):
            assert await health(server, name) == "SERVING"
        await server.set_not_serving()
        assert await health(server, SERVICE) == "NOT_SERVING"


async def test_a_taken_port_is_one_sentence() -> None:
    async with serving(Backend()) as first:
        second = ServiceServer(
            "inference",
            settings(),
            port=first.port,
            add_servicers=lambda server: None,
            service_names=[SERVICE],
        )
        with pytest.raises(StartError, match=f"port {first.port}: is the port in use"):
            async with second:
                pass


async def test_draining_lets_a_short_call_end_and_cancels_a_long_one() -> None:
    backend = Backend()
    entered = asyncio.Event()

    async def answer(request: Any, context: Any) -> Any:
        entered.set()
        await asyncio.sleep(0.2 if request.model == "short" else 30)
        return model_pb2.ListModelsResponse()

    backend.answer = answer
    async with serving(backend, TDB_DRAIN_SECONDS="1") as server, connected(server) as stub:
        for model, ends_well in (("short", True), ("long", False)):
            entered.clear()
            call = stub.GetModel(model_pb2.GetModelRequest(model=model))
            await asyncio.wait_for(entered.wait(), 5)
            if ends_well:
                assert await call is not None
        await server.drain()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_reflection_is_a_setting() -> None:
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    for switch in "10":
        async with (
            serving(Backend(), TDB_REFLECTION=switch) as server,
            channel_to(server) as channel,
        ):
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            call = stub.ServerReflectionInfo(iter([request]))
            if switch == "1":
                answer = await call.read()
                names = [each.name for each in answer.list_services_response.service]
                assert SERVICE in names
                call.cancel()
            else:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call.read()
                assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


PROGRAM = """
import os, sys
from services.common.errors import FailedPrecondition
from services.common.server import ServiceServer, run_service
from services.common.settings import Settings

async def prepare(server):
    if len(sys.argv) > 1:
        raise FailedPrecondition(sys.argv[1])
    await server.set_serving()
    print("prepared", flush=True)

settings = Settings.from_env(os.environ)
server = ServiceServer("inference", settings, port=settings.inference_port,
                       add_servicers=lambda server: None, service_names=[])
sys.exit(run_service(server, prepare))
"""


def start(*arguments: str, **variables: str) -> subprocess.Popen[str]:
    env = {**os.environ, "TDB_INFERENCE_PORT": "0", "TDB_DRAIN_SECONDS": "1", **variables}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_process_announces_itself_and_ends_cleanly(number: signal.Signals) -> None:
    with start() as process:
        assert process.stdout is not None
        line = json.loads(process.stdout.readline())
        assert (line["event"], line["service"]) == ("listening", "inference")
        assert line["port"] > 0
        assert process.stdout.readline() == "prepared\n"
        process.send_signal(number)
        out, errors = process.communicate(timeout=20)
    assert process.returncode == 0
    assert out == ""
    assert "Traceback" not in errors


def test_what_fails_before_serving_is_one_sentence_and_exit_1() -> None:
    with start("the folder holds no model") as process:
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 1
    assert errors == "the folder holds no model\n"


def test_a_process_on_a_taken_port_says_so_and_exits_1() -> None:
    with start() as first:
        assert first.stdout is not None
        port = json.loads(first.stdout.readline())["port"]
        with start(TDB_INFERENCE_PORT=str(port)) as second:
            out, errors = second.communicate(timeout=20)
        first.terminate()
        first.communicate(timeout=20)
    assert second.returncode == 1
    assert out == ""
    assert errors.splitlines()[-1].startswith("the inference service cannot listen on 127.0.0.1")


def test_a_child_ends_with_its_supervisor() -> None:
    reading, writing = os.pipe()
    env = {**os.environ, "TDB_INFERENCE_PORT": "0", "TDB_PARENT_FD": str(reading)}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], env=env, pass_fds=[reading], stdout=subprocess.PIPE
    )
    with process:
        os.close(reading)
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.3)
        os.close(writing)
        assert process.wait(timeout=20) == 0
