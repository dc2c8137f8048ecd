"""Explanations that came with a dataset's records, stored here with the scores of their publisher.

They are read and stored a batch at a time, each batch in one transaction, so that any number of
them fits. What is here already is known again by what it says and of what: an import that ended
early goes on when it is asked for again, and the same import twice adds nothing. Where the dataset
service goes away, the stream is gone on with after the last batch.
"""

import asyncio
import hashlib
import json
import math
import sqlite3
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from tdb import __version__
from tdb.dataset.v1 import explanations_pb2

from services.common.errors import InvalidArgument, TdbError, Unavailable, inside
from services.explainer import requests, store
from services.explainer.components import Records
from services.explainer.database import Database
from services.explainer.engine.explanations import Method
from services.explainer.stored import Dataset, NewExplanation, NewScore
from services.explainer.upstream import Upstream

MOST_REFUSED = 100
"""Refusals that are told; the others are counted."""

_ATTEMPTS = 6
_LONGEST_PAUSE_S = 10.0


@dataclass
class Imported:
    """How far an import is; `refused` says of some what could not be stored, and why."""

    read: int = 0
    added: int = 0
    known: int = 0
    refused: list[str] = field(default_factory=list)
    refused_count: int = 0


class Importer:
    """Imports into one store."""

    def __init__(
        self,
        database: Database,
        records: Records,
        upstream: Upstream,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._database = database
        self._records = records
        self._upstream = upstream
        self._sleep = sleep

    async def run(self, name: str, user: str) -> AsyncGenerator[Imported, None]:
        """Imports what the dataset holds, and says how far it is after each batch and at the end.

        Raises what the dataset service refuses; what is stored then stays.
        """
        dataset = await self._records.dataset(name)
        so_far = Imported()
        yield so_far
        async for batch in self._batches(name):
            items = []
            for each in batch.explanations:
                so_far.read += 1
                try:
                    items.append(_new(each, dataset, user))
                except TdbError as error:
                    so_far.refused_count += 1
                    if len(so_far.refused) < MOST_REFUSED:
                        so_far.refused.append(f"{each.component[:200]}: {error.message}")
            added = await self._database.write(partial(_store, items=items))
            so_far.added += added
            so_far.known += len(items) - added
            yield so_far

    async def _batches(self, name: str) -> AsyncGenerator[explanations_pb2.ExplanationBatch, None]:
        """All batches, from whichever calls it takes. Raises Unavailable where none comes."""
        cursor, attempt = "", 0
        while True:
            request = explanations_pb2.StreamExplanationsRequest(dataset=name, cursor=cursor)
            try:
                async for response in self._upstream.dataset.StreamExplanations(request):
                    if response.HasField("summary"):
                        return
                    attempt = 0
                    yield response.batch
                    cursor = response.batch.cursor
                raise Unavailable("the dataset service ended a stream too early", retry_after_s=1)
            except Unavailable as error:
                attempt += 1
                if attempt == _ATTEMPTS:
                    raise
                await self._sleep(min(error.retry_after_s or 1.0, _LONGEST_PAUSE_S))


def _new(
    given: explanations_pb2.SourceExplanation, dataset: Dataset, user: str
) -> tuple[NewExplanation, list[NewScore]]:
    """Raises InvalidArgument."""
    with inside("component"):
        component = requests.component(given.component)
    with inside("text"):
        text = requests.text(given.text.replace("\r\n", "\n").replace("\r", "\n"))
    for each in given.scores:
        if not math.isfinite(each.value):
            raise InvalidArgument(f"its score {each.name[:100]!r} is not finite", field="scores")
    parts = [
        dataset.model.id,
        dataset.model.weights_hash,
        dataset.model.dictionary_hash(component),
        component,
        text,
        given.id,
        given.method,
        given.model,
    ]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    new = NewExplanation(
        model=dataset.model,
        component=component,
        text=text,
        method=Method.IMPORTED,
        published_method=given.method,
        explainer_model=given.model,
        dataset=dataset.name,
        dataset_hash=dataset.hash,
        code_version=__version__,
        author=user,
        source_key=f"imported/{digest}",
    )
    return new, [NewScore(measure_name=each.name, value=each.value) for each in given.scores]


def _store(
    connection: sqlite3.Connection, items: Sequence[tuple[NewExplanation, Sequence[NewScore]]]
) -> int:
    """How many are new. Of one that is known, scores that its publisher has changed are added."""
    new = 0
    for explanation, scores in items:
        added = store.insert(connection, explanation, scores)
        new += added.is_new
        if not added.is_new:
            number = store.number_of(connection, added.id)
            known = {
                (row["measure_name"], row["value"])
                for row in connection.execute(
                    "SELECT measure_name, value FROM score "
                    "WHERE explanation = ? AND measure_name <> ''",
                    (number,),
                )
            }
            changed = [each for each in scores if (each.measure_name, each.value) not in known]
            store.insert_scores(connection, number, changed)
    return new
