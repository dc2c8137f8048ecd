"""The store of explanations: what is written once, read by component or id, scored and rated.

`ExplanationStore` is what callers use. The functions below it work within a transaction of
`Database`, for those who store something else along with an explanation.
"""

import json
import secrets
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from services.common.addresses import parse
from services.common.errors import NotFound
from services.explainer.choice import Candidate, Mark, best_first
from services.explainer.database import Database
from services.explainer.engine.explanations import Method
from services.explainer.engine.replies import FailureKind
from services.explainer.engine.scores import Measure, Scorer
from services.explainer.stored import (
    ExplainedModel,
    NewExplanation,
    NewScore,
    Ratings,
    StoredExplanation,
    StoredScore,
)

_OF_MODEL = (
    "model_id = ? AND (weights_hash = '' OR ? IN ('', weights_hash)) AND (dictionary_hash = '' OR "
    "dictionary_hash = coalesce("
    "(SELECT value FROM json_each(?) WHERE key = component_group), dictionary_hash))"
)

_OF_CHOICE = "(measure = '' OR (measure = 'auc' AND scorer IN ('detection', 'head_pairs')))"
"""The scores that choice goes by, in the words of the schema's index `score_of_choice`."""

_METHODS: dict[str, Method] = {each.value: each for each in Method}
_SCORERS: dict[str, Scorer | None] = {"": None, **{each.value: each for each in Scorer}}
_MEASURES: dict[str, Measure | None] = {"": None, **{each.value: each for each in Measure}}
_NOT_RATED = Ratings()

_COLUMNS = (
    "id", "model_id", "weights_hash", "dictionary_hash", "component", "component_group", "text",
    "method", "explainer_model", "provider", "prompt_hash", "seed", "dataset", "dataset_hash",
    "code_version", "author", "based_on", "published_method", "created_ms", "source_key",
)  # fmt: skip
_SCORE_COLUMNS = (
    "explanation", "scorer", "measure", "measure_name", "value", "low", "high", "n", "failures",
    "seed", "judge", "dataset", "dataset_hash", "code_version", "created_ms",
)  # fmt: skip


@dataclass(frozen=True)
class Added:
    """The id of an explanation, and whether it is new: one of its `source_key` may be there."""

    id: str
    is_new: bool


