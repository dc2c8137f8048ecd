"""Finding explanations by the words of their text, or by what it means.

A query is data. Its words, which are its runs of letters and digits, each become one quoted prefix
of SQLite's full-text search, so that no character of it is ever an operator there.
"""

import json
import sqlite3
import unicodedata
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

import numpy as np
from numpy.typing import NDArray

from services.common.errors import InvalidArgument
from services.explainer import store
from services.explainer.database import Database
from services.explainer.engine.budget import Ledger
from services.explainer.engine.embeddings import (
    HOW_TO_CONFIGURE,
    Embeddings,
    EmbeddingsNotConfigured,
)
from services.explainer.engine.explanations import Method
from services.explainer.pages import Pages, Ranking, cursor
from services.explainer.stored import ExplainedModel, StoredExplanation
from services.explainer.vectors import Vector, Vectors

MAX_QUERY = 1000
_KEPT_QUERIES = 256


class Mode(Enum):
    WORDS = auto()
    MEANING = auto()


@dataclass(frozen=True)
class Filter:
    """Which explanations are looked at. Empty and None: all."""

    model: ExplainedModel | None = None
    groups: tuple[str, ...] = ()
    methods: tuple[Method, ...] = ()

    @property
    def sql(self) -> tuple[str, list[str]]:
        """A condition on the table `explanation`, and its parameters."""
        conditions = ["TRUE"]
        parameters: list[str] = []
        if self.model is not None:
            condition, of_model = store.of_model(self.model)
            conditions.append(condition)
            parameters += of_model
        for column, values in (("component_group", self.groups), ("method", self.methods)):
            if values:
                conditions.append(f"{column} IN (SELECT value FROM json_each(?))")
                parameters.append(json.dumps(values))
        return " AND ".join(conditions), parameters


@dataclass(frozen=True)
class Question:
    query: str
    mode: Mode = Mode.WORDS
    filter: Filter = Filter()

    def __post_init__(self) -> None:
        if len(self.query) > MAX_QUERY:
            raise InvalidArgument(
                f"a query has at most {MAX_QUERY:,} characters, this {len(self.query):,}",
                field="query",
            )
        if not words(self.query):
            raise InvalidArgument(
                "there is nothing to look for: a query has a letter or a digit", field="query"
            )


@dataclass(frozen=True)
class Page:
    """A page of what was found, best first; `total` of them in all when the search began.

    Explanations that were deleted since are left out of their page.
    """

    found: tuple[tuple[StoredExplanation, float], ...]
    next_cursor: str
    total: int
    without_embedding: int


class Search:
    """Searches of one store; by meaning where there is an endpoint for embeddings."""

    def __init__(self, database: Database, embeddings: Embeddings | None) -> None:
        self._database = database
        self._embeddings = embeddings
        self._vectors = Vectors(embeddings.model if embeddings else "")
        self._queries: OrderedDict[str, Vector] = OrderedDict()
        self._pages = Pages()

    async def find(
        self, question: Question, *, limit: int, cursor_at: str = "", user: str = ""
    ) -> Page:
        """A page of at most `limit`. Raises InvalidArgument, FailedPrecondition, Unavailable."""
        if cursor_at:
            name, ranking, start = self._pages.find(cursor_at, question)
        else:
            ranking, start = await self._rank(question), 0
            name = self._pages.keep(question, ranking) if len(ranking.numbers) > limit else ""
        numbers = ranking.numbers[start : start + limit].tolist()
        relevances = dict(zip(numbers, ranking.relevances[start:].tolist(), strict=False))
        explanations = await self._database.read(
            lambda connection: store.read(connection, numbers, user=user)
        )
        end = start + len(numbers)
        return Page(
            tuple((each, relevances[each.number]) for each in explanations),
            cursor(name, end) if end < len(ranking.numbers) else "",
            len(ranking.numbers),
            ranking.without_embedding,
        )

    async def _rank(self, question: Question) -> Ranking:
        if question.mode is Mode.WORDS:
            return await self._database.read(lambda connection: by_words(connection, question))
        query = await self._vector(question.query)
        return await self._database.read(
            lambda connection: by_meaning(connection, self._vectors, query, question.filter)
        )

    async def _vector(self, query: str) -> Vector:
        """The query's embedding, which is asked for once as long as it is kept."""
        if self._embeddings is None:
            raise EmbeddingsNotConfigured(HOW_TO_CONFIGURE, field="mode")
        if query not in self._queries:
            self._queries[query] = (await self._embeddings.embed([query], Ledger()))[0]
        self._queries.move_to_end(query)
        while len(self._queries) > _KEPT_QUERIES:
            self._queries.popitem(last=False)
        return self._queries[query]


def words(query: str) -> list[str]:
    """The words of a query: runs of letters, digits and the marks upon them."""
    return "".join(sign if _is_of_word(sign) else " " for sign in query).split()


def _is_of_word(sign: str) -> bool:
    category = unicodedata.category(sign)
    return category[0] in "LMN" or category == "Co"


def by_words(connection: sqlite3.Connection, question: Question) -> Ranking:
    """Explanations that hold each word of the query, or one that starts with it; the best first."""
    # A word has no quote, so none needs to be escaped.
    match = " ".join(f'"{word}"*' for word in words(question.query))
    sources, condition, parameters = "explanation_text", "TRUE", list[str]()
    if question.filter != Filter():
        # CROSS JOIN is SQLite's word for this order: the texts first, then what else is asked.
        sources += " CROSS JOIN explanation ON explanation.number = explanation_text.rowid"
        condition, parameters = question.filter.sql
    rows = connection.execute(
        f"SELECT explanation_text.rowid, bm25(explanation_text) FROM {sources} "
        f"WHERE explanation_text MATCH ? AND {condition} ORDER BY 2, 1 DESC",
        [match, *parameters],
    ).fetchall()
    return Ranking(
        np.array([row[0] for row in rows], np.int64),
        -np.array([row[1] for row in rows], np.float64),
    )


def by_meaning(
    connection: sqlite3.Connection, vectors: Vectors, query: Vector, filter: Filter
) -> Ranking:
    """Explanations by the cosine of their embedding with the query's, the nearest first."""
    condition, parameters = filter.sql
    wanted = _numbers(connection, condition, parameters)
    explanations, cosines = vectors.compare(connection, query)
    is_wanted = np.zeros(max(wanted.max(initial=0), explanations.max(initial=0)) + 1, np.bool_)
    is_wanted[wanted] = True
    compared = is_wanted[explanations]
    explanations, cosines = explanations[compared], cosines[compared]
    order = np.lexsort((-explanations, -cosines))
    return Ranking(
        explanations[order],
        cosines[order].astype(np.float64).clip(-1.0, 1.0),
        len(wanted) - len(explanations),
    )


def _numbers(
    connection: sqlite3.Connection, condition: str, parameters: Sequence[str]
) -> NDArray[np.int64]:
    # As one text: a row for each of 100,000 numbers takes four times as long.
    (listed,) = connection.execute(
        f"SELECT group_concat(number) FROM explanation WHERE {condition}", parameters
    ).fetchone()
    return np.fromstring(listed or "", np.int64, sep=",")
