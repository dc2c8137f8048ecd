"""The gRPC face of the explainer service: read the request, ask who does the work, answer."""

import asyncio
import sqlite3
from typing import Any

import grpc.aio
from tdb.explainer.v1 import explanation_pb2, service_pb2

from services.explainer.database import Database
from services.explainer.engine.provider import Provider
from services.explainer.engine.provider_settings import HOW_TO_CONFIGURE
from services.explainer.unbuilt import Unbuilt
from services.explainer.upstream import Upstream

OFFLINE_METHODS = (explanation_pb2.METHOD_TOKEN_PATTERN,)
PROVIDER_METHODS = (
    explanation_pb2.METHOD_TOKEN_ACTIVATION_PAIRS,
    explanation_pb2.METHOD_MAX_ACTIVATION_SUMMARY,
    explanation_pb2.METHOD_CONTRASTIVE,
    explanation_pb2.METHOD_ATTENTION_HEAD,
    explanation_pb2.METHOD_OUTPUT_CENTRED,
)

Context = grpc.aio.ServicerContext[Any, Any]


class ExplainerServicer(Unbuilt):
    """Serves the explanations in `database`, and makes more; None for `provider`: without a
    language model."""

    def __init__(
        self,
        database: Database,
        upstream: Upstream,
        provider: Provider | None,
        *,
        has_embeddings: bool = False,
    ) -> None:
        self._database = database
        self._upstream = upstream
        self._provider = provider
        self._has_embeddings = has_embeddings
        self.stopped = asyncio.Event()
        """Set when the service stops: those who follow a job are let go."""

    async def GetCapabilities(
        self, request: service_pb2.GetCapabilitiesRequest, context: Context
    ) -> service_pb2.GetCapabilitiesResponse:
        provider = self._provider
        return service_pb2.GetCapabilitiesResponse(
            provider=provider.host if provider else "",
            provider_model=provider.model if provider else "",
            has_prices=provider is not None and provider.prices is not None,
            has_embeddings=self._has_embeddings,
            how_to_configure="" if provider else HOW_TO_CONFIGURE,
            methods=(*PROVIDER_METHODS, *OFFLINE_METHODS) if provider else OFFLINE_METHODS,
            explanations=await self._database.read(_count),
        )


def _count(connection: sqlite3.Connection) -> int:
    (count,) = connection.execute("SELECT count(*) FROM explanation").fetchone()
    return int(count)
