"""Jobs on disk: what was asked for, what became of each component, what was used.

Functions that take a connection work within a transaction of somebody who stores something else
along with it. What a job used is written down before a call is sent, at the most that it can come
to, and put right with the next one: after a crash no job has used more than it says.
"""

import json
import secrets
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from services.common.errors import NotFound
from services.explainer.database import Database
from services.explainer.store import now_ms

MOST_LISTED = 1_000


class JobState(StrEnum):
    """How a job is; what each means stands in job.proto."""

    QUEUED = "queued"
    RUNNING = "running"
    WAITING = "waiting"
    PAUSED = "paused"
    DONE = "done"
    CANCELLED = "cancelled"
    FAILED = "failed"
    OUT_OF_BUDGET = "out_of_budget"

    @property
    def is_under_way(self) -> bool:
        """Whether it goes on by itself."""
        return self in (JobState.QUEUED, JobState.RUNNING, JobState.WAITING)

    @property
    def is_over(self) -> bool:
        """Whether it never goes on."""
        return self in (JobState.DONE, JobState.CANCELLED)


class ComponentState(StrEnum):
    """What became of a component of a job."""

    PENDING = "pending"
    EXPLAINED = "explained"
    SKIPPED = "skipped"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class Used:
    """What a job used of a language model; `bounded_calls` count at the most they can have cost."""

    calls: int = 0
    cached_calls: int = 0
    bounded_calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, kw_only=True)
class StoredJob:
    """A job. `request` is an ExplainManyRequest as JSON, without its list of components."""

    number: int
    id: str
    state: JobState
    request: str
    user: str
    message: str
    used: Used
    created_ms: int
    components: int
    counts: Mapping[ComponentState, int]
    reasons: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Dealt:
    """What became of a component: the id of its explanation, or why there is none."""

    state: ComponentState
    explanation_id: str = ""
    reason: str = ""


