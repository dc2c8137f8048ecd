"""`tdb status` over a real gRPC service whose answers each test decides."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from tdb.cli import main
from tdb.inference.v1 import model_pb2, queue_pb2, status_pb2
from tdb.type.v1 import tensor_pb2

from services.common import errors
from services.common.server import ServiceServer
from services.common.settings import setting_fields
from tests.common.backend import Backend, serving
from tests.common.certificates import Authority
from tests.gateway.helpers import listening, running

ANSWERS: dict[type, Any] = {
    model_pb2.ListModelsRequest: model_pb2.ListModelsResponse(models=["small"]),
    model_pb2.GetModelRequest: model_pb2.GetModelResponse(
        architecture="gpt2",
        device="cuda:0",
        data_type=tensor_pb2.DATA_TYPE_BFLOAT16,
        dimensions=model_pb2.Dimensions(layers=12),
        dictionaries=[model_pb2.Dictionary(id="x")],
    ),
    status_pb2.GetStatusRequest: status_pb2.GetStatusResponse(
        uptime_s=3 * 3600 + 125,
        device_memory=[
            status_pb2.DeviceMemory(device="cuda:0", kind="allocated", bytes=3 * 2**30),
            status_pb2.DeviceMemory(device="cuda:0", kind="total", bytes=80 * 2**30),
        ],
        cache=status_pb2.CacheStatus(
            store="redis", breaker="open", hits=7, misses=2, joined=1, errors=3
        ),
    ),
    queue_pb2.GetQueueRequest: queue_pb2.GetQueueResponse(
        entries=[
            queue_pb2.QueueEntry(
                user="ann",
                kind="Verify.chunk",
                method="tdb.inference.v1.InferenceService/Verify",
                request_id="sweep-1",
                running=True,
                queue=queue_pb2.Queue(priority=queue_pb2.PRIORITY_BULK),
                waited_ms=250,
            ),
            queue_pb2.QueueEntry(
                user="bob",
                kind="Attribute",
                method="tdb.inference.v1.InferenceService/Attribute",
                request_id="click-1",
                queue=queue_pb2.Queue(
                    priority=queue_pb2.PRIORITY_INTERACTIVE, position=1, expected_wait_ms=400
                ),
                waited_ms=1500,
            ),
        ]
    ),
}


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for field in setting_fields():
        monkeypatch.delenv(field.metadata["variable"], raising=False)
    monkeypatch.delenv("TDB_TOKEN", raising=False)


def busy(**changes: Any) -> Backend:
    """A service with something to tell; `changes` by the name of a request's type."""
    backend = Backend()

    async def answer(request: Any, context: Any) -> Any:
        found = changes.get(type(request).__name__, ANSWERS[type(request)])
        if isinstance(found, Exception):
            raise found
        return found

    backend.answer = answer
    return backend


async def status(server: ServiceServer, *more: str) -> int:
    arguments = ["status", "--address", f"127.0.0.1:{server.port}", *more]
    return await asyncio.to_thread(main, arguments)


async def test_a_human_sees_who_waits_for_what(capsys: pytest.CaptureFixture[str]) -> None:
    async with serving(busy()) as server:
        assert await status(server) == 0
        port = server.port
    assert capsys.readouterr().out.splitlines() == [
        "SERVICE    ADDRESS          STATE",
        f"inference  127.0.0.1:{port}  serving",
        "",
        "MODEL  STATE   DEVICE  ABOUT",
        "small  served  cuda:0  gpt2, 12 layers, bfloat16, 1 dictionary",
        "",
        "Up for 3 h 2 min.",
        "Memory of cuda:0: 3.0 GiB allocated, 80.0 GiB total.",
        "Cache in redis: 7 hits, 2 misses, 1 joined, 3 errors; its breaker is open.",
        "",
        "PLACE  USER  CLASS        WORK          CALL       SINCE  STARTS    REQUEST",
        "runs   ann   bulk         Verify.chunk  Verify     0.2 s  -         sweep-1",
        "1      bob   interactive  Attribute     Attribute  1.5 s  in 0.4 s  click-1",
    ]


async def test_json_has_everything(capsys: pytest.CaptureFixture[str]) -> None:
    async with serving(busy()) as server:
        assert await status(server, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["state"] for each in found["services"]] == ["serving"]
    assert found["models"][0]["dataType"] == "bfloat16"
    assert found["queue"][0]["running"] is True
    assert found["queue"][1]["queue"] == {
        "priority": "PRIORITY_INTERACTIVE",
        "position": 1,
        "expectedWaitMs": 400.0,
    }
    assert found["cache"]["breaker"] == "open"


