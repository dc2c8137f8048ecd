"""EstimateCost: what a call may cost, before it is made."""

import asyncio
from collections.abc import Sequence

from tdb.explainer.v1 import explain_pb2

from services.common.errors import FailedPrecondition, InvalidArgument, NotFound, inside
from services.explainer import estimates, job_requests, offline_work, requests
from services.explainer.components import Records
from services.explainer.database import Database
from services.explainer.engine.explanations import Explanation, Provenance
from services.explainer.engine.provider import Provider
from services.explainer.engine.provider_settings import HOW_TO_CONFIGURE, ProviderNotConfigured
from services.explainer.estimates import Estimate
from services.explainer.job_run import Skipped
from services.explainer.job_work import Plan, already_explained
from services.explainer.offline_pool import OfflinePool
from services.explainer.scoring import asks_provider, is_pattern
from services.explainer.store import ExplanationStore
from services.explainer.upstream import Upstream

Response = explain_pb2.EstimateCostResponse


class EstimateCalls:
    """Estimates the calls that ask `provider`; all others cost nothing."""

    def __init__(
        self,
        database: Database,
        upstream: Upstream,
        records: Records,
        provider: Provider | None,
        pool: OfflinePool,
    ) -> None:
        self._database = database
        self._store = ExplanationStore(database)
        self._upstream = upstream
        self._records = records
        self._provider = provider
        self._pool = pool

    async def estimate(self, request: explain_pb2.EstimateCostRequest, user: str) -> Response:
        """Raises what the call itself would raise before it asks anybody."""
        match request.WhichOneof("call"):
            case "explain":
                with inside("explain"):
                    return await self._explain(request.explain, user)
            case "score":
                with inside("score"):
                    return await self._score(request.score)
            case "explain_many":
                with inside("explain_many"):
                    return await self._explain_many(request.explain_many, user)
        raise InvalidArgument(
            "say which call: explain, score, explain_many or embed_explanations",
            field="call",
            reason="REQUIRED",
        )

    async def _explain(self, request: explain_pb2.ExplainRequest, user: str) -> Response:
        dataset = requests.dataset(request.dataset)
        task = requests.task(request, user)
        requests.budget(request)
        if not task.asks_provider:
            return Response(components=1)
        provider = self._asked()
        subject = await task.fetch(self._records, dataset, request.component)
        return _response(await estimates.of_explanation(subject, task, provider), provider, 1)

    async def _score(self, request: explain_pb2.ScoreRequest) -> Response:
        with inside("id"):
            id = requests.id(request.id)
        dataset = requests.dataset(request.dataset)
        with inside("scoring"):
            scoring = requests.scoring(request.scoring)
        requests.budget(request)
        stored = await self._store.get(id)
        with inside("scoring"):
            scoring.check(stored.component)
        if not asks_provider(scoring.judge, is_pattern(stored.text)):
            return Response(components=1)
        provider = self._asked()
        subject = await self._records.fetch(dataset, stored.component, read_outs=False)
        seed = scoring.draw_seed(None) if stored.seed is None else stored.seed
        provenance = Provenance(
            method=stored.method, seed=seed, documents=await self._store.documents(id)
        )
        explanation = Explanation(stored.component, stored.text, provenance)
        found = await estimates.of_scores(
            explanation, explanation, subject, None, scoring, provider
        )
        return _response(found, provider, 1)

    async def _explain_many(self, request: explain_pb2.ExplainManyRequest, user: str) -> Response:
        plan = job_requests.wanted(request, user)
        if plan.task.asks_provider:
            provider = self._asked()
        components = await job_requests.components(request, plan.task, self._upstream)
        if not plan.task.asks_provider:
            return Response(components=len(components))
        left = await self._left(plan, components)
        sample = await asyncio.gather(
            *(self._of_one(plan, each, provider) for each in estimates.spread(left))
        )
        return _response(estimates.of_many(sample, len(left)), provider, len(components))

    async def _left(self, plan: Plan, components: Sequence[str]) -> list[str]:
        """Those that will not be skipped because they have such an explanation."""
        if plan.again:
            return list(components)
        dataset = await self._records.dataset(plan.dataset)
        known = await self._database.read(
            lambda connection: already_explained(connection, plan.task, dataset, components)
        )
        return [each for each in components if each not in known]

    async def _of_one(self, plan: Plan, component: str, provider: Provider) -> Estimate:
        """Nothing where the component will be skipped, or fail."""
        task = plan.task
        try:
            subject = await plan.fetch(self._records, component)
            least = plan.gate.min_pattern_auc
            if least is not None:
                auc = await self._pool.run(offline_work.pattern_auc, subject.component, task.seed)
                if auc < least:
                    return Estimate()
            return await estimates.of_explanation(subject, task, provider)
        except Skipped:
            return Estimate()
        except (FailedPrecondition, NotFound) as error:
            if error.field == "dataset":
                raise
            return Estimate()

    def _asked(self) -> Provider:
        if self._provider is None:
            raise ProviderNotConfigured(HOW_TO_CONFIGURE)
        return self._provider


def _response(found: Estimate, provider: Provider, components: int) -> Response:
    prices = provider.prices
    asks = found.calls > 0
    return Response(
        calls=found.calls,
        expected_tokens=found.expected.tokens,
        most_tokens=found.most.tokens,
        expected_cost=found.expected.cost(prices) if prices else None,
        most_cost=found.most.cost(prices) if prices else None,
        provider=provider.host if asks else "",
        provider_model=provider.model if asks else "",
        components=components,
    )