class JobStore:
    """The jobs of a database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, request: str, user: str, components: Sequence[str]) -> StoredJob:
        """A new job, QUEUED, whose components are pending in this order."""

        def work(connection: sqlite3.Connection) -> StoredJob:
            created_ms = now_ms()
            id = f"{created_ms:012x}{secrets.token_hex(6)}"
            row = connection.execute(
                "INSERT INTO job (id, state, request, user, message, calls, cached_calls, "
                "bounded_calls, prompt_tokens, completion_tokens, created_ms) "
                "VALUES (?, ?, ?, ?, '', 0, 0, 0, 0, 0, ?) RETURNING number",
                (id, JobState.QUEUED, request, user, created_ms),
            ).fetchall()[0]
            connection.executemany(
                "INSERT INTO job_component VALUES (?, ?, ?, ?, '', '')",
                (
                    (row["number"], position, component, ComponentState.PENDING)
                    for position, component in enumerate(components)
                ),
            )
            return _get(connection, id)

        return await self._database.write(work)

    async def get(self, id: str) -> StoredJob:
        """Raises NotFound."""
        return await self._database.read(lambda connection: _get(connection, id))

    async def under_way(self) -> list[StoredJob]:
        """Jobs that go on by themselves, the oldest first."""

        def work(connection: sqlite3.Connection) -> list[StoredJob]:
            rows = connection.execute("SELECT * FROM job ORDER BY number").fetchall()
            return [_job(connection, row) for row in rows if JobState(row["state"]).is_under_way]

        return await self._database.read(work)

    async def components(self, number: int) -> list[str]:
        """All components of a job, in its order."""

        def work(connection: sqlite3.Connection) -> list[str]:
            rows = connection.execute(
                "SELECT component FROM job_component WHERE job = ? ORDER BY position", (number,)
            )
            return [component for (component,) in rows]

        return await self._database.read(work)

    async def pending(self, number: int) -> list[tuple[int, str]]:
        """Position and address of each component that nothing has become of yet, in order."""

        def work(connection: sqlite3.Connection) -> list[tuple[int, str]]:
            rows = connection.execute(
                "SELECT position, component FROM job_component WHERE job = ? AND state = ? "
                "ORDER BY position",
                (number, ComponentState.PENDING),
            )
            return [(position, component) for position, component in rows]

        return await self._database.read(work)

    async def set_state(self, number: int, state: JobState, message: str = "") -> None:
        await self._database.write(
            lambda connection: connection.execute(
                "UPDATE job SET state = ?, message = ? WHERE number = ?", (state, message, number)
            )
        )

    async def stop(self, number: int, state: JobState) -> None:
        """Sets the state, unless the job has ended meanwhile."""
        under_way = [each for each in JobState if each.is_under_way]
        await self._database.write(
            lambda connection: connection.execute(
                "UPDATE job SET state = ?, message = '' WHERE number = ? AND state IN (?, ?, ?)",
                (state, number, *under_way),
            )
        )

    async def restart(self, number: int, request: str) -> None:
        """Makes it QUEUED again, with this request."""
        await self._database.write(
            lambda connection: connection.execute(
                "UPDATE job SET state = ?, message = '', request = ? WHERE number = ?",
                (JobState.QUEUED, request, number),
            )
        )

    async def set_used(self, number: int, used: Used) -> None:
        await self._database.write(lambda connection: write_used(connection, number, used))

    async def deal(self, number: int, position: int, dealt: Dealt, used: Used) -> None:
        """Writes down what became of a component."""

        def work(connection: sqlite3.Connection) -> None:
            write_component(connection, number, position, dealt)
            write_used(connection, number, used)

        await self._database.write(work)

    async def list(self) -> list[StoredJob]:
        """The newest first, at most MOST_LISTED."""

        def work(connection: sqlite3.Connection) -> list[StoredJob]:
            rows = connection.execute(
                "SELECT * FROM job ORDER BY number DESC LIMIT ?", (MOST_LISTED,)
            )
            return [_job(connection, row) for row in rows.fetchall()]

        return await self._database.read(work)


def write_component(
    connection: sqlite3.Connection, number: int, position: int, dealt: Dealt
) -> None:
    """What became of a component of job `number`."""
    connection.execute(
        "UPDATE job_component SET state = ?, explanation_id = ?, reason = ? "
        "WHERE job = ? AND position = ?",
        (dealt.state, dealt.explanation_id, dealt.reason, number, position),
    )


def explained_so_far(connection: sqlite3.Connection, number: int, position: int) -> str:
    """The id of the explanation that the job has stored of a component, empty where it has none."""
    row = connection.execute(
        "SELECT explanation_id FROM job_component WHERE job = ? AND position = ?",
        (number, position),
    ).fetchone()
    return str(row["explanation_id"])


def write_used(connection: sqlite3.Connection, number: int, used: Used) -> None:
    connection.execute(
        "UPDATE job SET calls = ?, cached_calls = ?, bounded_calls = ?, prompt_tokens = ?, "
        "completion_tokens = ? WHERE number = ?",
        (
            used.calls,
            used.cached_calls,
            used.bounded_calls,
            used.prompt_tokens,
            used.completion_tokens,
            number,
        ),
    )


def _get(connection: sqlite3.Connection, id: str) -> StoredJob:
    row = connection.execute("SELECT * FROM job WHERE id = ?", (id,)).fetchone()
    if row is None:
        raise NotFound(f"there is no job {json.dumps(id)} here; ListJobs has those there are")
    return _job(connection, row)


def _job(connection: sqlite3.Connection, row: sqlite3.Row) -> StoredJob:
    counts = dict.fromkeys(ComponentState, 0)
    reasons: dict[str, int] = {}
    for state, reason, count in connection.execute(
        "SELECT state, reason, count(*) FROM job_component WHERE job = ? GROUP BY state, reason",
        (row["number"],),
    ):
        counts[ComponentState(state)] += count
        if reason:
            reasons[reason] = reasons.get(reason, 0) + count
    return StoredJob(
        number=row["number"],
        id=row["id"],
        state=JobState(row["state"]),
        request=row["request"],
        user=row["user"],
        message=row["message"],
        used=Used(
            calls=row["calls"],
            cached_calls=row["cached_calls"],
            bounded_calls=row["bounded_calls"],
            prompt_tokens=row["prompt_tokens"],
            completion_tokens=row["completion_tokens"],
        ),
        created_ms=row["created_ms"],
        components=sum(counts.values()),
        counts=counts,
        reasons=reasons,
    )