async def test_an_idle_service_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    async with serving(busy(GetQueueRequest=queue_pb2.GetQueueResponse())) as server:
        assert await status(server) == 0
    assert capsys.readouterr().out.endswith("\n\nNobody waits for the device.\n")


async def test_a_service_that_loads_is_exit_1(capsys: pytest.CaptureFixture[str]) -> None:
    loading = errors.Unavailable("the model 'small' is still loading")
    async with serving(busy(GetModelRequest=loading)) as server:
        await server.set_not_serving()
        assert await status(server) == 1
    out = capsys.readouterr().out
    assert "loading its model, or stopping" in out
    assert "small  loading" in out
    assert "bob" in out


async def test_a_service_of_an_earlier_version_still_shows_its_models(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with serving(busy(GetStatusRequest=errors.Unimplemented("no"))) as server:
        assert await status(server) == 1
    out = capsys.readouterr().out
    assert "small  served" in out
    assert "earlier version" in out


@pytest.mark.parametrize(("token", "code"), [("", 1), ("wrong", 1), ("t0ken", 0)])
async def test_the_token_is_the_clients_own(
    token: str, code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TDB_TOKEN", token)
    async with serving(busy(), TDB_TOKENS="ann:t0ken") as server:
        assert await status(server) == code
    out = capsys.readouterr().out
    assert ("UNAUTHENTICATED: this server asks for a token" in out) == bool(code)
    assert ("small" in out) != bool(code)
    assert "t0ken" not in out


async def test_a_service_that_speaks_tls(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = Authority(tmp_path)
    pair = authority.pair("box")
    async with serving(busy(), TDB_TLS_CERT=pair.cert, TDB_TLS_KEY=pair.key) as server:
        assert await status(server) == 1
        monkeypatch.setenv("TDB_TLS_CA", authority.path)
        assert await status(server) == 0
    assert "small" in capsys.readouterr().out


async def test_the_gateway_says_what_it_waits_for(capsys: pytest.CaptureFixture[str]) -> None:
    async with (
        serving(busy()) as server,
        running(f"127.0.0.1:{server.port}") as (app, _),
        listening(app) as url,
    ):
        assert await status(server, "--gateway", url) == 0
        await server.set_not_serving()
        assert await status(server, "--gateway", f"{url}/") == 1
        assert await status(server, "--gateway", f"{url}/elsewhere") == 1
    first, second, third = capsys.readouterr().out.split("SERVICE")[1:]
    assert first.count("serving") == 2
    assert "waits for inference: it is loading" in second
    assert "is no gateway of ours" in third or "waits for" in third


def test_where_nothing_listens(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TDB_INFERENCE_PORT", "1")
    monkeypatch.setenv("TDB_GATEWAY_PORT", "2")
    monkeypatch.setenv("TDB_DATASET_PORT", "3")
    monkeypatch.setenv("TDB_EXPLAINER_PORT", "4")
    assert main(["status"]) == 1
    assert [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()[1:]] == [
        ["gateway", "http://127.0.0.1:2", "cannot be reached"],
        ["dataset", "127.0.0.1:3", "cannot be reached"],
        ["explainer", "127.0.0.1:4", "cannot be reached"],
        ["inference", "127.0.0.1:1", "cannot be reached"],
    ]


def test_ports_that_were_any_must_be_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TDB_INFERENCE_PORT", "0")
    assert main(["status"]) == 1
    assert "say where the service is with --address" in capsys.readouterr().err


async def test_watching_prints_again_until_it_is_interrupted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("tdb.cli.time.sleep", sleep)
    async with serving(busy()) as server:
        assert await status(server, "--json", "--watch", "0.5") == 0
    lines = capsys.readouterr().out.splitlines()
    assert pauses == [0.5, 0.5]
    assert [json.loads(line)["services"][0]["state"] for line in lines] == ["serving", "serving"]


async def test_names_do_not_move_the_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    entry = queue_pb2.QueueEntry(user="\x1b[2Jann", kind="Run", queue=queue_pb2.Queue())
    answer = queue_pb2.GetQueueResponse(entries=[entry])
    async with serving(busy(GetQueueRequest=answer)) as server:
        await status(server)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "?[2Jann" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--address", "gpu-box"), "must be HOST:PORT"),
        (("--address", "gpu-box:x"), "must be HOST:PORT"),
        (("--gateway", "gpu-box:8080"), "must be a URL such as"),
        (("--watch", "0"), "must be seconds from 0.1"),
        (("--watch", "soon"), "must be seconds from 0.1"),
    ],
)
def test_wrong_usage_is_exit_2(
    arguments: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["status", *arguments])
    assert caught.value.code == 2
    assert says in capsys.readouterr().err