class ExplanationStore:
    """Explanations with their scores and ratings. Every method is one transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(
        self, new: NewExplanation, scores: Sequence[NewScore] = (), *, user: str = ""
    ) -> StoredExplanation:
        """Stores it, unless one of its `source_key` is there; the one that is there then."""

        def work(connection: sqlite3.Connection) -> StoredExplanation:
            return get(connection, insert(connection, new, scores).id, user=user)

        return await self._database.write(work)

    async def add_many(
        self, items: Sequence[tuple[NewExplanation, Sequence[NewScore]]]
    ) -> list[Added]:
        """All of them or none, in this order."""
        return await self._database.write(
            lambda connection: [insert(connection, new, scores) for new, scores in items]
        )

    async def get(self, id: str, *, user: str = "") -> StoredExplanation:
        """Raises NotFound."""
        return await self._database.read(lambda connection: get(connection, id, user=user))

    async def list(
        self,
        model: ExplainedModel,
        components: Sequence[str],
        *,
        best_only: bool = False,
        user: str = "",
        most: int | None = None,
    ) -> list[StoredExplanation]:
        """Those of the components in this order, of each the best first.

        With `best_only` the best alone, with those scores alone that choice goes by; with `most`,
        at most one more than so many.
        """

        def work(connection: sqlite3.Connection) -> list[StoredExplanation]:
            numbers = chosen(connection, model, components, best_only=best_only)
            if most is not None:
                numbers = numbers[: most + 1]
            return read(connection, numbers, user=user, choice_only=best_only)

        return await self._database.read(work)

    async def score(self, id: str, scores: Sequence[NewScore]) -> tuple[StoredScore, ...]:
        """Stores scores of an explanation. Raises NotFound where that is gone."""

        def work(connection: sqlite3.Connection) -> tuple[StoredScore, ...]:
            return insert_scores(connection, number_of(connection, id), scores)

        return await self._database.write(work)

    async def documents(self, id: str) -> frozenset[str]:
        """The documents that were shown to whoever made it. Raises NotFound."""

        def work(connection: sqlite3.Connection) -> frozenset[str]:
            rows = connection.execute(
                "SELECT document FROM explanation_document WHERE explanation = ?",
                (number_of(connection, id),),
            )
            return frozenset(document for (document,) in rows)

        return await self._database.read(work)

    async def rate(self, id: str, rating: int | None, *, user: str) -> Ratings:
        """Sets the user's rating, 1 to 5, or takes it back. Raises NotFound."""

        def work(connection: sqlite3.Connection) -> Ratings:
            number = number_of(connection, id)
            if rating is None:
                connection.execute(
                    "DELETE FROM rating WHERE explanation = ? AND user = ?", (number, user)
                )
            else:
                connection.execute(
                    "INSERT OR REPLACE INTO rating VALUES (?, ?, ?, ?)",
                    (number, user, rating, now_ms()),
                )
            return _ratings(connection, json.dumps([number]), user).get(number, Ratings())

        return await self._database.write(work)

    async def delete(self, id: str) -> None:
        """With its scores and ratings. Raises NotFound."""

        def work(connection: sqlite3.Connection) -> None:
            number = number_of(connection, id)
            connection.execute("DELETE FROM explanation WHERE number = ?", (number,))

        await self._database.write(work)

    async def count(self) -> int:
        def work(connection: sqlite3.Connection) -> int:
            (found,) = connection.execute("SELECT count(*) FROM explanation").fetchone()
            return int(found)

        return await self._database.read(work)


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def insert(
    connection: sqlite3.Connection, new: NewExplanation, scores: Sequence[NewScore] = ()
) -> Added:
    """Stores an explanation with its scores, unless one of its `source_key` is there."""
    created_ms = now_ms()
    # Ids sort by time.
    id = f"{created_ms:012x}{secrets.token_hex(6)}"
    row = connection.execute(
        f"INSERT INTO explanation ({', '.join(_COLUMNS)}) VALUES ({_marks(_COLUMNS)}) "
        "ON CONFLICT (source_key) DO NOTHING RETURNING number",
        (
            id,
            new.model.id,
            new.model.weights_hash,
            new.model.dictionary_hash(new.component),
            new.component,
            group_of(new.component),
            new.text,
            new.method.value,
            new.explainer_model,
            new.provider,
            new.prompt_hash,
            new.seed,
            new.dataset,
            new.dataset_hash,
            new.code_version,
            new.author,
            new.based_on,
            new.published_method,
            created_ms,
            new.source_key,
        ),
    ).fetchone()
    if row is None:
        known = connection.execute(
            "SELECT id FROM explanation WHERE source_key = ?", (new.source_key,)
        ).fetchone()
        return Added(known["id"], False)
    number = row["number"]
    connection.executemany(
        "INSERT INTO explanation_document VALUES (?, ?)",
        [(number, document) for document in sorted(new.documents)],
    )
    insert_scores(connection, number, scores)
    return Added(id, True)


def insert_scores(
    connection: sqlite3.Connection, number: int, scores: Sequence[NewScore]
) -> tuple[StoredScore, ...]:
    """Stores scores of the explanation with this number."""
    created_ms = now_ms()
    for each in scores:
        values = (
            number,
            each.scorer or "",
            each.measure or "",
            each.measure_name,
            each.value,
            each.low,
            each.high,
            each.n,
            json.dumps(dict(each.failures)),
            each.seed,
            each.judge,
            each.dataset,
            each.dataset_hash,
            each.code_version,
        )
        # What is measured again and comes out the same is the same score.
        same = " AND ".join(f"{column} IS ?" for column in _SCORE_COLUMNS[:-1])
        connection.execute(f"DELETE FROM score WHERE {same}", values)
        connection.execute(
            f"INSERT INTO score ({', '.join(_SCORE_COLUMNS)}) VALUES ({_marks(_SCORE_COLUMNS)})",
            (*values, created_ms),
        )
    return tuple(StoredScore(**vars(each), created_ms=created_ms) for each in scores)


