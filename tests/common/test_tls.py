"""TLS and mutual TLS over real gRPC, and what is said of certificates that cannot serve."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from tdb.inference.v1 import model_pb2, service_pb2_grpc

from services.common import tls
from services.common.server import ServiceServer
from services.common.settings import SettingsError
from services.common.tls import ClientTls, ServerTls
from tests.common.backend import Backend, serving, settings
from tests.common.certificates import CLIENT, Authority
from tests.common.test_identity import Recorder
from tests.gateway.helpers import NOWHERE, Gateway, running

ROOT = Path(__file__).parents[2]
LIST = model_pb2.ListModelsRequest()


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def other(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "stranger")


def of_server(authority: Authority, *, mutual: bool = False, **wanted: Any) -> dict[str, str]:
    pair = authority.pair("service", **wanted)
    found = {"TDB_TLS_CERT": pair.cert, "TDB_TLS_KEY": pair.key}
    return {**found, "TDB_TLS_CLIENT_CA": authority.path} if mutual else found


def of_client(
    authority: Authority, name: str | None = None, signed_by: Authority | None = None, **wanted: Any
) -> dict[str, str]:
    found = {"TDB_TLS_CA": authority.path}
    if name is None:
        return found
    pair = (signed_by or authority).pair(name, usage=CLIENT, **wanted)
    return {**found, "TDB_TLS_CLIENT_CERT": pair.cert, "TDB_TLS_CLIENT_KEY": pair.key}


@asynccontextmanager
async def stub_to(server: ServiceServer, **variables: str) -> AsyncIterator[Any]:
    secured = ClientTls.of(settings(**variables))
    async with tls.channel(f"127.0.0.1:{server.port}", (), secured) as channel:
        yield service_pb2_grpc.InferenceServiceStub(channel)


def trouble(server: ServiceServer, **variables: str) -> str:
    secured = ClientTls.of(settings(**variables))
    assert secured is not None
    return secured.trouble(f"127.0.0.1:{server.port}")


async def code(call: Any) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asyncio.wait_for(call, 10)
    return str(caught.value.code().name)


async def test_tls_alone_hides_the_call_and_names_nobody(
    authority: Authority, other: Authority
) -> None:
    backend = Recorder()
    async with serving(backend, **of_server(authority)) as server:
        async with stub_to(server, **of_client(authority)) as stub:
            await stub.ListModels(LIST)
        async with stub_to(server) as stub:  # in the clear
            assert await code(stub.ListModels(LIST)) == "UNAVAILABLE"
        async with stub_to(server, **of_client(other)) as stub:
            assert await code(stub.ListModels(LIST)) == "UNAVAILABLE"
        assert await asyncio.to_thread(trouble, server, **of_client(authority)) == ""
        why = await asyncio.to_thread(trouble, server, **of_client(other))
    assert why == "its certificate is not accepted: unable to get local issuer certificate"
    async with serving(backend) as server:  # in the clear
        why = await asyncio.to_thread(trouble, server, **of_client(authority))
    assert "does not speak TLS" in why
    assert trouble(server, **of_client(authority)) == ""  # gone
    assert backend.users == ["local"]


async def test_a_certificate_names_its_user(authority: Authority, other: Authority) -> None:
    backend = Recorder()
    async with serving(backend, **of_server(authority, mutual=True)) as server:
        async with stub_to(server, **of_client(authority, "ann")) as stub:
            await stub.ListModels(LIST)
            claimed = [("x-tdb-user", "eve")]
            assert await code(stub.ListModels(LIST, metadata=claimed)) == "PERMISSION_DENIED"
        for variables, says in (
            (of_client(authority), "it asks for a certificate (TDB_TLS_CLIENT_CERT)"),
            (of_client(authority, "eve", other), "it does not accept the certificate"),
        ):
            async with stub_to(server, **variables) as stub:
                assert await code(stub.ListModels(LIST)) == "UNAVAILABLE"
            assert says in await asyncio.to_thread(trouble, server, **variables)
        async with stub_to(server, **of_client(authority, "")) as stub:
            assert await code(stub.ListModels(LIST)) == "UNAUTHENTICATED"
    assert backend.users == ["ann"]


async def test_where_there_are_tokens_a_certificate_is_no_token(authority: Authority) -> None:
    backend = Recorder()
    variables = {**of_server(authority, mutual=True), "TDB_TOKENS": "bob:t0ken"}
    async with (
        serving(backend, **variables) as server,
        stub_to(server, **of_client(authority, "ann")) as stub,
    ):
        assert await code(stub.ListModels(LIST)) == "UNAUTHENTICATED"
        await stub.ListModels(LIST, metadata=[("authorization", "Bearer t0ken")])
    assert backend.users == ["bob"]


async def test_users_with_certificates_have_limits(authority: Authority) -> None:
    variables = {**of_server(authority, mutual=True), "TDB_REQUESTS_PER_MINUTE": "4"}
    async with serving(Backend(), **variables) as server:
        for name in ("ann", "bob"):
            async with stub_to(server, **of_client(authority, name)) as stub:
                await stub.ListModels(LIST)
                assert await code(stub.ListModels(LIST)) == "RESOURCE_EXHAUSTED"


async def test_the_name_may_be_another_than_the_address(authority: Authority) -> None:
    async with serving(Backend(), **of_server(authority, hosts=("gpu-box",))) as server:
        variables = of_client(authority)
        async with stub_to(server, **variables) as stub:
            assert await code(stub.ListModels(LIST)) == "UNAVAILABLE"
        why = await asyncio.to_thread(trouble, server, **variables)
        assert "not valid for '127.0.0.1'" in why
        async with stub_to(server, **variables, TDB_TLS_NAME="gpu-box") as stub:
            await stub.ListModels(LIST)


async def test_a_certificate_that_expires_while_it_is_used_is_named(authority: Authority) -> None:
    pair = authority.pair("service", days=(-10, -1))
    server = grpc.aio.server()
    credentials = ServerTls(Path(pair.cert), Path(pair.key), None).credentials()  # unchecked
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    secured = ClientTls.of(settings(**of_client(authority)))
    assert secured is not None
    why = await asyncio.to_thread(secured.trouble, f"127.0.0.1:{port}")
    await server.stop(0)
    assert why == "its certificate is not accepted: certificate has expired"


async def test_the_gateway_connects_by_tls_and_says_why_it_cannot(
    authority: Authority, other: Authority
) -> None:
    backend = Recorder()
    async with serving(backend, **of_server(authority, mutual=True)) as server:
        address = f"127.0.0.1:{server.port}"
        mine = of_client(authority, "gateway")
        async with running(address, NOWHERE, None, **mine) as (app, client):
            assert (await client.get("/readyz")).status_code == 200
            assert (await Gateway(app, client).call("ListModels")).status_code == 200
        for variables, says in (
            (of_client(authority), "it asks for a certificate"),
            (of_client(other), "unable to get local issuer certificate"),
        ):
            async with running(address, NOWHERE, None, **variables) as (app, client):
                ready = await client.get("/readyz")
                assert ready.status_code == 503
                assert says in ready.json()["awaited"]["inference"]
    assert backend.users == ["gateway"]


async def test_a_trusted_gateway_with_a_certificate_speaks_for_its_users(
    authority: Authority,
) -> None:
    backend = Recorder()
    variables = {
        **of_server(authority, mutual=True),
        **of_client(authority, "gateway"),
        "TDB_TRUSTED_PROXIES": "127.0.0.1",
    }
    async with (
        serving(backend, **variables) as server,
        running(f"127.0.0.1:{server.port}", NOWHERE, None, **variables) as (app, client),
    ):
        answer = await Gateway(app, client).call("ListModels", headers={"x-forwarded-user": "eve"})
        assert answer.status_code == 200
    assert backend.users == ["eve"]


Files = Callable[[Authority, Path], dict[str, str]]


def _swapped(authority: Authority, _: Path) -> dict[str, str]:
    return {**of_server(authority), "TDB_TLS_KEY": authority.pair("another").key}


def _no_certificate(authority: Authority, folder: Path) -> dict[str, str]:
    (folder / "text").write_text("not a certificate\n")
    return {**of_server(authority), "TDB_TLS_CERT": str(folder / "text")}


def _no_authority(authority: Authority, folder: Path) -> dict[str, str]:
    (folder / "text").write_text("not a certificate\n")
    return {**of_server(authority), "TDB_TLS_CLIENT_CA": str(folder / "text")}


def _damaged(authority: Authority, folder: Path) -> dict[str, str]:
    text = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
    (folder / "damaged").write_text(text)
    return {**of_server(authority), "TDB_TLS_CERT": str(folder / "damaged")}


SERVER_FILES: list[tuple[Files, str]] = [
    (_swapped, "is not the key of the certificate in TDB_TLS_CERT"),
    (_no_certificate, "text holds no certificate in PEM"),
    (_no_authority, "text holds no certificate in PEM"),
    (_damaged, "TDB_TLS_CERT and TDB_TLS_KEY cannot be used"),
    (lambda of, _: of_server(of, days=(-10, -1)), "TDB_TLS_CERT: the certificate has expired"),
    (lambda of, _: of_server(of, days=(1, 10)), "the certificate is not yet valid"),
    (lambda of, _: of_server(of, password=b"secret"), "is encrypted; a key without a password"),
]


@pytest.mark.parametrize(("files", "says"), SERVER_FILES)
def test_a_certificate_that_cannot_serve_is_one_sentence(
    files: Files, says: str, authority: Authority, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError) as caught:
        ServerTls.of(settings(**files(authority, tmp_path)))
    assert says in str(caught.value)
    assert str(caught.value).startswith("TDB_TLS_")
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


CLIENT_FILES: list[tuple[Files, str]] = [
    (
        lambda of, _: of_client(of, "ann", days=(-10, -1)),
        "TDB_TLS_CLIENT_CERT: the certificate has expired",
    ),
    (
        lambda of, _: {**of_client(of, "ann"), "TDB_TLS_CLIENT_KEY": of.pair("another").key},
        "is not the key of the certificate in TDB_TLS_CLIENT_CERT",
    ),
    (
        lambda of, folder: {"TDB_TLS_CA": Authority(folder, "old", (-10, -1)).path},
        "TDB_TLS_CA: the certificate in",
    ),
]


@pytest.mark.parametrize(("files", "says"), CLIENT_FILES)
def test_what_a_client_cannot_use_is_one_sentence(
    files: Files, says: str, authority: Authority, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError) as caught:
        ClientTls.of(settings(**files(authority, tmp_path)))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_goes_together_is_set_together(authority: Authority) -> None:
    server, client = of_server(authority, mutual=True), of_client(authority, "ann")
    for variables, says in (
        ({"TDB_TLS_CERT": server["TDB_TLS_CERT"]}, "TDB_TLS_CERT is set and TDB_TLS_KEY is not"),
        ({"TDB_TLS_KEY": server["TDB_TLS_KEY"]}, "TDB_TLS_KEY is set and TDB_TLS_CERT is not"),
        ({"TDB_TLS_CLIENT_CA": authority.path}, "TDB_TLS_CLIENT_CA is set and TDB_TLS_CERT is not"),
        ({"TDB_TLS_NAME": "gpu-box"}, "TDB_TLS_NAME is set and TDB_TLS_CA is not"),
        (
            {name: client[name] for name in client if name != "TDB_TLS_CA"},
            "TDB_TLS_CLIENT_CERT is set and TDB_TLS_CA is not",
        ),
        ({"TDB_TLS_CA": "/no/such/file"}, "TDB_TLS_CA names /no/such/file, which cannot be read"),
    ):
        with pytest.raises(SettingsError, match=says):
            settings(**variables)


def test_mutual_tls_lets_a_service_listen_for_others_but_not_a_gateway(
    authority: Authority,
) -> None:
    public = settings(TDB_HOST="0.0.0.0", **of_server(authority, mutual=True))
    assert (public.requests_per_minute, public.concurrent_requests) == (6000, 256)
    with pytest.raises(SettingsError, match="the gateway needs TDB_TOKENS"):
        public.check_gateway()
    with pytest.raises(SettingsError, match="set TDB_TOKENS as well"):
        settings(TDB_HOST="0.0.0.0", **of_server(authority))


def test_what_is_started_together_must_accept_each_other(
    authority: Authority, other: Authority
) -> None:
    def check(**variables: str) -> str:
        found = settings(**variables)
        try:
            tls.check_together(ServerTls.of(found), ClientTls.of(found), "127.0.0.1")
        except SettingsError as error:
            return str(error)
        return ""

    mutual, client = of_server(authority, mutual=True), of_client(authority, "gateway")
    assert check() == check(**mutual, **client) == ""
    assert check(**of_server(authority), **of_client(authority)) == ""
    assert "set both, or neither" in check(**mutual)
    assert "set both, or neither" in check(**client)
    assert "the gateway needs TDB_TLS_CLIENT_CERT" in check(**mutual, **of_client(authority))
    assert "the gateway would not accept TDB_TLS_CERT by TDB_TLS_CA" in check(
        **mutual, **{**client, "TDB_TLS_CA": other.path}
    )
    assert "services would not accept TDB_TLS_CLIENT_CERT" in check(
        **mutual, **of_client(authority, "gateway", other)
    )
    elsewhere = of_server(authority, hosts=("gpu-box",))
    assert "not valid for '127.0.0.1' (TDB_TLS_NAME" in check(**elsewhere, **of_client(authority))
    assert check(**elsewhere, **of_client(authority), TDB_TLS_NAME="gpu-box") == ""


async def test_the_probe_asks_by_tls(authority: Authority, tmp_path: Path) -> None:
    async def run(target: str, **variables: str) -> tuple[int, str]:
        done = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-m", "services.common.probe", target],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={"PATH": "/usr/bin:/bin", **variables},
        )
        return done.returncode, done.stderr

    server_variables = of_server(authority, mutual=True)
    async with serving(Backend(), **server_variables) as server:
        target = f"127.0.0.1:{server.port}"
        assert await run(target, **server_variables, **of_client(authority, "probe")) == (0, "")
        code, text = await run(target, **of_client(authority))
        assert code == 1
        assert "it asks for a certificate" in text
        code, text = await run(target, **server_variables)
        assert code == 1
        assert "TDB_TLS_CA says whose certificate" in text
