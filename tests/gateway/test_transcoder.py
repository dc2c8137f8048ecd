"""Calls through the gateway to a real gRPC service."""

import asyncio
import base64
import json
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from tdb.inference.v1 import attribute_pb2, model_pb2, run_pb2

from gateway.requests import MAX_BODY_BYTES
from gateway.transcoder import DEFAULT_TIMEOUT_S, MAX_TIMEOUT_S, OFF_LOOP_BYTES
from services.common import calls, errors
from tests.common.backend import SERVICE, Backend
from tests.gateway.helpers import Gateway, gateway_to, running, violations

SECRET = "a secret detail"


def answering(response: Any) -> Backend:
    backend = Backend()

    async def answer(request: Any, context: Any) -> Any:
        if isinstance(response, Exception):
            raise response
        return response

    backend.answer = answer
    return backend


async def test_a_call_goes_there_and_back() -> None:
    backend = answering(attribute_pb2.AttributeResponse(objective_value=0.0))
    async with gateway_to(backend) as gateway:
        response = await gateway.call(
            "Attribute",
            {"run": {"prompt": {"text": "a"}}, "topK": 3},
            headers={"x-request-id": "click-1"},
        )
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"] == "click-1"
    assert response.json()["objectiveValue"] == 0
    assert response.json()["rows"] == []
    (request,) = backend.requests
    assert request.run.prompt.text == "a"
    assert request.top_k == 3


async def test_every_rpc_of_the_service_is_there() -> None:
    backend = answering(model_pb2.ListModelsResponse())
    async with gateway_to(backend) as gateway:
        for method in ("ListModels", "GetModel", "Tokenize", "Run", "Attribute"):
            assert (await gateway.call(method)).status_code == 200
    assert len(backend.requests) == 5


async def test_a_refusal_of_the_service_passes_with_its_details() -> None:
    refusal = errors.InvalidArgument("no such head", field="run.interventions[0].target")
    async with gateway_to(answering(refusal)) as gateway:
        response = await gateway.call("Run")
    assert response.status_code == 400
    body = response.json()
    assert body["code"] == "invalid_argument"
    assert body["message"] == "no such head"
    assert violations(response) == ["run.interventions[0].target"]
    packed = next(each for each in body["details"] if each["type"] == "google.rpc.BadRequest")
    padded = packed["value"] + "=" * (-len(packed["value"]) % 4)
    decoded = error_details_pb2.BadRequest.FromString(base64.b64decode(padded))
    assert decoded.field_violations[0].field == "run.interventions[0].target"


@pytest.mark.parametrize(
    ("error", "code", "http_status"),
    [
        (errors.NotFound("x"), "not_found", 404),
        (errors.FailedPrecondition("x"), "failed_precondition", 400),
        (errors.ResourceExhausted("x", retry_after_s=1.2), "resource_exhausted", 429),
        (errors.DeadlineExceeded("x"), "deadline_exceeded", 504),
        (errors.Unavailable("x"), "unavailable", 503),
        (errors.Unimplemented("x"), "unimplemented", 501),
        (errors.Cancelled("x"), "canceled", 499),
        (errors.PermissionDenied("x"), "permission_denied", 403),
        (errors.Unauthenticated("x"), "unauthenticated", 401),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
async def test_codes_and_http_statuses(error: Exception, code: str, http_status: int) -> None:
    async with gateway_to(answering(error)) as gateway:
        response = await gateway.call("Run")
    assert (response.json()["code"], response.status_code) == (code, http_status)
    assert response.headers.get("retry-after") == ("2" if http_status == 429 else None)


async def test_a_bug_of_the_service_says_nothing_but_its_id() -> None:
    async with gateway_to(answering(ValueError(SECRET))) as gateway:
        response = await gateway.call("Run")
    assert response.status_code == 500
    assert response.json()["code"] == "internal"
    assert SECRET not in response.text
    assert "ValueError" not in response.text
    assert "internal error" in response.json()["message"]


async def test_a_service_that_is_away_is_named_without_its_address() -> None:
    async with running("127.0.0.1:1") as (app, client):
        response = await Gateway(app, client).call("Run")
    assert response.status_code == 503
    assert response.json()["message"].startswith("the inference service cannot be reached")
    assert "127.0.0.1" not in response.text


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"bogus": 1}, ["bogus"]),
        ({"run": {"interventions": [{"taget": "x"}]}}, ["run.interventions[0].taget"]),
        ({"run": {"prompt": {"text": 5}}}, ["run.prompt.text"]),
        ("{", []),
        ('{"topK": NaN}', []),
        (b"\xff", []),
    ],
)
async def test_a_wrong_body_never_reaches_the_service(body: Any, field: list[str]) -> None:
    backend = Backend()
    async with gateway_to(backend) as gateway:
        response = await gateway.call("Attribute", body)
    assert response.status_code == 400
    assert response.json()["code"] == "invalid_argument"
    assert violations(response) == field
    assert backend.requests == []


