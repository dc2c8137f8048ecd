"""kill -9 of each process under load: restarted, clear statuses meanwhile, right answers after."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from google.protobuf.json_format import ParseDict
from tdb.inference.v1 import attribute_pb2, service_pb2_grpc, verify_pb2

from tests.cli.helpers import Up, alive, tdb, until
from tests.cli.test_up import ATTRIBUTE, REQUEST, model, post, ready
from tests.common.cache.redis_server import running
from tests.faults.load import OK, Load, over_grpc, over_http
from tests.faults.process import Process, child

__all__ = ["model"]


@pytest.fixture
def up(model: Path, tmp_path: Path) -> Iterator[Up]:
    with Up(tdb("up", "--model", f"small={model}"), tmp_path) as up:
        yield up


def grpc_port(up: Up) -> int:
    listening = next(line for line in up.errors if line.startswith("inference: listening"))
    return int(listening.split()[-1])


def counts(pid: int) -> tuple[int, int, int]:
    """Descriptors, threads and children of a process."""
    process = psutil.Process(pid)
    return process.num_fds(), process.num_threads(), len(process.children())


class Clients:
    """What asks the running service: Attribute and Verify, over gRPC and over HTTP. Every answer
    must be the first one again."""

    def __init__(self, url: str, channel: grpc.Channel) -> None:
        stub = service_pb2_grpc.InferenceServiceStub(channel)
        self._first = post(f"{url}/{ATTRIBUTE}", REQUEST)
        table = ParseDict(REQUEST, attribute_pb2.AttributeRequest())
        verified = verify_pb2.VerifyRequest(table=table)
        nodes = [row["node"] for row in self._first["rows"]]
        self.over_grpc = [
            ("gRPC", over_grpc(lambda: stub.Attribute(table, timeout=30), self._is_first)),
            (
                "gRPC stream",
                over_grpc(
                    lambda: list(stub.Verify(verified, timeout=30)),
                    lambda found: (
                        sorted(nodes)
                        == sorted(each.node.node for each in found if each.HasField("node"))
                    ),
                ),
            ),
        ]
        self.over_http = [
            ("HTTP", over_http(f"{url}/{ATTRIBUTE}", REQUEST, lambda answer: self._same(answer)))
        ]

    def _same(self, answer: Any) -> bool:
        return bool(answer["rows"] == self._first["rows"])

    def _is_first(self, answer: attribute_pb2.AttributeResponse) -> bool:
        return answer.manifest.result_id == self._first["manifest"]["resultId"] and [
            (row.node, row.total_effect) for row in answer.rows
        ] == [(row["node"], row["totalEffect"]) for row in self._first["rows"]]


def ends_of(load: Load, name: str) -> set[str]:
    return {end for each, end in load.ends if each == name}


def seen_killed(up: Up, name: str) -> None:
    """kill -9, and until the supervisor says so."""
    before = sum("SIGKILL" in line for line in up.errors)
    os.kill(child(up, name), signal.SIGKILL)
    until("the crash to show", lambda: sum("SIGKILL" in line for line in up.errors) > before)


@pytest.mark.long
def test_redis_killed_under_load_costs_nothing(model: Path, tmp_path: Path) -> None:
    with (
        running() as redis,
        Process(model, tmp_path, TDB_REDIS_URL=redis.url) as service,
        service.channel() as channel,
    ):
        stub = service_pb2_grpc.InferenceServiceStub(channel)
        table = ParseDict(REQUEST, attribute_pb2.AttributeRequest())
        first = stub.Attribute(table)
        assert stub.Attribute(table).manifest.cached

        def is_first(answer: attribute_pb2.AttributeResponse) -> bool:
            return bool(answer.rows == first.rows)

        client = ("gRPC", over_grpc(lambda: stub.Attribute(table, timeout=10), is_first))
        with Load([client] * 4) as load:
            for change in (redis.stop, redis.start, redis.freeze, redis.thaw):
                change()
                load.until_answered()
        assert set(load.ends) == {("gRPC", OK)}


@pytest.mark.long
def test_processes_killed_under_load_come_back(up: Up) -> None:
    url = up.url()
    with grpc.insecure_channel(f"127.0.0.1:{grpc_port(up)}") as channel:
        clients = Clients(url, channel)
        everybody = [*clients.over_grpc, *clients.over_http] * 2
        before = counts(up.process.pid)
        first = set(up.children())

        with Load(everybody) as load:
            load.until_answered()
            seen_killed(up, "inference")
            load.until_answered()
        assert ends_of(load, "gRPC") <= {OK, "UNAVAILABLE"}
        assert ends_of(load, "gRPC stream") <= {OK, "UNAVAILABLE"}
        assert ends_of(load, "HTTP") <= {OK, "503 unavailable"}
        assert ready(url)

        with Load(everybody) as load:
            load.until_answered()
            seen_killed(up, "gateway")
            load.until_answered()
        # Who calls the service itself notices nothing.
        assert ends_of(load, "gRPC") == ends_of(load, "gRPC stream") == {OK}
        assert ends_of(load, "HTTP") == {OK, "BROKEN"}

        with Load(everybody) as load:
            load.until_answered()
            for other in sorted(first & set(up.children())):
                os.kill(other, signal.SIGKILL)
            until("all of them are back", lambda: not first & set(up.children()))
            until("readiness", lambda: ready(url), within_s=60)
            load.until_answered()
        # What they need is up: nobody notices.
        assert {end for _, end in load.ends} == {OK}

        second = set(up.children())
        assert len(second) == len(first)
        until("as many descriptors as before", lambda: counts(up.process.pid) == before)
    assert up.stop() == 0
    assert not any(alive(pid) for pid in first | second)
