"""RPCs of the service that this version does not have yet: each is refused by its name."""

from collections.abc import AsyncIterator
from typing import Any

from tdb.explainer.v1 import service_pb2_grpc

from services.common import calls
from services.common.errors import Unimplemented


class Unbuilt(service_pb2_grpc.ExplainerServiceServicer):
    """Answers UNIMPLEMENTED to all that a class made of it does not answer itself."""

    async def _unary(self, request: Any, context: Any) -> Any:
        raise _refusal()

    async def _stream(self, request: Any, context: Any) -> AsyncIterator[Any]:
        raise _refusal()
        yield  # that it is a stream

    Search = _unary
    ImportExplanations = EmbedExplanations = _stream


def _refusal() -> Unimplemented:
    call = calls.current()
    rpc = call.method.rpartition("/")[2] if call else "this call"
    return Unimplemented(f"{rpc} is not part of this version yet", reason="NOT_BUILT")
