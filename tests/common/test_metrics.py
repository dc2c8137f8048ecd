"""What a service counts, read through its own port as Prometheus reads it."""

import contextlib
import http.client
import json
import socket
import ssl
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.parser import text_string_to_metric_families
from tdb.inference.v1 import model_pb2

from services.common.errors import ResourceExhausted
from services.common.metrics import OTHER, FirstNames, MetricsServer, new_registry
from services.common.server import ServiceServer, StartError, serve_metrics
from services.common.tokens import Tokens
from tests.common.backend import (
    SERVICE,
    Backend,
    StreamingBackend,
    channel_to,
    connected,
    serving,
    settings,
)
from tests.common.certificates import Authority

LIST = f"/{SERVICE}/ListModels"
RUN = f"/{SERVICE}/Run"


def get(port: int, token: str = "", host: str = "127.0.0.1") -> tuple[int, str]:
    """The status and body of a scrape."""
    connection = http.client.HTTPConnection(host, port, timeout=5)
    try:
        headers = {"authorization": f"Bearer {token}"} if token else {}
        connection.request("GET", "/metrics", headers=headers)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def sample(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(name, labels)


async def test_calls_are_counted_by_how_they_end() -> None:
    backend = Backend()
    answer = model_pb2.ListModelsResponse(models=["small"])
    in_flight: list[float | None] = []

    async def list_models(request: Any, context: Any) -> Any:
        in_flight.append(sample(server.registry, "tdb_requests_in_flight", method=LIST))
        return answer

    async def refuse(request: Any, context: Any) -> Any:
        raise ResourceExhausted("slow down", reason="RATE_LIMIT", retry_after_s=1)

    async with serving(backend) as server, connected(server) as stub:
        backend.answer = list_models
        await stub.ListModels(model_pb2.ListModelsRequest())
        await stub.ListModels(model_pb2.ListModelsRequest())
        backend.answer = refuse
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.ListModels(model_pb2.ListModelsRequest())
    registry = server.registry
    assert in_flight == [1, 1]
    assert sample(registry, "tdb_requests_in_flight", method=LIST) == 0
    assert sample(registry, "tdb_requests_total", method=LIST, code="OK") == 2
    assert sample(registry, "tdb_requests_total", method=LIST, code="RESOURCE_EXHAUSTED") == 1
    assert sample(registry, "tdb_refusals_total", reason="RATE_LIMIT") == 1
    assert sample(registry, "tdb_request_seconds_count", method=LIST) == 3
    sent = sample(registry, "tdb_response_bytes_total", method=LIST)
    assert sent == 2 * len(answer.SerializeToString())


async def test_a_stream_that_its_client_leaves_is_counted_and_no_longer_in_flight() -> None:
    async def items(request: Any, context: Any) -> AsyncIterator[Any]:
        while True:
            yield model_pb2.GetModelRequest(model="x")

    method = StreamingBackend.METHOD
    async with (
        serving(Backend(), StreamingBackend(items)) as server,
        channel_to(server) as channel,
    ):
        call = channel.unary_stream(
            method,
            request_serializer=model_pb2.GetModelRequest.SerializeToString,
            response_deserializer=model_pb2.GetModelRequest.FromString,
        )(model_pb2.GetModelRequest())
        await anext(aiter(call))
        call.cancel()
    registry = server.registry
    assert sample(registry, "tdb_requests_total", method=method, code="CANCELLED") == 1
    assert sample(registry, "tdb_requests_in_flight", method=method) == 0
    assert (sample(registry, "tdb_response_bytes_total", method=method) or 0) >= 3


async def test_the_port_answers_in_prometheus_text_and_closes_with_the_server(
    capsys: pytest.CaptureFixture[str],
) -> None:
    server = ServiceServer(
        "inference",
        settings(),
        port=0,
        add_servicers=lambda server: None,
        service_names=[SERVICE],
        metrics_port=0,
    )
    async with server:
        assert server.metrics_port
        status, body = get(server.metrics_port)
        assert status == 200
        families = {family.name for family in text_string_to_metric_families(body)}
        assert {"tdb_requests", "process_resident_memory_bytes"} <= families
        told = json.loads(capsys.readouterr().out)
        assert told == {
            "event": "metrics",
            "service": "inference",
            "host": "127.0.0.1",
            "port": server.metrics_port,
        }
    with pytest.raises(ConnectionRefusedError):
        get(server.metrics_port)


async def test_two_servers_in_one_process_count_apart() -> None:
    async with serving(Backend()) as one, serving(Backend()) as two, connected(one) as stub:
        await stub.ListModels(model_pb2.ListModelsRequest())
    assert sample(one.registry, "tdb_requests_total", method=LIST, code="OK") == 1
    assert sample(two.registry, "tdb_requests_total", method=LIST, code="OK") is None


async def test_a_taken_port_is_one_sentence() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = ServiceServer(
            "inference",
            settings(),
            port=0,
            add_servicers=lambda server: None,
            service_names=[SERVICE],
            metrics_port=port,
        )
        with pytest.raises(StartError, match=rf"port {port} .*TDB_INFERENCE_METRICS_PORT"):
            async with server:
                pass


@pytest.fixture
def guarded() -> Iterator[MetricsServer]:
    registry = new_registry()
    Counter("tdb_x", "X.", ("user",), registry=registry).labels("ann").inc()
    with MetricsServer(registry, "127.0.0.1", 0, Tokens.parse("ann:t0ken")) as server:
        yield server


@pytest.mark.parametrize(("token", "status"), [("", 401), ("wrong", 401), ("t0ken", 200)])
def test_where_calls_need_a_token_so_do_metrics(
    guarded: MetricsServer, token: str, status: int
) -> None:
    answered, body = get(guarded.port, token)
    assert answered == status
    assert ("ann" in body) == (status == 200)


def test_metrics_are_served_on_ipv6_too() -> None:
    try:
        server = MetricsServer(new_registry(), "::1", 0, Tokens())
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    with server:
        assert get(server.port, host="::1")[0] == 200


def test_only_so_many_names_become_labels() -> None:
    names = FirstNames(most=2)
    assert [names(name) for name in ("ann", "bob", "cat", "ann", "dan")] == [
        "ann",
        "bob",
        OTHER,
        "ann",
        OTHER,
    ]


def test_metrics_speak_tls_where_services_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    authority = Authority(tmp_path)
    pair = authority.pair("box")
    variables = {"TDB_TLS_CERT": pair.cert, "TDB_TLS_KEY": pair.key, "TDB_TLS_CA": authority.path}
    server = serve_metrics("gateway", settings(**variables), 0, new_registry())
    assert server
    with server:
        context = ssl.create_default_context(cafile=authority.path)
        url = f"https://127.0.0.1:{server.port}/metrics"
        with urllib.request.urlopen(url, timeout=5, context=context) as response:
            assert "process_" in response.read().decode()
        with socket.create_connection(("127.0.0.1", server.port)) as mute:
            with urllib.request.urlopen(url, timeout=5, context=context) as response:
                assert response.status == 200
            mute.sendall(b"GET / HTTP/1.0\r\n\r\n")
            with contextlib.suppress(ConnectionResetError):
                assert b"200" not in mute.recv(100)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("variables", "host"),
    [
        ({}, "127.0.0.1"),
        ({"TDB_HOST": "0.0.0.0", "TDB_TOKENS": "ann:t0ken"}, "0.0.0.0"),
        ({"TDB_HOST": "0.0.0.0", "TDB_TRUSTED_PROXIES": "10.0.0.5"}, "127.0.0.1"),
    ],
)
def test_without_tokens_metrics_stay_on_loopback(
    variables: dict[str, str], host: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve_metrics("gateway", settings(**variables), 0, new_registry())
    assert server
    server.close()
    assert json.loads(capsys.readouterr().out)["host"] == host
