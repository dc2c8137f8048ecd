"""Whose call it is: the rule by itself, and a service that holds to it over real gRPC."""

from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tdb.inference.v1 import model_pb2

from services.common import calls
from services.common.errors import PermissionDenied, TdbError, Unauthenticated
from services.common.identity import Identity, believed_gateways
from services.common.networks import Networks, address_of_peer
from services.common.tokens import Tokens
from tests.common.backend import Backend, channel_to, connected, serving, settings

LIST = model_pb2.ListModelsRequest()


def identity(tokens: str = "", believed: str = "", *, certificates: bool = False) -> Identity:
    return Identity(
        Tokens.parse(tokens),
        Networks.parse(believed),
        header="x-tdb-user",
        variable="TDB_TRUSTED_GATEWAYS",
        certificates=certificates,
    )


@pytest.mark.parametrize(
    ("address", "counts"),
    [
        ("10.0.0.5", True),
        ("::ffff:10.0.0.5", True),
        ("10.0.0.6", False),
        ("10.1.200.7", True),
        ("fd00::1", True),
        ("fd00::1%eth0", True),
        ("fd01::1", False),
        ("", False),
        ("10.0.0.5, 127.0.0.1", False),
        ("proxy", False),
    ],
)
def test_a_peer_counts_by_its_address(address: str, counts: bool) -> None:
    assert (address in Networks.parse("10.0.0.5, 10.1.0.0/16,fd00::/32")) == counts
    assert address not in Networks()


@pytest.mark.parametrize("text", ["proxy", "10.0.0.5/8", "10.0.0", "0.0.0.0/0", "::/0", "a,b"])
def test_what_names_no_network_or_everybody_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must"):
        Networks.parse(text)


def test_networks_are_shown_as_they_are_written() -> None:
    assert str(Networks.parse("10.0.0.5, 10.1.0.0/16,::1")) == "10.0.0.5,10.1.0.0/16,::1"


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:127.0.0.1:4711", "127.0.0.1"),
        ("ipv6:%5B::1%5D:4711", "::1"),
        ("ipv6:[::ffff:10.0.0.5]:1", "::ffff:10.0.0.5"),
        ("unix:/run/tdb.sock", ""),
        ("", ""),
    ],
)
def test_the_address_in_a_peer(peer: str, address: str) -> None:
    assert address_of_peer(peer) == address


ANN = "Bearer t0ken"
BOTH = identity("ann:t0ken,bob:other", "10.0.0.5")


@pytest.mark.parametrize(
    ("rule", "named", "peer", "authorization", "user"),
    [
        (identity(), [], "1.2.3.4", "", "local"),
        (identity(), [], "1.2.3.4", ANN, "local"),
        (identity("ann:t0ken"), [], "1.2.3.4", ANN, "ann"),
        (identity(believed="10.0.0.5"), ["eve@x"], "10.0.0.5", "", "eve@x"),
        (BOTH, ["eve"], "10.0.0.5", "", "eve"),
        (BOTH, [], "10.0.0.5", ANN, "ann"),
        (BOTH, [], "1.2.3.4", ANN, "ann"),
        (BOTH, ["ann"], "10.0.0.5", ANN, "ann"),
        (BOTH, ["eve"], "10.0.0.5", "Basic of-the-proxy", "eve"),
    ],
)
def test_who_it_is(
    rule: Identity, named: list[str], peer: str, authorization: str, user: str
) -> None:
    assert rule.user(named, peer, authorization) == user


@pytest.mark.parametrize(
    ("rule", "named", "peer", "authorization", "reason"),
    [
        (identity(), ["eve"], "127.0.0.1", "", "USER_NOT_BELIEVED"),
        (identity("ann:t0ken"), ["ann"], "127.0.0.1", ANN, "USER_NOT_BELIEVED"),
        (BOTH, ["eve"], "10.0.0.6", "", "USER_NOT_BELIEVED"),
        (BOTH, ["eve"], "", "", "USER_NOT_BELIEVED"),
        (BOTH, ["eve"], "10.0.0.5", ANN, "TWO_USERS"),
        (BOTH, ["eve", "ann"], "10.0.0.5", "", "USER_MALFORMED"),
        (BOTH, ["eve, ann"], "10.0.0.5", "", "USER_MALFORMED"),
        (BOTH, [""], "10.0.0.5", "", "USER_MALFORMED"),
        (BOTH, ["e" * 129], "10.0.0.5", "", "USER_MALFORMED"),
        (BOTH, [], "10.0.0.5", "", "TOKEN_REQUIRED"),
        (identity(believed="10.0.0.5"), [], "10.0.0.5", "", "USER_REQUIRED"),
        (identity(believed="10.0.0.5"), [], "127.0.0.1", ANN, "USER_REQUIRED"),
    ],
)
def test_who_is_refused(
    rule: Identity, named: list[str], peer: str, authorization: str, reason: str
) -> None:
    with pytest.raises(TdbError) as caught:
        rule.user(named, peer, authorization)
    assert caught.value.reason == reason
    expected = Unauthenticated if reason == "TOKEN_REQUIRED" else PermissionDenied
    assert isinstance(caught.value, expected)
    assert "t0ken" not in caught.value.message


