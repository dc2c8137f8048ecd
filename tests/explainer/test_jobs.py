"""How jobs run, whatever they do with a component: order, shares, waiting, pausing, restarts."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from services.common.errors import FailedPrecondition, NotFound, ResourceExhausted, Unavailable
from services.explainer import job_run
from services.explainer.database import STORE_FULL, Database
from services.explainer.engine.budget import Budget, BudgetExceeded, Usage
from services.explainer.engine.provider_settings import ProviderMisconfigured
from services.explainer.job_ledger import EndpointAway, JobLedger
from services.explainer.job_run import Item, JobView, Skipped
from services.explainer.job_store import ComponentState, Dealt, JobState, JobStore, StoredJob
from services.explainer.jobs import Jobs, Tools

DONE = Dealt(ComponentState.EXPLAINED, "some-id")


class Bench:
    """Jobs whose work each test decides: `act` is called for each component."""

    def __init__(self, folder: Path) -> None:
        self.database = Database(folder / "explanations.sqlite3", 2**30)
        self.store = JobStore(self.database)
        self.act: Callable[[str, JobLedger], Dealt | None] = lambda component, ledger: None
        self.budget = Budget()
        self.at_once = 3
        self.changed = asyncio.Condition()
        self.gate = asyncio.Event()
        self.gate.set()
        self.begun: list[str] = []
        self.ledgers: list[JobLedger] = []
        self.tolerant: set[str] = set()
        self.at_work: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.waits = 0
        self.work: type[_Work] = _Work
        self.jobs = Jobs(self.store, self.equip)

    def equip(self, job: StoredJob) -> Tools:
        ledger = JobLedger.of(job, self.store, self.budget, None)
        self.ledgers.append(ledger)
        return Tools(ledger, self.work(self, job), "here", self.at_once)

    async def ask(self, count: int = 5, *, user: str = "ada") -> str:
        return await self.jobs.ask("{}", user, [f"neuron.0.{number}" for number in range(count)])

    async def until(self, id: str, *states: JobState) -> JobView:
        async for said in self.jobs.follow(id):
            if isinstance(said, JobView) and said.job.state in states:
                return said
        raise AssertionError(f"it was never {states}")

    async def has_begun(self, count: int) -> None:
        async with self.changed:
            await self.changed.wait_for(lambda: len(self.begun) >= count)

    async def has_waited(self, count: int) -> None:
        async with self.changed:
            await self.changed.wait_for(lambda: self.waits >= count)

    async def end(self, id: str) -> JobView:
        async for said in self.jobs.follow(id):
            last = said
        assert isinstance(last, JobView)
        return last


class _Work:
    def __init__(self, bench: Bench, job: StoredJob) -> None:
        self._bench = bench
        self._job = job

    async def __call__(
        self, position: int, component: str, ledger: JobLedger, *, tolerant: bool
    ) -> tuple[Dealt, str]:
        bench, user = self._bench, self._job.user
        bench.begun.append(component)
        if tolerant:
            bench.tolerant.add(component)
        bench.at_work[user] += 1
        bench.most[user] = max(bench.most[user], bench.at_work[user])
        try:
            async with bench.changed:
                bench.changed.notify_all()
            await bench.gate.wait()
            await asyncio.sleep(0)
            if tolerant:
                raise FailedPrecondition("unavailable", reason="UNAVAILABLE")
            dealt = bench.act(component, ledger) or DONE
            await bench.store.deal(self._job.number, position, dealt, ledger.used_at_most)
            return dealt, f"about {component}"
        finally:
            bench.at_work[user] -= 1

    def go_on(self) -> None:
        self._bench.waits += 1


@asynccontextmanager
async def opened(folder: Path) -> AsyncIterator[Bench]:
    bench = Bench(folder)
    await bench.jobs.start()
    try:
        yield bench
    finally:
        bench.gate.set()
        await bench.jobs.close(5)
        bench.database.close()


@pytest.fixture(autouse=True)
def no_long_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_run, "FIRST_PAUSE_S", 0.01)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with opened(tmp_path) as made:
        yield made


async def test_a_job_says_all_that_it_does(bench: Bench) -> None:
    def act(component: str, ledger: JobLedger) -> Dealt | None:
        ledger.spend(Usage(10, 2))
        match component:
            case "neuron.0.1":
                raise Skipped("NEVER_ACTIVE")
            case "neuron.0.2":
                raise FailedPrecondition("no", reason="RECORD_UNREADABLE")
            case "neuron.0.3":
                raise ValueError("a bug")
        return None

    bench.act = act
    said = [each async for each in bench.jobs.follow(await bench.ask())]
    items = {each.component: each for each in said if isinstance(each, Item)}
    assert items == {
        "neuron.0.0": Item("neuron.0.0", "some-id", "about neuron.0.0"),
        "neuron.0.1": Item("neuron.0.1", reason="NEVER_ACTIVE"),
        "neuron.0.2": Item("neuron.0.2", reason="RECORD_UNREADABLE"),
        "neuron.0.3": Item("neuron.0.3", reason="INTERNAL"),
        "neuron.0.4": Item("neuron.0.4", "some-id", "about neuron.0.4"),
    }
    last = said[-1]
    assert isinstance(said[0], JobView)
    assert isinstance(last, JobView)
    assert last.job.state is JobState.DONE
    assert (last.job.used.calls, last.job.used.tokens, last.tokens) == (5, 60, 60)
    # What is stored says the same.
    stored = await bench.store.get(last.job.id)
    assert stored == last.job
    assert [stored.counts[state] for state in ComponentState] == [0, 2, 1, 2]
    assert stored.reasons == {"NEVER_ACTIVE": 1, "RECORD_UNREADABLE": 1, "INTERNAL": 1}


async def test_the_forecast_is_from_what_is_done(bench: Bench) -> None:
    bench.act = lambda component, ledger: ledger.spend(Usage(100, 0))
    bench.at_once = 1
    id = await bench.ask(10)
    async for said in bench.jobs.follow(id):
        if isinstance(said, Item) and said.component == "neuron.0.1":
            bench.gate.clear()
            view = await bench.jobs.get(id)
            assert view.tokens == 1000
            assert view.rate is not None
            assert view.seconds_left == pytest.approx(8 / view.rate, rel=0.5)
            break
    bench.gate.set()
    assert (await bench.end(id)).tokens == 1000


async def test_pausing_lets_what_is_on_its_way_end(bench: Bench) -> None:
    bench.gate.clear()
    id = await bench.ask(10)
    await bench.has_begun(3)
    await bench.jobs.pause(id)
    bench.gate.set()
    view = await bench.end(id)
    assert view.job.state is JobState.PAUSED
    assert view.job.counts[ComponentState.EXPLAINED] == 3
    with pytest.raises(FailedPrecondition, match="nothing to pause"):
        await bench.jobs.pause(id)
    await bench.jobs.resume(id)
    assert (await bench.end(id)).job.counts[ComponentState.EXPLAINED] == 10
    assert Counter(bench.begun) == Counter(f"neuron.0.{number}" for number in range(10))


async def test_cancelling_waits_for_nothing_and_keeps_what_is_done(bench: Bench) -> None:
    bench.at_once = 1
    id = await bench.ask(10)
    async for said in bench.jobs.follow(id):
        if isinstance(said, Item):
            bench.gate.clear()
            await bench.jobs.cancel(id)
    view = await bench.jobs.get(id)
    assert view.job.state is JobState.CANCELLED
    assert 1 <= view.job.counts[ComponentState.EXPLAINED] < 10
    for call in (bench.jobs.cancel(id), bench.jobs.resume(id), bench.jobs.pause(id)):
        with pytest.raises(FailedPrecondition, match="cancelled"):
            await call


async def test_jobs_of_one_user_wait_and_those_of_two_share(bench: Bench) -> None:
    bench.at_once = 4
    bench.gate.clear()
    first, second = await bench.ask(8), await bench.ask(8)
    other = await bench.ask(8, user="bob")
    await bench.until(other, JobState.RUNNING)
    await bench.has_begun(4 + 2)
    assert (await bench.jobs.get(second)).job.state is JobState.QUEUED
    assert bench.at_work == {"ada": 4, "bob": 2}, "bob came later and took a half"
    bench.most.clear()
    bench.gate.set()
    for id in (first, second, other):
        assert (await bench.end(id)).job.state is JobState.DONE
    listed = [each.job for each in await bench.jobs.list()]
    assert [(each.id, each.user) for each in listed] == [
        (other, "bob"), (second, "ada"), (first, "ada"),
    ]  # fmt: skip


async def test_a_job_that_waits_in_the_queue_can_be_paused_and_cancelled(bench: Bench) -> None:
    bench.gate.clear()
    first, second, third = await bench.ask(), await bench.ask(), await bench.ask()
    assert (await bench.jobs.pause(second)).job.state is JobState.PAUSED
    assert (await bench.jobs.cancel(third)).job.state is JobState.CANCELLED
    bench.gate.set()
    await bench.end(first)
    assert len(bench.begun) == 5
    await bench.jobs.resume(second)
    assert (await bench.end(second)).job.state is JobState.DONE
    assert (await bench.jobs.get(third)).job.state is JobState.CANCELLED


@pytest.mark.parametrize(
    "error",
    [
        EndpointAway("the endpoint is away"),
        Unavailable("the dataset service is away"),
        ResourceExhausted("the device is busy", retry_after_s=5),
        FailedPrecondition("the store is full", reason=STORE_FULL),
    ],
)
async def test_what_is_away_is_waited_for(bench: Bench, error: Exception) -> None:
    away = 4

    def act(component: str, ledger: JobLedger) -> None:
        nonlocal away
        if component != "neuron.0.0" and away:
            away -= 1
            raise error

    bench.act = act
    id = await bench.ask(20)
    seen = [
        each.job for each in [v async for v in bench.jobs.follow(id)] if isinstance(each, JobView)
    ]
    assert str(error) in [each.message for each in seen if each.state is JobState.WAITING]
    assert seen[-1].state is JobState.DONE
    assert seen[-1].message == ""
    assert seen[-1].counts[ComponentState.EXPLAINED] == 20
    assert bench.waits >= 1


async def test_while_something_is_away_one_component_finds_out(bench: Bench) -> None:
    def act(component: str, ledger: JobLedger) -> None:
        raise EndpointAway("away")

    bench.act = act
    id = await bench.ask(20)
    await bench.until(id, JobState.WAITING)
    bench.most.clear()
    await bench.has_waited(4)
    assert bench.most == {"ada": 1}
    await bench.jobs.pause(id)
    assert (await bench.end(id)).job.state is JobState.PAUSED
    bench.act = lambda component, ledger: None
    await bench.jobs.resume(id)
    assert (await bench.end(id)).job.counts[ComponentState.EXPLAINED] == 20


async def test_a_component_that_alone_finds_it_away_fails(bench: Bench) -> None:
    def act(component: str, ledger: JobLedger) -> None:
        if component == "neuron.0.3":
            raise EndpointAway("away")

    bench.act = act
    view = await bench.end(await bench.ask(12))
    assert view.job.state is JobState.DONE
    assert view.job.counts[ComponentState.EXPLAINED] == 11
    assert view.job.reasons == {"UNAVAILABLE": 1}
    assert bench.begun.count("neuron.0.3") == 4
    assert bench.tolerant == {"neuron.0.3"}


@pytest.mark.parametrize(
    "error",
    [
        ProviderMisconfigured("the endpoint does not accept the key"),
        NotFound("there is no dataset", field="dataset"),
    ],
)
async def test_what_befalls_every_component_ends_the_job(bench: Bench, error: Exception) -> None:
    def act(component: str, ledger: JobLedger) -> None:
        if component != "neuron.0.0":
            raise error

    bench.act = act
    id = await bench.ask(20)
    view = await bench.end(id)
    assert (view.job.state, view.job.message) == (JobState.FAILED, str(error))
    assert view.job.counts[ComponentState.FAILED] == 0, "none of them is given up"
    assert len(bench.begun) <= 4
    bench.act = lambda component, ledger: None
    await bench.jobs.resume(id)
    view = await bench.end(id)
    assert (view.job.state, view.job.message) == (JobState.DONE, "")
    assert view.job.counts[ComponentState.EXPLAINED] == 20


async def test_a_component_that_is_not_in_the_dataset_is_one_that_failed(bench: Bench) -> None:
    def act(component: str, ledger: JobLedger) -> None:
        raise NotFound("no record", field="component")

    bench.act = act
    view = await bench.end(await bench.ask(3))
    assert view.job.state is JobState.DONE
    assert view.job.reasons == {"NOT_FOUND": 3}


async def test_a_job_without_budget_goes_on_with_a_larger_one(bench: Bench) -> None:
    async def spend(ledger: JobLedger) -> None:
        async with ledger.reserve(Usage(100, 0)):
            ledger.spend(Usage(60, 0))

    budget = Budget(max_tokens=250)
    bench.budget = budget

    class Spending(_Work):
        async def __call__(
            self, position: int, component: str, ledger: JobLedger, *, tolerant: bool
        ) -> tuple[Dealt, str]:
            await spend(ledger)
            return await super().__call__(position, component, ledger, tolerant=tolerant)

    bench.work = Spending
    id = await bench.ask(10)
    view = await bench.end(id)
    assert view.job.state is JobState.OUT_OF_BUDGET
    assert "250 tokens" in view.job.message
    assert (view.job.used.tokens, view.job.counts[ComponentState.EXPLAINED]) == (180, 3)
    bench.budget = Budget(max_tokens=10_000)
    await bench.jobs.resume(id, '{"more": 1}')
    view = await bench.end(id)
    assert (view.job.state, view.job.used.tokens) == (JobState.DONE, 600)
    assert (await bench.store.get(id)).request == '{"more": 1}'


async def test_jobs_go_on_after_a_restart(tmp_path: Path) -> None:
    async with opened(tmp_path) as first:
        first.act = lambda component, ledger: ledger.spend(Usage(7, 0))
        running, queued, paused = await first.ask(10), await first.ask(), await first.ask()
        await first.jobs.pause(paused)
        async for said in first.jobs.follow(running):
            if isinstance(said, Item):
                first.gate.clear()
                break
        follower = asyncio.ensure_future(first.end(queued))
        await asyncio.sleep(0)
        closing = asyncio.ensure_future(first.jobs.close(0.01))
        with pytest.raises(Unavailable, match="goes on when it is back"):
            await follower
        await closing
    async with opened(tmp_path) as second:
        second.act = lambda component, ledger: ledger.spend(Usage(7, 0))
        view = await second.end(running)
        assert (view.job.state, view.job.used.tokens) == (JobState.DONE, 70)
        assert (await second.end(queued)).job.state is JobState.DONE
        assert (await second.jobs.get(paused)).job.state is JobState.PAUSED
        dealt = [*first.begun, *second.begun]
        assert len(await second.jobs.list()) == 3
    assert set(dealt) == {f"neuron.0.{number}" for number in range(10)}


@pytest.mark.parametrize(
    ("wish", "state"), [("pause", JobState.PAUSED), ("cancel", JobState.CANCELLED)]
)
async def test_what_a_job_was_told_outlives_the_service(
    tmp_path: Path, wish: str, state: JobState
) -> None:
    async with opened(tmp_path) as first:
        first.gate.clear()
        id = await first.ask()
        await first.has_begun(3)
        ledger = first.ledgers[-1]
        async with ledger.reserve(Usage(1, 1)):  # a call that never comes back
            await getattr(first.jobs, wish)(id)
            await first.jobs.close(0.01)
        assert (await first.store.get(id)).state is state
    async with opened(tmp_path) as second:
        assert (await second.jobs.get(id)).job.state is state
        assert not second.begun


async def test_what_was_cancelled_is_not_paused(bench: Bench) -> None:
    bench.gate.clear()
    id = await bench.ask()
    await bench.has_begun(3)
    await bench.jobs.cancel(id)
    await bench.jobs.pause(id)
    assert (await bench.end(id)).job.state is JobState.CANCELLED


async def test_what_is_on_its_way_counts_before_it_is_sent(bench: Bench) -> None:
    """A process that is killed during a call finds what the call can have cost at most."""
    id = await bench.ask(0)
    await bench.end(id)
    job = await bench.store.get(id)
    ledger = JobLedger.of(job, bench.store, Budget(max_tokens=100), None)
    async with ledger.reserve(Usage(30, 20, bounded=True)):
        used = (await bench.store.get(id)).used
        assert (used.calls, used.bounded_calls, used.tokens) == (1, 1, 50)
    again = JobLedger.of(await bench.store.get(id), bench.store, Budget(max_tokens=100), None)
    with pytest.raises(BudgetExceeded):
        async with again.reserve(Usage(51, 0)):
            pass


async def test_a_job_that_does_not_exist(bench: Bench) -> None:
    for call in (bench.jobs.get, bench.jobs.pause, bench.jobs.cancel, bench.jobs.resume):
        with pytest.raises(NotFound, match="no job"):
            await call("nothing")
