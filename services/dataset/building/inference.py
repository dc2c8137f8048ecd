"""The inference service as a build needs it: the model, tokens of texts, states of segments.

Calls block, in the build's own thread. While the service is away, loading or full, they wait and
try again, for ever; what waiting cannot mend is raised as it was refused. The caller is who asked
for the build.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from tdb import channel
from tdb.inference.v1 import (
    harvest_pb2,
    manifest_pb2,
    model_pb2,
    output_tokens_pb2,
    service_pb2_grpc,
)
from tdb.type.v1 import token_pb2

from services.common import errors
from services.common.errors import Cancelled, FailedPrecondition, TdbError, Unavailable
from services.common.harvest import wire
from services.common.harvest.state import Keep, State
from services.common.identity import metadata_for
from services.common.settings import Settings
from services.common.tls import ClientTls
from services.dataset.building.output_tokens import OutputTokens
from services.dataset.building.sequences import CorpusSequence

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 10.0
PATIENCE_S = 120.0
"""How long a call that is answered at once may take; a harvest says something every batch."""

Result = TypeVar("Result")
_PASSES = {"UNAVAILABLE", "RESOURCE_EXHAUSTED", "CANCELLED", "DEADLINE_EXCEEDED", "UNKNOWN"}
_CLASSES = {
    each.code: each
    for each in (
        errors.InvalidArgument,
        errors.NotFound,
        errors.FailedPrecondition,
        errors.Unauthenticated,
        errors.PermissionDenied,
        errors.Unimplemented,
    )
}


class Stop:
    """Whether a build is to stop, and the call that it waits in meanwhile."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._lock = threading.Lock()
        self._call: Any = None

    def set(self) -> None:
        with self._lock:
            self._event.set()
            call = self._call
        if call is not None:
            call.cancel()

    @property
    def is_set(self) -> bool:
        return self._event.is_set()

    def check(self) -> None:
        """Raises Cancelled."""
        if self._event.is_set():
            raise Cancelled("the build was stopped")

    def wait(self, seconds: float) -> None:
        """Raises Cancelled when told to stop meanwhile."""
        self._event.wait(seconds)
        self.check()

    @contextmanager
    def during(self, call: Any) -> Iterator[None]:
        with self._lock:
            self._call = call
            stopped = self._event.is_set()
        if stopped:
            call.cancel()
        try:
            yield
        finally:
            with self._lock:
                self._call = None