def of_model(model: ExplainedModel) -> tuple[str, tuple[str, ...]]:
    """The condition for explanations that are shown for a model, and its parameters."""
    hashes = {f"latent.{id}": each for id, each in model.dictionaries if each}
    return _OF_MODEL, (model.id, model.weights_hash, json.dumps(hashes))


def number_of(connection: sqlite3.Connection, id: str) -> int:
    """The number of an explanation. Raises NotFound."""
    row = connection.execute("SELECT number FROM explanation WHERE id = ?", (id,)).fetchone()
    if row is None:
        raise NotFound(f"there is no explanation {id!r} here", field="id")
    return int(row["number"])


def get(connection: sqlite3.Connection, id: str, *, user: str = "") -> StoredExplanation:
    """Raises NotFound."""
    return read(connection, [number_of(connection, id)], user=user)[0]


def group_of(component: str) -> str:
    """An address without its last number: `neuron.3`, `head.0`, `latent.D`."""
    return str(parse(component)).rpartition(".")[0]


def read(
    connection: sqlite3.Connection,
    numbers: Sequence[int],
    *,
    user: str = "",
    choice_only: bool = False,
) -> list[StoredExplanation]:
    """The explanations with these numbers, in this order; one that is gone is left out.

    With `choice_only` they have those scores alone that choice goes by.
    """
    asked = json.dumps(numbers)
    scores = _scores(connection, asked, _OF_CHOICE if choice_only else "TRUE")
    ratings = _ratings(connection, asked, user)
    found = {}
    for (
        number, id, model_id, weights_hash, dictionary_hash, component, text, method,
        explainer_model, provider, prompt_hash, seed, dataset, dataset_hash, code_version, author,
        based_on, published_method, created_ms, documents,
    ) in _tuples(
        connection,
        "SELECT number, id, model_id, weights_hash, dictionary_hash, component, text, method, "
        "explainer_model, provider, prompt_hash, seed, dataset, dataset_hash, code_version, "
        "author, based_on, published_method, created_ms, "
        "(SELECT count(*) FROM explanation_document WHERE explanation = number) "
        "FROM explanation WHERE number IN (SELECT value FROM json_each(?))",
        (asked,),
    ):  # fmt: skip
        found[number] = StoredExplanation(
            number=number,
            id=id,
            model=ExplainedModel(
                model_id,
                weights_hash,
                ((component.split(".")[1], dictionary_hash),) if dictionary_hash else (),
            ),
            component=component,
            text=text,
            method=_METHODS[method],
            explainer_model=explainer_model,
            provider=provider,
            prompt_hash=prompt_hash,
            seed=seed,
            dataset=dataset,
            dataset_hash=dataset_hash,
            documents=documents,
            code_version=code_version,
            author=author,
            based_on=based_on,
            published_method=published_method,
            created_ms=created_ms,
            scores=tuple(scores.get(number, ())),
            ratings=ratings.get(number, _NOT_RATED),
        )
    return [found[number] for number in numbers if number in found]


