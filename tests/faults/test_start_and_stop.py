"""SIGTERM in the middle of work, and data folders that cannot be written."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from google.protobuf.json_format import ParseDict
from tdb.inference.v1 import attribute_pb2, model_pb2, service_pb2_grpc, verify_pb2

from tests.cli.helpers import Up, alive, tdb, until
from tests.cli.test_up import ATTRIBUTE, REQUEST, model, post
from tests.faults.process import Process, child

__all__ = ["model"]

VERIFY = "tdb.inference.v1.InferenceService/Verify"
MANY = {
    "run": {"prompt": {"tokenIds": {"ids": [number % 64 for number in range(32)]}}},
    "objective": REQUEST["objective"],
    "topK": 4000,
}


def verified(stub: service_pb2_grpc.InferenceServiceStub) -> Any:
    table = ParseDict(MANY, attribute_pb2.AttributeRequest())
    return stub.Verify(verify_pb2.VerifyRequest(table=table))


def until_refused(stub: service_pb2_grpc.InferenceServiceStub) -> grpc.RpcError:
    """How a new call is refused once the service stops."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            stub.GetModel(model_pb2.GetModelRequest(), timeout=5)
        except grpc.RpcError as error:
            return error
    pytest.fail("new calls are let in")


def test_what_runs_is_finished_and_nothing_new_begins(model: Path, tmp_path: Path) -> None:
    with Process(model, tmp_path, TDB_DRAIN_SECONDS="60") as service, service.channel() as channel:
        stub = service_pb2_grpc.InferenceServiceStub(channel)
        call = verified(stub)
        assert next(call).WhichOneof("event") == "progress"
        service.terminate()
        assert until_refused(stub).code() is grpc.StatusCode.UNAVAILABLE
        rest = list(call)
        assert rest[-1].summary.nodes == 4000
        assert service.end() == 0
        assert not service.errors


@pytest.mark.long
def test_what_runs_longer_than_the_grace_is_told_so(model: Path, tmp_path: Path) -> None:
    with Process(model, tmp_path, TDB_DRAIN_SECONDS="0") as service, service.channel() as channel:
        stub = service_pb2_grpc.InferenceServiceStub(channel)
        call = verified(stub)
        next(call)
        service.terminate()
        with pytest.raises(grpc.RpcError) as ended:
            list(call)
        assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
        assert service.end() == 0


@pytest.mark.long
def test_a_stream_through_the_gateway_is_finished(model: Path, tmp_path: Path) -> None:
    arguments = tdb("up", "--model", f"small={model}")
    with Up(arguments, tmp_path, TDB_DRAIN_SECONDS="60", TDB_CACHE_MIB="0") as up:
        url = up.url()
        headers = {"accept": "text/event-stream"}
        table = {"table": MANY}
        with httpx.stream("POST", f"{url}/{VERIFY}", json=table, headers=headers, timeout=60) as it:
            lines = it.iter_lines()
            assert "progress" in next(lines)
            up.process.terminate()
            rest = "\n".join(lines)
        assert '"summary"' in rest
        assert rest.rstrip().endswith("event: end\ndata: {}")
        children = up.children()
        assert up.end() == 0
    assert not any(alive(pid) for pid in children)


@pytest.mark.parametrize("place", ["/proc/tdb", "/dev/null/tdb", "/sys/tdb"])
def test_a_data_folder_that_cannot_be_made_is_one_sentence(
    model: Path, tmp_path: Path, place: str
) -> None:
    with Up(tdb("up", "--model", str(model), "--data-dir", place), tmp_path) as up:
        assert up.end() == 1
    assert up.errors[-1].startswith("tdb: TDB_DATA_DIR")
    assert place in up.errors[-1]
    assert len(up.errors) == 1
    assert up.out.empty()


def test_logs_that_cannot_be_opened_are_one_sentence(model: Path, tmp_path: Path) -> None:
    (tmp_path / "logs" / "inference.log").mkdir(parents=True)
    with Up(tdb("up", "--model", str(model)), tmp_path) as up:
        assert up.end() == 1
    assert len(up.errors) == 1
    assert str(tmp_path / "logs" / "inference.log") in up.errors[-1]
    assert up.out.empty()


@pytest.mark.long
def test_a_full_disk_costs_the_logs_only(model: Path, tmp_path: Path) -> None:
    """/dev/full is a disk that is full: every write to it fails as on one."""
    logs = tmp_path / "logs"
    logs.mkdir()
    for name in ("inference", "dataset", "explainer", "gateway"):
        (logs / f"{name}.log").symlink_to("/dev/full")
    with Up(tdb("up", "--model", f"small={model}"), tmp_path) as up:
        url = up.url()
        assert len(post(f"{url}/{ATTRIBUTE}", REQUEST)["rows"]) == 3
        # And a service that dies meanwhile is started again, wherever its log may be.
        (logs / "gateway.log").unlink()
        (logs / "gateway.log").mkdir()
        os.kill(child(up, "gateway"), signal.SIGKILL)
        until("a new gateway", lambda: any("listening again" in line for line in up.errors))
        assert len(post(f"{url}/{ATTRIBUTE}", REQUEST)["rows"]) == 3
        assert up.stop() == 0
    assert not any("Traceback" in line for line in up.errors)
