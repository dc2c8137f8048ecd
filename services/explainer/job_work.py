"""What a job does with one component: read, gate, explain, score, and write all of it down at once.

The explanation, its scores, what became of the component and what was used are one transaction.
Where the budget or the endpoint ends in the middle, the explanation is kept and the component is
still to be dealt with; then all that was paid for is found again among the kept replies.
"""

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass

from services.common.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    ResourceExhausted,
    TdbError,
    Unavailable,
)
from services.explainer import gate, offline_work
from services.explainer.components import Records, Subject
from services.explainer.database import Database
from services.explainer.engine import explainers, scorers
from services.explainer.engine.budget import Budget, BudgetExceeded
from services.explainer.engine.explainers import AnySplit
from services.explainer.engine.explanations import Explanation, Method
from services.explainer.engine.provider import Provider
from services.explainer.engine.provider_settings import (
    HOW_TO_CONFIGURE,
    ProviderMisconfigured,
    ProviderNotConfigured,
)
from services.explainer.engine.replies import FailureKind
from services.explainer.engine.scores import Scorer
from services.explainer.gate import Gate
from services.explainer.job_ledger import JobLedger, PatientProvider
from services.explainer.job_run import Skipped
from services.explainer.job_store import (
    ComponentState,
    Dealt,
    StoredJob,
    explained_so_far,
    write_component,
    write_used,
)
from services.explainer.making import OFFLINE, Task, new_explanation, nothing_shown, split_of
from services.explainer.offline_pool import OfflinePool
from services.explainer.offline_work import Made
from services.explainer.scoring import Scorers, Scoring, Steering, asks_provider, new_score
from services.explainer.store import insert, insert_scores, number_of
from services.explainer.stored import Dataset, NewScore

_STOPS = (
    BudgetExceeded,
    ProviderMisconfigured,
    ProviderNotConfigured,
    Unavailable,
    DeadlineExceeded,
    ResourceExhausted,
)
"""What ends the work on a component in the middle, to be done another time."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a job is to do with each of its components."""

    dataset: str
    task: Task
    budget: Budget
    gate: Gate
    again: bool

    @property
    def scorers(self) -> tuple[Scorer, ...]:
        return self.task.scoring.scorers if self.task.scoring else ()

    async def fetch(self, records: Records, component: str) -> Subject:
        """What is known of a component that passes the gate. Raises Skipped."""
        subject = await self.task.fetch(records, self.dataset, component)
        self.gate.check(subject)
        return subject