async def test_only_json_is_taken() -> None:
    backend = Backend()
    async with gateway_to(backend) as gateway:
        for kind in ("text/plain", "", "application/proto", "application/json; charset=latin-1"):
            response = await gateway.call("ListModels", "{}", headers={"content-type": kind})
            assert response.status_code == 415
        assert backend.requests == []
        kind = "application/json; charset=utf-8"
        response = await gateway.call("ListModels", "{}", headers={"content-type": kind})
        assert response.status_code == 200
        response = await gateway.call("ListModels", "{}", headers={"content-encoding": "gzip"})
        assert response.json()["code"] == "unimplemented"
        response = await gateway.call("ListModels", "{}", headers={"connect-protocol-version": "2"})
        assert response.json()["code"] == "invalid_argument"


async def test_only_what_is_exposed_is_reachable() -> None:
    async with gateway_to(Backend()) as gateway:
        for path in (
            f"/{SERVICE}/Nope",
            "/grpc.health.v1.Health/Check",
            "/tdb.inference.v2.InferenceService/Run",
            f"/{SERVICE}/Harvest",  # over gRPC only
        ):
            response = await gateway.client.post(path, json={})
            assert response.status_code == 404
            assert response.json()["code"] == "unimplemented"
        response = await gateway.client.get(f"/{SERVICE}/Run")
        assert response.status_code == 405
        assert response.headers["allow"] == "POST"