class Inference:
    """A connection for one build. `waiting` hears what is waited for, and "" when it goes on."""

    def __init__(
        self, settings: Settings, user: str, stop: Stop, waiting: Callable[[str], None]
    ) -> None:
        """Raises SettingsError where the settings name no inference service."""
        tls = ClientTls.of(settings)
        options = channel.options(channel.GONE)
        target = settings.inference_target
        self._channel = (
            grpc.secure_channel(target, tls.credentials(), [*options, *tls.options()])
            if tls
            else grpc.insecure_channel(target, options)
        )
        self._stub: Any = service_pb2_grpc.InferenceServiceStub(self._channel)
        self._metadata = metadata_for(settings, user)
        self._stop = stop
        self._waiting = waiting

    def close(self) -> None:
        self._channel.close()

    def model(self, name: str) -> model_pb2.GetModelResponse:
        request = model_pb2.GetModelRequest(model=name)
        found: model_pb2.GetModelResponse = self._patiently(
            lambda: self._unary(self._stub.GetModel, request)
        )
        return found

    def tokenize(self, model: str, texts: Sequence[str]) -> list[Sequence[int]]:
        request = model_pb2.TokenizeRequest(model=model, documents=texts)
        response = self._patiently(lambda: self._unary(self._stub.Tokenize, request))
        return [each.ids for each in response.documents]

    def texts(self, model: str, ids: Sequence[int]) -> list[str]:
        """What tokens are shown as."""
        prompt = token_pb2.Prompt(token_ids=token_pb2.TokenIds(ids=ids))
        request = model_pb2.TokenizeRequest(model=model, prompt=prompt)
        response = self._patiently(lambda: self._unary(self._stub.Tokenize, request))
        return [each.text for each in response.tokens]

    def harvest(
        self,
        request: harvest_pb2.HarvestRequest,
        sequences: Sequence[CorpusSequence],
        keep: Keep,
        progress: Callable[[int], None],
        take: Callable[[State], None],
    ) -> harvest_pb2.HarvestSummary:
        """Harvests a segment. `progress` hears tokens done; `take` gets the state of each group,
        all of them once more where the call had to be repeated."""
        whole = harvest_pb2.HarvestRequest()
        whole.CopyFrom(request)
        for each in sequences:
            whole.sequences.add(index=each.index, ids=each.ids)
        return self._patiently(lambda: self._harvest(whole, keep, progress, take))

    def _harvest(
        self,
        request: harvest_pb2.HarvestRequest,
        keep: Keep,
        progress: Callable[[int], None],
        take: Callable[[State], None],
    ) -> harvest_pb2.HarvestSummary:
        call = self._stub.Harvest(request, metadata=self._metadata)
        incoming: wire.Incoming | None = None
        with self._stop.during(call):
            for response in call:
                match response.WhichOneof("event"):
                    case "progress":
                        self._waiting("")
                        progress(response.progress.done)
                    case "state":
                        incoming = wire.Incoming(response.state, keep)
                    case "chunk":
                        assert incoming is not None
                        incoming.add(response.chunk)
                    case "summary":
                        return harvest_pb2.HarvestSummary.FromString(
                            response.summary.SerializeToString()
                        )
                if incoming is not None and incoming.is_whole:
                    take(incoming.state())
                    incoming = None
        raise Unavailable("the inference service ended a harvest too early")

    def output_tokens(
        self, model: str, group: str, first: int, count: int, tokens: int
    ) -> tuple[OutputTokens, manifest_pb2.Manifest]:
        """What `count` components of a group promote and suppress, and of which weights that is."""
        request = output_tokens_pb2.StreamOutputTokensRequest(
            model=model, group=group, first=first, count=count, tokens=tokens
        )
        return self._patiently(lambda: self._output_tokens(request))

    def _output_tokens(
        self, request: output_tokens_pb2.StreamOutputTokensRequest
    ) -> tuple[OutputTokens, manifest_pb2.Manifest]:
        call = self._stub.StreamOutputTokens(request, metadata=self._metadata)
        blocks: list[output_tokens_pb2.OutputTokens] = []
        with self._stop.during(call):
            for response in call:
                match response.WhichOneof("event"):
                    case "tokens":
                        blocks.append(response.tokens)
                    case "summary":
                        return OutputTokens.joined(blocks), response.summary.manifest
        raise Unavailable("the inference service ended a read-out too early")

    def _unary(self, method: Any, request: Any) -> Any:
        call = method.future(request, metadata=self._metadata, timeout=PATIENCE_S)
        with self._stop.during(call):
            return call.result()

    def _patiently(self, ask: Callable[[], Result]) -> Result:
        pause = FIRST_PAUSE_S
        while True:
            self._stop.check()
            try:
                result = ask()
            except (grpc.RpcError, grpc.FutureCancelledError, Unavailable) as error:
                self._stop.check()
                refusal = _refusal(error)
                if not isinstance(refusal, Unavailable):
                    raise refusal from None
                self._waiting(refusal.message)
                self._stop.wait(refusal.retry_after_s or pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
            else:
                self._waiting("")
                return result


def _refusal(error: Exception) -> TdbError:
    """What was refused, as Unavailable where it may pass."""
    if isinstance(error, Unavailable):
        return error
    if isinstance(error, grpc.FutureCancelledError):
        return Unavailable("the inference service cancelled a call")
    code = error.code().name  # type: ignore[attr-defined]
    details = error.details() or code  # type: ignore[attr-defined]
    if code in _PASSES:
        return Unavailable(f"the inference service: {details}", retry_after_s=_retry_after(error))
    if code in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
        details += " (TDB_SERVICE_TOKEN is what the dataset service shows it)"
    refused = _CLASSES.get(code, FailedPrecondition)
    return refused(f"the inference service refused: {details}")


def _retry_after(error: Exception) -> float | None:
    status = rpc_status.from_call(error)
    info = error_details_pb2.RetryInfo()
    for detail in status.details if status else ():
        if detail.Unpack(info):
            return min(LONGEST_PAUSE_S, info.retry_delay.ToTimedelta().total_seconds()) or None
    return None