class JobWork:
    """The work of one job."""

    def __init__(
        self,
        job: StoredJob,
        plan: Plan,
        database: Database,
        records: Records,
        pool: OfflinePool,
        provider: Provider | None,
        steering: Steering | None = None,
    ) -> None:
        self._job = job
        self._plan = plan
        self._database = database
        self._records = records
        self._pool = pool
        self._provider = PatientProvider(provider) if provider else None
        self._steering = steering

    def go_on(self) -> None:
        if self._provider:
            self._provider.go_on()

    async def __call__(
        self, position: int, component: str, ledger: JobLedger, *, tolerant: bool
    ) -> tuple[Dealt, str]:
        plan = self._plan
        # Before anything is paid for that could not be kept.
        await self._database.check_room()
        subject = await plan.fetch(self._records, component)
        if not plan.again:
            await self._check_new(position, subject)
        provider = self._provider.tolerant() if self._provider and tolerant else self._provider
        try:
            made = await self._explained(subject, provider, ledger)
        except FailedPrecondition as error:
            if error.reason in gate.NOT_WORTH_IT:
                raise Skipped(error.reason) from None
            raise
        scores = [new_score(each, subject) for each in made.scores]
        unscored = [reason for _, reason in made.unscored]
        try:
            scores += await self._scored(made, subject, provider, ledger, unscored, tolerant)
        except _STOPS:
            await self._keep(position, subject, made.explanation)
            raise
        return await self._done(position, subject, made.explanation, scores, unscored, ledger)

    async def _explained(
        self, subject: Subject, provider: Provider | None, ledger: JobLedger
    ) -> Made:
        task, least_auc = self._plan.task, self._plan.gate.min_pattern_auc
        component = subject.component
        if task.method is OFFLINE:
            scoring = task.scoring or Scoring(scorers=())
            found = await self._pool.run(
                offline_work.explain,
                component,
                seed=task.seed,
                scorers_asked=self._scored_offline(),
                score_seed=scoring.draw_seed(task.seed),
                count=scoring.items or scorers.COUNT,
                least_auc=least_auc,
            )
            if found is None:
                raise Skipped(gate.PATTERN_AUC_TOO_LOW)
            return found
        if least_auc is not None:
            auc = await self._pool.run(offline_work.pattern_auc, component, task.seed)
            if auc < least_auc:
                raise Skipped(gate.PATTERN_AUC_TOO_LOW)
        if provider is None:
            raise ProviderNotConfigured(HOW_TO_CONFIGURE)
        split: AnySplit = nothing_shown(component, task.seed)
        if task.method is not Method.OUTPUT_CENTRED:
            split = await split_of(component, task.seed)
        made = await explainers.explain(
            task.method, component, split, provider, ledger, seed=task.seed
        )
        if isinstance(made, FailureKind):
            raise FailedPrecondition("no explanation", reason=f"EXPLAINER_{made.name}")
        return Made(explanation=made)

    def _scored_offline(self) -> tuple[Scorer, ...]:
        """Scores that are made along with the token pattern."""
        scoring = self._plan.task.scoring
        if scoring is None or asks_provider(scoring.judge, pattern=True):
            return ()
        return tuple(each for each in scoring.scorers if each is not Scorer.INTERVENTION)

    async def _scored(
        self,
        made: Made,
        subject: Subject,
        provider: Provider | None,
        ledger: JobLedger,
        unscored: list[str],
        tolerant: bool,
    ) -> list[NewScore]:
        """The scores that are still to be made. What cannot be made is added to `unscored`."""
        task = self._plan.task
        if task.scoring is None:
            return []
        asked = Scorers(provider, self._steering)
        offline = self._scored_offline()
        found: list[NewScore] = []
        split = None
        for scorer in task.scoring.scorers:
            if scorer in offline:
                continue
            try:
                if split is None and scorer is not Scorer.INTERVENTION:
                    split = await split_of(subject.component, task.seed)
                found += await asked.score(
                    scorer, made.explanation, subject, split, task.scoring, ledger
                )
            except TdbError as error:
                is_away = isinstance(error, Unavailable | DeadlineExceeded)
                if isinstance(error, _STOPS) and not (tolerant and is_away):
                    raise
                unscored.append(error.reason)
        return found

    async def _check_new(self, position: int, subject: Subject) -> None:
        """Raises Skipped where there is an explanation by the same method, of the same examples."""
        number = self._job.number

        def work(connection: sqlite3.Connection) -> bool:
            before = explained_so_far(connection, number, position)
            found = already_explained(
                connection, self._plan.task, subject.dataset, [subject.address], before
            )
            return bool(found)

        if await self._database.read(work):
            raise Skipped(gate.ALREADY_EXPLAINED)

    async def _keep(self, position: int, subject: Subject, made: Explanation) -> None:
        """Stores an explanation whose scores are made another time."""
        new = new_explanation(made, subject, self._job.user)

        def work(connection: sqlite3.Connection) -> None:
            id = insert(connection, new).id
            dealt = Dealt(ComponentState.PENDING, id)
            write_component(connection, self._job.number, position, dealt)

        await self._database.write(work)

    async def _done(
        self,
        position: int,
        subject: Subject,
        made: Explanation,
        scores: Sequence[NewScore],
        unscored: Sequence[str],
        ledger: JobLedger,
    ) -> tuple[Dealt, str]:
        new = new_explanation(made, subject, self._job.user)
        used = ledger.used_at_most

        def work(connection: sqlite3.Connection) -> Dealt:
            added = insert(connection, new, scores)
            if not added.is_new:
                insert_scores(connection, number_of(connection, added.id), scores)
            reason = f"UNSCORED_{unscored[0]}" if unscored else ""
            dealt = Dealt(ComponentState.EXPLAINED, added.id, reason)
            write_component(connection, self._job.number, position, dealt)
            write_used(connection, self._job.number, used)
            return dealt

        return await self._database.write(work), made.text


def already_explained(
    connection: sqlite3.Connection,
    task: Task,
    dataset: Dataset,
    components: Sequence[str],
    besides: str = "",
) -> set[str]:
    """Those that have an explanation, other than the one with the id `besides`, by the same method,
    of the same examples in the same halves."""
    rows = connection.execute(
        "SELECT DISTINCT component FROM explanation "
        "WHERE component IN (SELECT value FROM json_each(?)) AND method = ? AND seed = ? "
        "AND dataset_hash = ? AND model_id = ? AND weights_hash = ? AND id <> ?",
        (
            json.dumps(list(components)),
            task.method,
            task.seed,
            dataset.hash,
            dataset.model.id,
            dataset.model.weights_hash,
            besides,
        ),
    )
    return {component for (component,) in rows}