async def test_a_body_over_the_limit_is_refused_before_it_is_parsed() -> None:
    backend = answering(run_pb2.RunResponse())
    frame = len(json.dumps({"model": ""}))
    async with gateway_to(backend) as gateway:
        just = json.dumps({"model": "m" * (MAX_BODY_BYTES - frame)})
        assert (await gateway.call("Run", just)).status_code == 200
        over = await gateway.call("Run", just + " ")
        assert over.status_code == 400
        assert over.json()["code"] == "invalid_argument"
        assert str(MAX_BODY_BYTES) in over.json()["message"]

        async def chunks() -> Any:
            for _ in range(5):
                yield b"x" * (MAX_BODY_BYTES // 4)

        headers = {"content-type": "application/json"}
        streamed = await gateway.client.post(f"/{SERVICE}/Run", content=chunks(), headers=headers)
        assert streamed.status_code == 400
        assert str(MAX_BODY_BYTES) in streamed.json()["message"]
    assert len(backend.requests) == 1


async def test_large_messages_leave_the_event_loop_free(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[str] = []
    to_thread = asyncio.to_thread

    async def noting(work: Any, *arguments: Any) -> Any:
        moved.append(work.__name__)
        return await to_thread(work, *arguments)

    monkeypatch.setattr("gateway.transcoder.asyncio.to_thread", noting)
    answer = run_pb2.RunResponse()
    answer.manifest.device = "d" * OFF_LOOP_BYTES
    async with gateway_to(answering(run_pb2.RunResponse())) as gateway:
        await gateway.call("Run", {"model": "m"})
        assert moved == []
        await gateway.call("Run", {"model": "m" * OFF_LOOP_BYTES})
        assert moved == ["parse", "_parse"]  # here, and in the service
    async with gateway_to(answering(answer)) as gateway:
        await gateway.call("Run")
    assert moved == ["parse", "_parse", "write"]


async def test_deadlines_are_passed_on_and_always_there() -> None:
    backend = Backend()
    seen: list[float] = []

    async def answer(request: Any, context: Any) -> Any:
        seen.append(context.time_remaining())
        return model_pb2.ListModelsResponse()

    backend.answer = answer
    async with gateway_to(backend) as gateway:
        for header in (None, "5000", "9999999999"):
            headers = {"connect-timeout-ms": header} if header else {}
            assert (await gateway.call("ListModels", headers=headers)).status_code == 200
        for wrong in ("0", "-1", "soon", "1.5", "99999999999"):
            response = await gateway.call("ListModels", headers={"connect-timeout-ms": wrong})
            assert response.json()["code"] == "invalid_argument"
    for remaining, limit in zip(seen, (DEFAULT_TIMEOUT_S, 5, MAX_TIMEOUT_S), strict=True):
        assert limit - 3 < remaining <= limit + 2  # gRPC sends long ones in seconds


async def test_a_deadline_that_passes_is_504() -> None:
    backend = Backend()
    left = asyncio.Event()

    async def answer(request: Any, context: Any) -> Any:
        try:
            await asyncio.sleep(30)
        finally:
            left.set()

    backend.answer = answer
    async with gateway_to(backend) as gateway:
        response = await gateway.call("Run", headers={"connect-timeout-ms": "100"})
        await asyncio.wait_for(left.wait(), 5)
    assert response.status_code == 504
    assert response.json()["message"] == "no answer within the deadline of 0.1 s"


async def test_a_client_that_leaves_cancels_the_call() -> None:
    backend = Backend()
    entered, left = asyncio.Event(), asyncio.Event()

    async def answer(request: Any, context: Any) -> Any:
        entered.set()
        try:
            await asyncio.sleep(30)
        finally:
            left.set()

    backend.answer = answer

    async def receive() -> Any:
        if not sent:
            sent.append(True)
            return {"type": "http.request", "body": b"{}", "more_body": False}
        await entered.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        return None

    sent: list[bool] = []
    scope = {
        "type": "http",
        "method": "POST",
        "path": f"/{SERVICE}/Run",
        "raw_path": b"",
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
    }
    async with gateway_to(backend) as gateway:
        await asyncio.wait_for(gateway.app(scope, receive, send), 5)
        await asyncio.wait_for(left.wait(), 5)


async def test_the_service_learns_who_asks() -> None:
    backend = Backend()
    seen: list[calls.Call | None] = []

    async def answer(request: Any, context: Any) -> Any:
        seen.append(calls.current())
        return model_pb2.ListModelsResponse()

    backend.answer = answer
    async with gateway_to(backend, TDB_TOKENS="ann:t0ken") as gateway:
        headers = {"authorization": "Bearer t0ken", "x-request-id": "click-2"}
        assert (await gateway.call("ListModels", headers=headers)).status_code == 200
        headers = {"authorization": "Bearer t0ken", "x-request-id": "two words"}
        response = await gateway.call("ListModels", headers=headers)
    first, second = seen
    assert first is not None
    assert second is not None
    assert (first.user, first.request_id) == ("ann", "click-2")
    assert second.request_id == response.headers["x-request-id"] != "two words"


async def test_grpc_s_own_statuses_have_sentences_of_ours() -> None:
    backend = Backend()

    async def answer(request: Any, context: Any) -> Any:
        await context.abort(grpc.StatusCode.UNKNOWN, SECRET)

    backend.answer = answer
    async with gateway_to(backend) as gateway:
        response = await gateway.call("Run")
    assert response.status_code == 500
    assert response.json()["message"] == "the inference service failed"
