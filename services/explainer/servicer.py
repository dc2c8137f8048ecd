"""The gRPC face of the explainer service: read the request, ask who does the work, answer."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc.aio
from tdb.explainer.v1 import (
    explain_pb2,
    explanation_pb2,
    job_pb2,
    search_pb2,
    service_pb2,
    service_pb2_grpc,
)

from services.common.errors import inside
from services.explainer.components import Records
from services.explainer.database import Database
from services.explainer.engine.embeddings import Embeddings
from services.explainer.engine.provider import Provider
from services.explainer.engine.provider_settings import HOW_TO_CONFIGURE
from services.explainer.estimate_calls import EstimateCalls
from services.explainer.explanation_calls import ExplanationCalls, user
from services.explainer.job_calls import JobCalls
from services.explainer.making_calls import MakingCalls
from services.explainer.offline_pool import OfflinePool
from services.explainer.scoring import Steering
from services.explainer.search_calls import SearchCalls
from services.explainer.store import ExplanationStore
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


class ExplainerServicer(service_pb2_grpc.ExplainerServiceServicer):
    """Serves the explanations in `database`, and makes more; None for `provider`: without a
    language model, for `steering`: without the intervention score, for `embeddings`: without
    search by meaning."""

    def __init__(
        self,
        database: Database,
        upstream: Upstream,
        provider: Provider | None,
        *,
        steering: Steering | None = None,
        embeddings: Embeddings | None = None,
    ) -> None:
        self._database = database
        self._store = ExplanationStore(database)
        self._provider = provider
        self._explanations = ExplanationCalls(self._store)
        records = Records(upstream)
        self._making = MakingCalls(self._store, records, provider, steering)
        self._pool = OfflinePool()
        self._jobs = JobCalls(database, upstream, records, provider, self._pool, steering)
        self._estimates = EstimateCalls(database, upstream, records, provider, self._pool)
        self._searching = SearchCalls(database, upstream, records, embeddings)
        self._embeddings = embeddings

    async def start(self, stopped: asyncio.Event, grace_s: float) -> None:
        """Goes on with the jobs that an earlier process left. Once `stopped` is set, those who
        follow a job are let go, and what jobs have under way has `grace_s` to end."""
        await self._jobs.start(stopped, grace_s)

    async def close(self) -> None:
        """The jobs go on when the service is back."""
        await self._jobs.close()
        self._pool.close()

    async def GetCapabilities(
        self, request: service_pb2.GetCapabilitiesRequest, context: Context
    ) -> service_pb2.GetCapabilitiesResponse:
        provider, embeddings = self._provider, self._embeddings
        return service_pb2.GetCapabilitiesResponse(
            provider=provider.host if provider else "",
            provider_model=provider.model if provider else "",
            has_prices=provider is not None and provider.prices is not None,
            has_embeddings=embeddings is not None,
            embedding_provider=embeddings.host if embeddings else "",
            embedding_model=embeddings.model if embeddings else "",
            how_to_configure="" if provider else HOW_TO_CONFIGURE,
            methods=(*PROVIDER_METHODS, *OFFLINE_METHODS) if provider else OFFLINE_METHODS,
            explanations=await self._store.count(),
        )

    async def ListExplanations(
        self, request: explanation_pb2.ListExplanationsRequest, context: Context
    ) -> explanation_pb2.ListExplanationsResponse:
        return await self._explanations.list(request)

    async def GetExplanation(
        self, request: explanation_pb2.GetExplanationRequest, context: Context
    ) -> explanation_pb2.GetExplanationResponse:
        return await self._explanations.get(request)

    async def WriteExplanation(
        self, request: explanation_pb2.WriteExplanationRequest, context: Context
    ) -> explanation_pb2.WriteExplanationResponse:
        return await self._explanations.write(request)

    async def RateExplanation(
        self, request: explanation_pb2.RateExplanationRequest, context: Context
    ) -> explanation_pb2.RateExplanationResponse:
        return await self._explanations.rate(request)

    async def DeleteExplanation(
        self, request: explanation_pb2.DeleteExplanationRequest, context: Context
    ) -> explanation_pb2.DeleteExplanationResponse:
        return await self._explanations.delete(request)

    async def Explain(
        self, request: explain_pb2.ExplainRequest, context: Context
    ) -> AsyncIterator[explain_pb2.ExplainResponse]:
        await self._database.check_room()
        async with aclosing(self._making.explain(request)) as responses:
            async for response in responses:
                yield response

    async def Score(
        self, request: explain_pb2.ScoreRequest, context: Context
    ) -> AsyncIterator[explain_pb2.ScoreResponse]:
        await self._database.check_room()
        async with aclosing(self._making.score(request)) as responses:
            async for response in responses:
                yield response

    async def Simulate(
        self, request: explain_pb2.SimulateRequest, context: Context
    ) -> explain_pb2.SimulateResponse:
        return await self._making.simulate(request)

    async def EstimateCost(
        self, request: explain_pb2.EstimateCostRequest, context: Context
    ) -> explain_pb2.EstimateCostResponse:
        if request.HasField("embed_explanations"):
            with inside("embed_explanations"):
                return await self._searching.estimate(request.embed_explanations)
        return await self._estimates.estimate(request, user())

    async def ExplainMany(
        self, request: explain_pb2.ExplainManyRequest, context: Context
    ) -> AsyncIterator[job_pb2.ExplainManyResponse]:
        await self._database.check_room()
        async with aclosing(self._jobs.explain_many(request, user())) as responses:
            async for response in responses:
                yield response

    async def FollowJob(
        self, request: job_pb2.FollowJobRequest, context: Context
    ) -> AsyncIterator[job_pb2.FollowJobResponse]:
        async with aclosing(self._jobs.follow(request)) as responses:
            async for response in responses:
                yield response

    async def GetJob(
        self, request: job_pb2.GetJobRequest, context: Context
    ) -> job_pb2.GetJobResponse:
        return await self._jobs.get(request)

    async def ListJobs(
        self, request: job_pb2.ListJobsRequest, context: Context
    ) -> job_pb2.ListJobsResponse:
        return await self._jobs.list(request)

    async def PauseJob(
        self, request: job_pb2.PauseJobRequest, context: Context
    ) -> job_pb2.PauseJobResponse:
        return await self._jobs.pause(request)

    async def ResumeJob(
        self, request: job_pb2.ResumeJobRequest, context: Context
    ) -> job_pb2.ResumeJobResponse:
        await self._database.check_room()
        return await self._jobs.resume(request)

    async def CancelJob(
        self, request: job_pb2.CancelJobRequest, context: Context
    ) -> job_pb2.CancelJobResponse:
        return await self._jobs.cancel(request)

    async def Search(
        self, request: search_pb2.SearchRequest, context: Context
    ) -> search_pb2.SearchResponse:
        return await self._searching.find(request)

    async def EmbedExplanations(
        self, request: search_pb2.EmbedExplanationsRequest, context: Context
    ) -> AsyncIterator[search_pb2.EmbedExplanationsResponse]:
        async with aclosing(self._searching.embed(request)) as responses:
            async for response in responses:
                yield response

    async def ImportExplanations(
        self, request: search_pb2.ImportExplanationsRequest, context: Context
    ) -> AsyncIterator[search_pb2.ImportExplanationsResponse]:
        async with aclosing(self._searching.import_explanations(request)) as responses:
            async for response in responses:
                yield response