def test_a_service_believes_its_gateway_and_by_default_only_one_on_its_own_machine() -> None:
    assert not believed_gateways(settings())
    proxies = {"TDB_TRUSTED_PROXIES": "10.0.0.5"}
    near = believed_gateways(settings(**proxies))
    assert ["127.0.0.1" in near, "::1" in near, "10.0.0.5" in near] == [True, True, False]
    own = believed_gateways(settings(**proxies, TDB_HOST="10.0.0.7"))
    assert "10.0.0.7" in own
    assert "10.0.0.5" not in own
    named = settings(**proxies, TDB_TRUSTED_GATEWAYS="10.0.0.9")
    assert str(believed_gateways(named)) == "10.0.0.9"


class Recorder(Backend):
    """Notes the user of each call."""

    def __init__(self) -> None:
        super().__init__()
        self.users: list[str] = []
        self.answer = self._note

    async def _note(self, request: Any, context: Any) -> Any:
        call = calls.current()
        assert call is not None
        self.users.append(call.user)
        return model_pb2.ListModelsResponse()


async def refused(call: Any) -> tuple[str, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code().name, str(caught.value.details())


async def test_a_service_takes_a_user_from_a_believed_gateway_only() -> None:
    backend = Recorder()
    forged = [("x-tdb-user", "eve")]
    for believed, answered in (("127.0.0.1", True), ("10.0.0.9", False)):
        async with (
            serving(backend, TDB_TRUSTED_GATEWAYS=believed) as server,
            connected(server) as stub,
        ):
            if answered:
                await stub.ListModels(LIST, metadata=forged)
            else:
                code, text = await refused(stub.ListModels(LIST, metadata=forged))
                assert code == "PERMISSION_DENIED"
                assert "TDB_TRUSTED_GATEWAYS" in text
                assert "127.0.0.1" in text
            assert (await refused(stub.ListModels(LIST)))[0] == "PERMISSION_DENIED"
            twice = [*forged, ("x-tdb-user", "ann")]
            assert (await refused(stub.ListModels(LIST, metadata=twice)))[0] == "PERMISSION_DENIED"
    assert backend.users == ["eve"]


async def test_a_service_where_nobody_is_believed_refuses_a_claimed_user() -> None:
    backend = Recorder()
    async with serving(backend) as server, connected(server) as stub:
        metadata = [("x-tdb-user", "eve")]
        assert (await refused(stub.ListModels(LIST, metadata=metadata)))[0] == "PERMISSION_DENIED"
        await stub.ListModels(LIST)
    assert backend.users == ["local"]


async def test_a_token_goes_with_a_believed_gateway() -> None:
    backend = Recorder()
    variables = {"TDB_TOKENS": "ann:t0ken", "TDB_TRUSTED_GATEWAYS": "127.0.0.1"}
    async with serving(backend, **variables) as server, connected(server) as stub:
        await stub.ListModels(LIST, metadata=[("authorization", ANN)])
        await stub.ListModels(LIST, metadata=[("x-tdb-user", "eve")])
        both = [("authorization", ANN), ("x-tdb-user", "eve")]
        assert (await refused(stub.ListModels(LIST, metadata=both)))[0] == "PERMISSION_DENIED"
        assert (await refused(stub.ListModels(LIST)))[0] == "UNAUTHENTICATED"
    assert backend.users == ["ann", "eve"]


async def test_reflection_asks_who_calls_and_health_does_not() -> None:
    variables = {"TDB_TOKENS": "ann:t0ken", "TDB_REFLECTION": "1"}
    async with serving(Backend(), **variables) as server, channel_to(server) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        code, _ = await refused(stub.ServerReflectionInfo(iter([request])).read())
        assert code == "UNAUTHENTICATED"
        call = stub.ServerReflectionInfo(iter([request]), metadata=[("authorization", ANN)])
        assert (await call.read()).list_services_response.service
        call.cancel()
        health = health_pb2_grpc.HealthStub(channel)
        await health.Check(health_pb2.HealthCheckRequest(), metadata=[("x-tdb-user", "eve")])
