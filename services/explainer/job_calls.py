"""The calls about jobs, in the API's messages: what the servicer hands on."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from tdb.explainer.v1 import explain_pb2, job_pb2

from services.common.errors import InvalidArgument
from services.explainer import job_requests, job_wire
from services.explainer.components import Records
from services.explainer.database import Database
from services.explainer.engine.budget import Prices
from services.explainer.engine.provider import Provider
from services.explainer.job_ledger import JobLedger
from services.explainer.job_run import Item, JobEnd, JobView
from services.explainer.job_store import JobStore, StoredJob
from services.explainer.job_work import JobWork
from services.explainer.jobs import Jobs, Tools
from services.explainer.offline_pool import OfflinePool
from services.explainer.scoring import Steering
from services.explainer.upstream import Upstream


class JobCalls:
    """ExplainMany and what follows it. `start` goes on with what an earlier process left."""

    def __init__(
        self,
        database: Database,
        upstream: Upstream,
        records: Records,
        provider: Provider | None,
        pool: OfflinePool,
        steering: Steering | None = None,
    ) -> None:
        self._database = database
        self._upstream = upstream
        self._records = records
        self._provider = provider
        self._steering = steering
        self._store = JobStore(database)
        self._pool = pool
        self._jobs = Jobs(self._store, self._equip)
        self._grace_s = 0.0
        self._watching: asyncio.Task[None] | None = None

    async def start(self, stopped: asyncio.Event, grace_s: float) -> None:
        """Once `stopped` is set, what is on its way has `grace_s` to end."""
        self._grace_s = grace_s
        await self._jobs.start()
        self._watching = asyncio.ensure_future(self._close_at(stopped))

    async def _close_at(self, stopped: asyncio.Event) -> None:
        await stopped.wait()
        await self._jobs.close(self._grace_s)

    async def close(self) -> None:
        await self._jobs.close(self._grace_s)
        if self._watching:
            self._watching.cancel()

    async def explain_many(
        self, request: explain_pb2.ExplainManyRequest, user: str
    ) -> AsyncGenerator[job_pb2.ExplainManyResponse, None]:
        plan = job_requests.plan(request, user, self._provider)
        components = await job_requests.components(request, plan.task, self._upstream)
        id = await self._jobs.ask(job_requests.to_text(request), user, components)
        following = self.follow(job_pb2.FollowJobRequest(id=id))
        async with aclosing(following):
            async for each in following:
                yield job_pb2.ExplainManyResponse.FromString(each.SerializeToString())

    async def follow(
        self, request: job_pb2.FollowJobRequest
    ) -> AsyncGenerator[job_pb2.FollowJobResponse, None]:
        async with aclosing(self._jobs.follow(_id(request.id))) as following:
            async for said in following:
                if isinstance(said, Item):
                    yield job_pb2.FollowJobResponse(item=job_wire.item(said))
                elif isinstance(said, JobEnd):
                    yield job_pb2.FollowJobResponse(summary=self._job(said))
                else:
                    yield job_pb2.FollowJobResponse(progress=self._job(said))

    async def get(self, request: job_pb2.GetJobRequest) -> job_pb2.GetJobResponse:
        view = await self._jobs.get(_id(request.id))
        components = await self._store.components(view.job.number)
        return job_pb2.GetJobResponse(job=self._job(view, components))

    async def list(self, request: job_pb2.ListJobsRequest) -> job_pb2.ListJobsResponse:
        return job_pb2.ListJobsResponse(jobs=[self._job(each) for each in await self._jobs.list()])

    async def pause(self, request: job_pb2.PauseJobRequest) -> job_pb2.PauseJobResponse:
        return job_pb2.PauseJobResponse(job=self._job(await self._jobs.pause(_id(request.id))))

    async def resume(self, request: job_pb2.ResumeJobRequest) -> job_pb2.ResumeJobResponse:
        id = _id(request.id)
        changed = None
        if request.HasField("budget"):
            stored = await self._store.get(id)
            changed = job_requests.with_budget(stored.request, request.budget)
        return job_pb2.ResumeJobResponse(job=self._job(await self._jobs.resume(id, changed)))

    async def cancel(self, request: job_pb2.CancelJobRequest) -> job_pb2.CancelJobResponse:
        return job_pb2.CancelJobResponse(job=self._job(await self._jobs.cancel(_id(request.id))))

    def _job(self, view: JobView, components: Sequence[str] = ()) -> job_pb2.Job:
        return job_wire.job(view, self._prices, components)

    @property
    def _prices(self) -> Prices | None:
        return self._provider.prices if self._provider else None

    def _equip(self, job: StoredJob) -> Tools:
        plan = job_requests.stored_plan(job.request, job.user, self._provider)
        asks = plan.task.asks_provider
        return Tools(
            JobLedger.of(job, self._store, plan.budget, self._prices),
            JobWork(
                job,
                plan,
                self._database,
                self._records,
                self._pool,
                self._provider if asks else None,
                self._steering,
            ),
            "provider" if asks else "processors",
            self._provider.at_once if asks and self._provider else self._pool.at_once,
        )


def _id(given: str) -> str:
    """Raises InvalidArgument."""
    if not given:
        raise InvalidArgument("the id of a job is required", field="id", reason="REQUIRED")
    return given