def chosen(
    connection: sqlite3.Connection,
    model: ExplainedModel,
    components: Sequence[str],
    *,
    best_only: bool,
) -> list[int]:
    """The numbers of the components' explanations, in their order, of each the best first."""
    condition, parameters = of_model(model)
    rows: dict[str, list[list[Any]]] = {}
    for component, *row in _tuples(
        connection,
        "SELECT component, number, id, method, created_ms, based_on FROM explanation "
        f"WHERE component IN (SELECT value FROM json_each(?)) AND {condition}",
        (json.dumps(components), *parameters),
    ):
        rows.setdefault(component, []).append(row)
    compared = json.dumps([row[0] for found in rows.values() if len(found) > 1 for row in found])
    marks, ratings = _choice_marks(connection, compared), _ratings(connection, compared, "")
    numbers: list[int] = []
    for component in components:
        found = rows.get(component, [])
        if len(found) == 1:
            numbers.append(found[0][0])
            continue
        best = best_first(
            [
                Candidate(
                    number,
                    id,
                    _METHODS[method],
                    created_ms,
                    based_on,
                    ratings.get(number, _NOT_RATED).mean,
                    marks.get(number, ()),
                )
                for number, id, method, created_ms, based_on in found
            ]
        )
        numbers += [each.number for each in (best[:1] if best_only else best)]
    return numbers


def _choice_marks(connection: sqlite3.Connection, numbers: str) -> Mapping[int, Sequence[Mark]]:
    """Of the explanations with these numbers, as JSON."""
    found: dict[int, list[Mark]] = {}
    for number, judge, name, value, created_ms in _tuples(
        connection,
        "SELECT explanation, judge, measure_name, value, created_ms FROM score "
        "INDEXED BY score_of_choice WHERE explanation IN (SELECT value FROM json_each(?)) "
        f"AND value IS NOT NULL AND {_OF_CHOICE} ORDER BY explanation, number",
        (numbers,),
    ):
        found.setdefault(number, []).append(Mark(name or judge, bool(name), value, created_ms))
    return found


def _ratings(connection: sqlite3.Connection, numbers: str, user: str) -> dict[int, Ratings]:
    """Of the explanations with these numbers, as JSON."""
    rows = connection.execute(
        "SELECT explanation, count(*), avg(rating), max(CASE WHEN user = ? THEN rating END) "
        "FROM rating WHERE explanation IN (SELECT value FROM json_each(?)) GROUP BY explanation",
        (user, numbers),
    )
    return {number: Ratings(count, mean, own) for number, count, mean, own in rows}


def _scores(
    connection: sqlite3.Connection, numbers: str, condition: str
) -> dict[int, list[StoredScore]]:
    """Of the explanations with these numbers, as JSON: of every scorer, measure, judge and dataset
    the newest, newest first."""
    kept: dict[int, list[StoredScore]] = {}
    seen: set[tuple[object, ...]] = set()
    for (
        explanation, scorer, measure, measure_name, value, low, high, n, failures, seed, judge,
        dataset, dataset_hash, code_version, created_ms,
    ) in _tuples(
        connection,
        f"SELECT {', '.join(_SCORE_COLUMNS)} FROM score "
        f"WHERE explanation IN (SELECT value FROM json_each(?)) AND {condition} "
        "ORDER BY explanation, number DESC",
        (numbers,),
    ):  # fmt: skip
        which = (explanation, scorer, measure, measure_name, judge, dataset)
        if which in seen:
            continue
        seen.add(which)
        score = StoredScore(
            scorer=_SCORERS[scorer],
            measure=_MEASURES[measure],
            measure_name=measure_name,
            value=value,
            low=low,
            high=high,
            n=n,
            failures=_failures(failures),
            seed=seed,
            judge=judge,
            dataset=dataset,
            dataset_hash=dataset_hash,
            code_version=code_version,
            created_ms=created_ms,
        )
        kept.setdefault(explanation, []).append(score)
    return kept


def _tuples(
    connection: sqlite3.Connection, query: str, parameters: Sequence[object]
) -> Iterator[tuple[Any, ...]]:
    """Rows as plain tuples: where there are many, `sqlite3.Row` takes twice as long."""
    cursor = connection.cursor()
    cursor.row_factory = None
    return cursor.execute(query, parameters)


def _failures(text: str) -> Mapping[FailureKind, int]:
    if text == "{}":
        return {}
    return {FailureKind(kind): count for kind, count in json.loads(text).items()}


def _marks(columns: Sequence[str]) -> str:
    return ", ".join("?" for _ in columns)
