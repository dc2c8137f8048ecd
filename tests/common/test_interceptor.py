"""The interceptor over a real server and channel: what each kind of ending looks like outside."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from tdb import channel
from tdb.inference.v1 import attribute_pb2, model_pb2, run_pb2, service_pb2_grpc

from services.common import calls, errors
from services.common.logs import JsonLines
from tests.common.backend import SERVICE, Backend, StreamingBackend, channel_to, connected, serving

SECRET = "a secret detail of the prompt"


async def refusal(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asyncio.wait_for(call, 5)
    return caught.value


def details(error: grpc.aio.AioRpcError) -> dict[str, Any]:
    """The google.rpc details by their short name."""
    found = {}
    status = rpc_status.from_call(error)
    for packed in status.details if status else ():
        name = packed.TypeName().rpartition(".")[2]
        message = getattr(error_details_pb2, name)()
        packed.Unpack(message)
        found[name] = message
    return found


def trailers(error: grpc.aio.AioRpcError) -> dict[str, Any]:
    return dict(error.trailing_metadata())


def raising(error: BaseException) -> Any:
    async def answer(request: Any, context: Any) -> Any:
        raise error

    return answer


async def test_an_answer_passes_through_and_the_call_is_known_below() -> None:
    backend = Backend()
    seen: list[Any] = []

    async def answer(request: Any, context: Any) -> Any:
        seen.append(calls.current())
        return model_pb2.ListModelsResponse()

    backend.answer = answer
    async with serving(backend) as server, connected(server) as stub:
        call = stub.ListModels(
            model_pb2.ListModelsRequest(), timeout=5, metadata=[("x-request-id", "click-1")]
        )
        assert await call == model_pb2.ListModelsResponse()
        assert dict(await call.trailing_metadata())["x-request-id"] == "click-1"
        await stub.ListModels(model_pb2.ListModelsRequest())
    with_deadline, without = seen
    assert with_deadline.request_id == "click-1"
    assert with_deadline.method == f"/{SERVICE}/ListModels"
    assert with_deadline.user == "local"
    assert 3 < with_deadline.remaining_s() < 6
    assert without.remaining_s() is None
    assert len(without.request_id) == 32


async def test_a_refusal_carries_field_reason_and_metadata() -> None:
    backend = Backend()
    backend.answer = raising(
        errors.NotFound("no model m", field="model", reason="NO_MODEL", metadata={"served": "a"})
    )
    async with serving(backend) as server, connected(server) as stub:
        error = await refusal(stub.GetModel(model_pb2.GetModelRequest(model="m")))
    assert (error.code(), error.details()) == (grpc.StatusCode.NOT_FOUND, "no model m")
    found = details(error)
    assert found["BadRequest"].field_violations[0].field == "model"
    assert found["ErrorInfo"].reason == "NO_MODEL"
    assert found["ErrorInfo"].domain == "tdb"
    assert dict(found["ErrorInfo"].metadata) == {"served": "a"}
    assert "RetryInfo" not in found
    assert "grpc-retry-pushback-ms" not in trailers(error)
    assert trailers(error)["x-request-id"]


async def test_a_refusal_that_waiting_helps_says_when_to_come_back() -> None:
    backend = Backend()
    backend.answer = raising(errors.ResourceExhausted("the queue is full", retry_after_s=0.3))
    async with serving(backend) as server, connected(server) as stub:
        error = await refusal(stub.Run(run_pb2.RunRequest()))
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details(error)["RetryInfo"].retry_delay.ToMilliseconds() == 300
    assert trailers(error)["grpc-retry-pushback-ms"] == "300"


@pytest.mark.parametrize("kind", errors.TdbError.__subclasses__(), ids=lambda kind: kind.code)
async def test_every_error_has_its_status(kind: type[errors.TdbError]) -> None:
    backend = Backend()
    backend.answer = raising(kind("a sentence"))
    async with serving(backend) as server, connected(server) as stub:
        error = await refusal(stub.Run(run_pb2.RunRequest()))
    assert error.code().name == kind.code
    assert error.details() == "a sentence"


async def test_a_bug_is_internal_and_tells_the_client_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    backend = Backend()
    backend.answer = raising(ValueError(SECRET))
    with caplog.at_level(logging.INFO, "tdb"):
        async with serving(backend) as server, connected(server) as stub:
            error = await refusal(stub.Run(run_pb2.RunRequest(model=SECRET)))
    assert error.code() == grpc.StatusCode.INTERNAL
    told = f"{error.details()} {error.trailing_metadata()} {error.debug_error_string()}"
    assert SECRET not in told
    assert "ValueError" not in told
    error_id = details(error)["ErrorInfo"].metadata["error_id"]
    assert error_id in str(error.details())
    quiet = [JsonLines(log_prompts=False).format(record) for record in caplog.records]
    unexpected = next(line for line in quiet if "unexpected" in line)
    assert json.loads(unexpected)["error_id"] == error_id
    assert json.loads(unexpected)["exception"]["type"] == "ValueError"
    assert not any(SECRET in line for line in quiet)
    # The control: the text is there to be logged, and the setting alone keeps it out.
    assert any(SECRET in JsonLines(log_prompts=True).format(r) for r in caplog.records)


async def test_prompts_are_logged_only_where_the_setting_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for switch in "01":
        caplog.clear()
        with caplog.at_level(logging.INFO, "tdb"):
            async with (
                serving(Backend(), TDB_LOG_PROMPTS=switch) as server,
                connected(server) as stub,
            ):
                await stub.ListModels(model_pb2.ListModelsRequest())
                await stub.GetModel(model_pb2.GetModelRequest(model=SECRET))
        lines = [json.loads(JsonLines(log_prompts=False).format(r)) for r in caplog.records]
        assert [line["code"] for line in lines if line["message"] == "call"] == ["OK", "OK"]
        assert any(SECRET in str(line) for line in lines) == (switch == "1")


async def test_a_cancelled_future_within_does_not_leave_the_client_waiting() -> None:
    backend = Backend()
    backend.answer = raising(asyncio.CancelledError())
    async with serving(backend) as server, connected(server) as stub:
        error = await refusal(stub.Run(run_pb2.RunRequest()))
    assert error.code() == grpc.StatusCode.INTERNAL


async def test_a_client_that_leaves_cancels_the_servicer() -> None:
    backend = Backend()
    entered, left = asyncio.Event(), asyncio.Event()

    async def answer(request: Any, context: Any) -> Any:
        entered.set()
        try:
            await asyncio.sleep(30)
        finally:
            left.set()

    backend.answer = answer
    async with serving(backend) as server, connected(server) as stub:
        call = stub.Run(run_pb2.RunRequest())
        await asyncio.wait_for(entered.wait(), 5)
        call.cancel()
        await asyncio.wait_for(left.wait(), 5)
        left.clear()
        error = await refusal(stub.Run(run_pb2.RunRequest(), timeout=0.2))
        assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        await asyncio.wait_for(left.wait(), 5)


async def test_what_no_request_may_hold_is_refused_before_the_servicer() -> None:
    backend = Backend()
    request = attribute_pb2.AttributeRequest()
    request.run.interventions.add(target="head.0.0").set.value = float("nan")
    async with serving(backend) as server, connected(server) as stub:
        error = await refusal(stub.Attribute(request))
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
        violation = details(error)["BadRequest"].field_violations[0]
        assert violation.field == "run.interventions[0].set.value"
        assert backend.requests == []
        request.run.interventions[0].set.value = 1.0
        await stub.Attribute(request)  # the control: the same request with a finite value
        assert len(backend.requests) == 1


async def test_bytes_that_are_no_message_are_the_client_s_fault() -> None:
    async with serving(Backend()) as server, channel_to(server) as channel:
        method: Any = channel.unary_unary(f"/{SERVICE}/Run")
        error = await refusal(method(b"\xff\xff"))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert error.details() == "the bytes of the request are not a valid message"


async def test_an_answer_that_is_no_message_is_internal() -> None:
    backend = Backend()

    async def answer(request: Any, context: Any) -> Any:
        return None

    backend.answer = answer
    async with serving(backend) as server, connected(server) as stub:
        error = await refusal(stub.Run(run_pb2.RunRequest()))
    assert error.code() == grpc.StatusCode.INTERNAL
    assert "NoneType" not in str(error)


async def read(server: Any, request: bytes, metadata: Any = ()) -> list[bytes]:
    """All items of the streaming method, read without stubs."""
    async with channel_to(server) as channel:
        method: Any = channel.unary_stream(StreamingBackend.METHOD)
        return [item async for item in method(request, metadata=metadata, timeout=5)]


async def test_streams_are_treated_like_unary_calls(caplog: pytest.LogCaptureFixture) -> None:
    ends: dict[str, BaseException] = {
        "refuse": errors.FailedPrecondition("not here", field="model"),
        "break": ValueError(SECRET),
        "cancelled": asyncio.CancelledError(),
    }

    async def items(request: Any, context: Any) -> AsyncIterator[Any]:
        yield model_pb2.GetModelRequest(model="first")
        if request.model in ends:
            raise ends[request.model]

    def asking(model: str) -> bytes:
        return model_pb2.GetModelRequest(model=model).SerializeToString()

    async with serving(Backend(), StreamingBackend(items)) as server:
        assert len(await read(server, asking(""))) == 1
        error = await refusal(read(server, asking("refuse")))
        assert error.code() == grpc.StatusCode.FAILED_PRECONDITION
        assert details(error)["BadRequest"].field_violations[0].field == "model"
        error = await refusal(read(server, asking("break")))
        assert error.code() == grpc.StatusCode.INTERNAL
        assert SECRET not in str(error)
        error = await refusal(read(server, asking("cancelled")))
        assert error.code() == grpc.StatusCode.INTERNAL
        error = await refusal(read(server, b"\xff\xff"))
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_a_reader_that_leaves_ends_the_stream() -> None:
    left = asyncio.Event()

    async def items(request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            while True:
                yield model_pb2.GetModelRequest(model="again")
                await asyncio.sleep(0.01)
        finally:
            left.set()

    async with serving(Backend(), StreamingBackend(items)) as server:
        async with channel_to(server) as channel:
            method: Any = channel.unary_stream(StreamingBackend.METHOD)
            call = method(b"")
            await call.read()
            call.cancel()
        await asyncio.wait_for(left.wait(), 5)


async def test_tokens_name_the_user_and_keep_others_out() -> None:
    backend = Backend()
    users: list[str] = []

    async def answer(request: Any, context: Any) -> Any:
        call = calls.current()
        assert call is not None
        users.append(call.user)
        return model_pb2.ListModelsResponse()

    async def items(request: Any, context: Any) -> AsyncIterator[Any]:
        yield model_pb2.GetModelRequest()

    backend.answer = answer
    request = model_pb2.ListModelsRequest()
    stream = StreamingBackend(items)
    async with serving(backend, stream, TDB_TOKENS="ann:t0ken,bob:other") as server:
        async with connected(server) as stub:
            for header in (None, "Bearer ", "Bearer t0ke", "Bearer t0ken2", "Basic t0ken"):
                metadata = [("authorization", header)] if header is not None else []
                error = await refusal(stub.ListModels(request, metadata=metadata))
                assert error.code() == grpc.StatusCode.UNAUTHENTICATED
                assert "t0ken" not in str(error)
            await stub.ListModels(request, metadata=[("authorization", "Bearer t0ken")])
            await stub.ListModels(request, metadata=[("authorization", "bearer other")])
        error = await refusal(read(server, b""))
        assert error.code() == grpc.StatusCode.UNAUTHENTICATED
        assert len(await read(server, b"", [("authorization", "Bearer other")])) == 1
    assert users == ["ann", "bob"]


async def test_a_wrong_token_costs_no_work() -> None:
    backend = Backend()
    async with serving(backend, TDB_TOKENS="ann:t0ken") as server, connected(server) as stub:
        started = time.monotonic()
        await refusal(stub.ListModels(model_pb2.ListModelsRequest()))
    assert backend.requests == []
    assert time.monotonic() - started < 5


async def test_an_answer_over_the_limit_of_a_message_says_so() -> None:
    backend = Backend()

    def answering(size: int) -> Any:
        async def answer(request: Any, context: Any) -> Any:
            return run_pb2.RunResponse(activations=[run_pb2.PointActivations(point="x" * size)])

        return answer

    async with (
        serving(backend) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}", channel.options()) as open_channel,
    ):
        stub: Any = service_pb2_grpc.InferenceServiceStub(open_channel)
        backend.answer = answering(channel.MAX_MESSAGE_BYTES - 100)
        assert len((await stub.Run(run_pb2.RunRequest())).activations) == 1
        backend.answer = answering(channel.MAX_MESSAGE_BYTES)
        error = await refusal(stub.Run(run_pb2.RunRequest()))
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert "at most 16,777,216 are sent in one" in str(error.details())
        assert details(error)["ErrorInfo"].reason == "ANSWER_TOO_LARGE"


async def test_a_message_of_a_stream_is_held_to_the_same_limit() -> None:
    async def items(request: Any, context: Any) -> AsyncIterator[Any]:
        yield model_pb2.GetModelRequest(model="first")
        yield model_pb2.GetModelRequest(model="x" * channel.MAX_MESSAGE_BYTES)

    async with serving(Backend(), StreamingBackend(items)) as server:
        error = await refusal(read(server, b""))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert details(error)["ErrorInfo"].reason == "ANSWER_TOO_LARGE"


@pytest.mark.parametrize("character", ["x", "é", "\U0001f600", "%", "\ud800"])
async def test_a_refusal_that_quotes_something_long_still_arrives(character: str) -> None:
    """Trailers over 8 KiB would arrive as RESOURCE_EXHAUSTED, and be tried again."""
    backend = Backend()
    sentence = f"the start {character * 100_000} the end"
    backend.answer = raising(errors.NotFound(sentence, field=f"nodes.{character * 10_000}"))
    async with serving(backend) as server, connected(server) as stub:
        error = await refusal(stub.Run(run_pb2.RunRequest()))
    assert error.code() == grpc.StatusCode.NOT_FOUND
    text = str(error.details())
    assert text.startswith("the start ")
    assert text.endswith(" the end")
    assert len(text.encode()) <= 1000
    assert details(error)["BadRequest"].field_violations[0].field.startswith("nodes.")
