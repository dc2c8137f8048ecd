"""The dataset and inference services as the explainer asks them.

    record = await upstream.dataset.GetRecord(request)
    async for message in upstream.inference.Generate(request): ...

They are asked for the user of the call that is being served, until its deadline; work that belongs
to no call enters one first (`calls.enter`). What they refuse is raised as they refused it: status,
sentence, field and reason. That they refuse the explainer itself is no matter of the caller's, and
FailedPrecondition.
"""

from collections.abc import AsyncIterator
from functools import cached_property
from typing import Any, cast

import grpc
import grpc.aio
from google.rpc import error_details_pb2, status_pb2
from tdb import channel
from tdb.dataset.v1 import service_pb2_grpc as dataset_grpc
from tdb.inference.v1 import service_pb2_grpc as inference_grpc

from services.common import calls, errors, tls
from services.common.errors import DeadlineExceeded, FailedPrecondition, TdbError, Unavailable
from services.common.identity import metadata_for
from services.common.settings import Settings
from services.common.status import DETAILS_TRAILER, REQUEST_ID
from services.common.tls import ClientTls
from services.common.tracing import Tracing, Untraced

RETRY_S = 1.0
"""When to come back to a service that cannot be reached and has not said so itself."""

_PASSED_ON = {
    each.code: each
    for each in (
        errors.InvalidArgument,
        errors.NotFound,
        errors.FailedPrecondition,
        errors.ResourceExhausted,
        errors.DeadlineExceeded,
        errors.Unavailable,
        errors.Unimplemented,
        TdbError,
    )
}


class Upstream:
    """Both services. Channels are opened when first used, on the event loop that uses them."""

    def __init__(self, settings: Settings, traces: Tracing | None = None) -> None:
        """Raises SettingsError where the settings do not say where a service is."""
        secured = ClientTls.of(settings)
        traces = traces or Untraced()
        self._dataset = _Service("dataset", settings, settings.dataset_target, secured, traces)
        self._inference = _Service(
            "inference", settings, settings.inference_target, secured, traces
        )

    @cached_property
    def dataset(self) -> "dataset_grpc.DatasetServiceAsyncStub":
        """Its methods, called without metadata or deadline; what they raise is a TdbError."""
        stub: Any = dataset_grpc.DatasetServiceStub
        return cast("dataset_grpc.DatasetServiceAsyncStub", stub(self._dataset))

    @cached_property
    def inference(self) -> "inference_grpc.InferenceServiceAsyncStub":
        """As `dataset`."""
        stub: Any = inference_grpc.InferenceServiceStub
        return cast("inference_grpc.InferenceServiceAsyncStub", stub(self._inference))

    async def close(self) -> None:
        await self._dataset.close()
        await self._inference.close()


class _Service:
    """A channel, as far as stubs need one, whose calls say for whom they are and raise TdbError."""

    def __init__(
        self,
        name: str,
        settings: Settings,
        target: str,
        secured: ClientTls | None,
        traces: Tracing,
    ) -> None:
        self._name = name
        self._settings = settings
        self._target = target
        self._secured = secured
        self._traces = traces

    @cached_property
    def _channel(self) -> grpc.aio.Channel:
        return tls.channel(self._target, channel.options(channel.GONE), self._secured)

    async def close(self) -> None:
        if "_channel" in self.__dict__:
            await self._channel.close()

    def unary_unary(self, path: str, *serializers: Any, **more: Any) -> Any:
        async def call(request: Any) -> Any:
            method: Any = self._channel.unary_unary(path, *serializers, **more)
            try:
                return await method(request, **self._surroundings())
            except grpc.aio.AioRpcError as error:
                raise self._refusal(error) from None

        return call

    def unary_stream(self, path: str, *serializers: Any, **more: Any) -> Any:
        async def call(request: Any) -> AsyncIterator[Any]:
            method: Any = self._channel.unary_stream(path, *serializers, **more)
            streamed = method(request, **self._surroundings())
            try:
                async for message in streamed:
                    yield message
            except grpc.aio.AioRpcError as error:
                raise self._refusal(error) from None
            finally:
                streamed.cancel()

        return call

    def _surroundings(self) -> dict[str, Any]:
        """Metadata and deadline of what is asked."""
        call = calls.current()
        metadata = metadata_for(self._settings, call.user if call else calls.LOCAL_USER)
        if call is not None:
            metadata += [(REQUEST_ID, call.request_id), *self._traces.onward(call)]
        return {"metadata": metadata, "timeout": call.remaining_s() if call else None}

    def _refusal(self, error: grpc.aio.AioRpcError) -> TdbError:
        code = error.code().name
        sentence = error.details() or code
        told = _Told(error)
        if not told.reason:  # none of ours said it: the connection, or what is in between
            if code == "DEADLINE_EXCEEDED":
                return DeadlineExceeded(f"the {self._name} service did not answer in time")
            return Unavailable(
                f"the {self._name} service at {self._target} cannot be reached ({sentence})",
                reason=f"{self._name.upper()}_UNREACHABLE",
                retry_after_s=RETRY_S,
            )
        if code in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
            return FailedPrecondition(
                f"the {self._name} service refuses the explainer service: {sentence} "
                "(TDB_SERVICE_TOKEN is what it is shown)",
                reason=f"{self._name.upper()}_REFUSES",
            )
        refused = _PASSED_ON.get(code, Unavailable)
        if refused in (TdbError, Unavailable):
            sentence = f"the {self._name} service: {sentence}"
        retry_after_s = told.retry_after_s
        if refused is Unavailable and retry_after_s is None:
            retry_after_s = RETRY_S
        return refused(
            sentence,
            field=told.field,
            reason=told.reason,
            metadata=told.metadata,
            retry_after_s=retry_after_s,
        )


class _Told:
    """What a service of ours says beside code and sentence; others give no reason."""

    def __init__(self, error: grpc.aio.AioRpcError) -> None:
        self.field = ""
        self.reason = ""
        self.metadata: dict[str, str] = {}
        self.retry_after_s: float | None = None
        details = dict(error.trailing_metadata() or ()).get(DETAILS_TRAILER, b"")
        assert isinstance(details, bytes)
        for detail in status_pb2.Status.FromString(details).details:
            bad, info = error_details_pb2.BadRequest(), error_details_pb2.ErrorInfo()
            retry = error_details_pb2.RetryInfo()
            if detail.Unpack(bad) and bad.field_violations:
                self.field = bad.field_violations[0].field
            elif detail.Unpack(info):
                self.reason, self.metadata = info.reason, dict(info.metadata)
            elif detail.Unpack(retry):
                self.retry_after_s = retry.retry_delay.ToTimedelta().total_seconds()
