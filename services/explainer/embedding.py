"""Embedding explanations, so that they can be searched by meaning: only when somebody asks for it.

Explanations that have no embedding by the configured model are embedded a batch at a time, and each
batch is stored once it is paid for. So a call that ends early is gone on with by the same call, and
nothing is paid for twice. An endpoint that refuses a batch is asked for each of its texts: what it
refuses then is counted, and has no embedding.
"""

import asyncio
import sqlite3
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from services.common.errors import FailedPrecondition
from services.explainer.database import Database
from services.explainer.engine.budget import Budget, Ledger
from services.explainer.engine.embeddings import (
    HOW_TO_CONFIGURE,
    Embeddings,
    EmbeddingsNotConfigured,
    Vectors,
    token_bound,
)
from services.explainer.engine.provider_judge import all_of
from services.explainer.search import Filter
from services.explainer.vectors import stored

BATCH = 32
"""Texts of one call: what every endpoint takes."""

_AT_ONCE = 4
_MISSING = (
    "NOT EXISTS (SELECT 1 FROM embedding WHERE explanation = explanation.number AND model = ?)"
)


@dataclass
class Embedded:
    """How far it is: of `total` explanations that had none, so many have an embedding now."""

    total: int
    done: int = 0
    refused: int = 0
    ledger: Ledger = field(default_factory=Ledger)


@dataclass(frozen=True)
class Estimate:
    """What embedding all that have none takes: a token for four bytes, or at most one each."""

    explanations: int
    calls: int
    expected_tokens: int
    most_tokens: int
    host: str
    model: str


class Embedding:
    """Embeds the explanations of one store; one call at a time, so that none is paid for twice."""

    def __init__(self, database: Database, embeddings: Embeddings | None) -> None:
        self._database = database
        self._embeddings = embeddings
        self._turn = asyncio.Lock()

    async def estimate(self, filter: Filter) -> Estimate:
        """Raises EmbeddingsNotConfigured."""
        endpoint = self._endpoint()

        def work(connection: sqlite3.Connection) -> tuple[int, int]:
            condition, parameters = filter.sql
            row = connection.execute(
                "SELECT count(*), coalesce(sum(length(CAST(text AS BLOB))), 0) FROM explanation "
                f"WHERE {condition} AND {_MISSING}",
                [*parameters, endpoint.model],
            ).fetchone()
            return row[0], row[1]

        count, size = await self._database.read(work)
        return Estimate(
            explanations=count,
            calls=-(-count // BATCH),
            expected_tokens=size // 4 + count,
            most_tokens=token_bound(count, size).tokens,
            host=endpoint.host,
            model=endpoint.model,
        )

    async def run(self, filter: Filter, budget: Budget) -> AsyncGenerator[Embedded, None]:
        """Embeds what has no embedding, and says how far it is after each step, and at the end.

        Raises EmbeddingsNotConfigured, BudgetExceeded, Unavailable, FailedPrecondition: what is
        embedded then stays.
        """
        endpoint = self._endpoint()
        async with self._turn:
            ledger = Ledger(budget)
            await self._forget_other_widths(endpoint, ledger)
            so_far = Embedded((await self.estimate(filter)).explanations, ledger=ledger)
            yield so_far
            last = 0
            while found := await self._missing(filter, endpoint.model, last):
                last = found[-1][0]
                parts = [found[at : at + BATCH] for at in range(0, len(found), BATCH)]
                await all_of([self._embed(endpoint, part, so_far) for part in parts])
                yield so_far

    def _endpoint(self) -> Embeddings:
        if self._embeddings is None:
            raise EmbeddingsNotConfigured(HOW_TO_CONFIGURE)
        return self._embeddings

    async def _forget_other_widths(self, endpoint: Embeddings, ledger: Ledger) -> None:
        """Removes what another model of this name has made: it can be compared with nothing."""
        model = endpoint.model

        def has_any(connection: sqlite3.Connection) -> bool:
            found = connection.execute("SELECT 1 FROM embedding WHERE model = ? LIMIT 1", (model,))
            return found.fetchone() is not None

        if await self._database.read(has_any):
            wanted = len(stored((await endpoint.embed(["width"], ledger))[0]))
            await self._database.write(
                lambda connection: connection.execute(
                    "DELETE FROM embedding WHERE model = ? AND length(vector) <> ?",
                    (model, wanted),
                )
            )

    async def _missing(self, filter: Filter, model: str, after: int) -> list[tuple[int, str]]:
        """Numbers and texts of the next explanations without an embedding."""
        condition, parameters = filter.sql

        def work(connection: sqlite3.Connection) -> list[tuple[int, str]]:
            rows = connection.execute(
                f"SELECT number, text FROM explanation WHERE {condition} AND {_MISSING} "
                "AND number > ? ORDER BY number LIMIT ?",
                [*parameters, model, after, _AT_ONCE * BATCH],
            )
            return [(row["number"], row["text"]) for row in rows]

        return await self._database.read(work)

    async def _embed(
        self, endpoint: Embeddings, part: Sequence[tuple[int, str]], so_far: Embedded
    ) -> None:
        numbers, texts = zip(*part, strict=True)
        try:
            vectors = await endpoint.embed(texts, so_far.ledger)
        except FailedPrecondition as error:
            if error.reason != "EMBEDDING_REFUSED":
                raise
            if len(part) == 1:
                so_far.refused += 1
                return
            for each in part:
                await self._embed(endpoint, [each], so_far)
            return
        await self._database.write(
            lambda connection: put(connection, endpoint.model, numbers, vectors)
        )
        so_far.done += len(numbers)


def put(
    connection: sqlite3.Connection, model: str, explanations: Sequence[int], vectors: Vectors
) -> None:
    """Stores the embeddings of explanations; one that is gone is left out."""
    connection.executemany(
        "INSERT OR REPLACE INTO embedding (explanation, model, vector) "
        "SELECT number, ?, ? FROM explanation WHERE number = ?",
        [
            (model, stored(vector), number)
            for number, vector in zip(explanations, vectors, strict=True)
        ],
    )
