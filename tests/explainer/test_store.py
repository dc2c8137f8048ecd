"""The store of explanations: what is kept, which is best, and what survives a killed process."""

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from services.common.errors import NotFound
from services.explainer import store as stores
from services.explainer.database import Database
from services.explainer.engine.explanations import Method
from services.explainer.engine.replies import FailureKind
from services.explainer.engine.scores import Measure, Scorer
from services.explainer.store import ExplanationStore
from services.explainer.stored import ExplainedModel, NewExplanation, NewScore, Ratings

MODEL = ExplainedModel("demo", "ab" * 32)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "explanations.sqlite3"


@pytest.fixture
def store(path: Path) -> Iterator[ExplanationStore]:
    database = Database(path)
    yield ExplanationStore(database)
    database.close()


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A millisecond passes between any two things."""
    time = iter(range(1_700_000_000_000, 1_800_000_000_000))
    monkeypatch.setattr(stores, "now_ms", lambda: next(time))


def new(text: str = "names", **changes: Any) -> NewExplanation:
    known: dict[str, Any] = {
        "model": MODEL,
        "component": "neuron.1.7",
        "text": text,
        "method": Method.TOKEN_PATTERN,
        "code_version": "1.0",
        "author": "ada",
    }
    return NewExplanation(**(known | changes))


def score(value: float | None = 0.9, **changes: Any) -> NewScore:
    known: dict[str, Any] = {
        "scorer": Scorer.DETECTION,
        "measure": Measure.AUC,
        "value": value,
        "low": 0.8,
        "high": 1.0,
        "n": 20,
        "seed": 3,
        "judge": "offline",
        "dataset": "small",
        "dataset_hash": "cd",
        "code_version": "1.0",
    }
    return NewScore(**(known | changes))


def published(value: float, name: str = "ev_correlation") -> NewScore:
    return NewScore(measure_name=name, value=value)


async def test_an_explanation_comes_back_as_it_was_stored(store: ExplanationStore) -> None:
    given = new(
        'fires on " Mary"\x00 \U0001f600',
        method=Method.CONTRASTIVE,
        explainer_model="m",
        provider="host:1",
        prompt_hash="ef",
        seed=-(2**63),
        dataset="small",
        dataset_hash="cd",
        documents=frozenset({"doc-1", "doc-2"}),
        based_on="",
    )
    failures = {FailureKind.REFUSED: 2}
    stored = await store.add(given, [score(), score(None, low=None, failures=failures)], user="x")
    assert stored == await store.get(stored.id)
    for name in ("model", "component", "text", "method", "explainer_model", "provider", "seed"):
        assert getattr(stored, name) == getattr(given, name)
    for name in ("prompt_hash", "dataset", "dataset_hash", "code_version", "author", "based_on"):
        assert getattr(stored, name) == getattr(given, name)
    assert stored.documents == 2
    assert await store.documents(stored.id) == given.documents
    assert stored.ratings == Ratings()
    # The later of two scores of the same judge on the same data.
    (kept,) = stored.scores
    assert (kept.value, kept.failures, kept.chance) == (None, failures, 0.5)


async def test_what_is_not_there_is_not_found(store: ExplanationStore) -> None:
    for asked in (
        store.get("0"),
        store.documents("0"),
        store.rate("0", 3, user="ada"),
        store.delete("0"),
        store.score("0", [score()]),
    ):
        with pytest.raises(NotFound, match="no explanation '0'") as refused:
            await asked
        assert refused.value.field == "id"


async def test_ids_sort_by_time(store: ExplanationStore) -> None:
    ids = [(await store.add(new(str(number)))).id for number in range(5)]
    assert ids == sorted(ids)
    assert len(set(ids)) == 5
    assert await store.count() == 5


async def test_of_one_source_key_one_explanation_is_stored(store: ExplanationStore) -> None:
    first = await store.add(new("one", source_key="job/neuron.1.7"), [score(0.7)])
    again = await store.add(new("two", source_key="job/neuron.1.7"), [score(0.1)])
    assert again == first
    assert again.scores[0].value == 0.7
    added = await store.add_many(
        [(new("three", source_key="job/neuron.1.7"), ()), (new("four", source_key="b"), ())]
    )
    assert [each.is_new for each in added] == [False, True]
    assert added[0].id == first.id
    assert await store.count() == 2


async def test_two_at_once_with_one_source_key_are_one(store: ExplanationStore) -> None:
    given = [store.add(new(str(number), source_key="same")) for number in range(20)]
    assert len({each.id for each in await asyncio.gather(*given)}) == 1


async def test_all_of_many_are_stored_or_none(store: ExplanationStore) -> None:
    broken = new("two", seed=2**63)
    with pytest.raises(OverflowError):
        await store.add_many([(new("one"), ()), (broken, ())])
    assert await store.count() == 0


async def test_a_rating_is_one_of_each_user(store: ExplanationStore) -> None:
    id = (await store.add(new())).id
    assert await store.rate(id, 2, user="ada") == Ratings(1, 2.0, 2)
    assert await store.rate(id, 4, user="ben") == Ratings(2, 3.0, 4)
    assert await store.rate(id, 5, user="ada") == Ratings(2, 4.5, 5)
    assert (await store.get(id, user="ben")).ratings == Ratings(2, 4.5, 4)
    assert (await store.get(id, user="eve")).ratings == Ratings(2, 4.5, None)
    assert await store.rate(id, None, user="ada") == Ratings(1, 4.0, None)
    assert await store.rate(id, None, user="ben") == Ratings()


async def test_what_is_deleted_leaves_nothing(store: ExplanationStore, path: Path) -> None:
    id = (await store.add(new("a secret", documents=frozenset({"doc"})), [score()])).id
    await store.rate(id, 3, user="ada")
    await store.delete(id)
    with closing(sqlite3.connect(path)) as connection:
        for table in ("explanation", "explanation_document", "score", "rating"):
            assert connection.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,)
        found = connection.execute(
            "SELECT count(*) FROM explanation_text WHERE explanation_text MATCH 'secret'"
        )
        assert found.fetchone() == (0,)


async def test_weights_decide_what_is_shown(store: ExplanationStore) -> None:
    for model in (MODEL, ExplainedModel("demo"), ExplainedModel("demo", "cd"), ExplainedModel("x")):
        await store.add(new(f"{model.id}-{model.weights_hash[:2]}", model=model))

    async def shown(model: ExplainedModel) -> set[str]:
        return {each.text for each in await store.list(model, ["neuron.1.7"])}

    assert await shown(MODEL) == {"demo-ab", "demo-"}
    assert await shown(ExplainedModel("demo", "ef")) == {"demo-"}
    assert await shown(ExplainedModel("demo")) == {"demo-ab", "demo-", "demo-cd"}
    assert await shown(ExplainedModel("x", "ab" * 32)) == {"x-"}


async def test_a_latents_dictionary_decides_what_is_shown(store: ExplanationStore) -> None:
    def with_hash(hash: str) -> ExplainedModel:
        return replace(MODEL, dictionaries=(("d", hash), ("e", "99")))

    for hash in ("11", "22", ""):
        await store.add(new(f"of {hash}", model=with_hash(hash), component="latent.d.3"))
    await store.add(new("a neuron", model=with_hash("11")))

    async def shown(model: ExplainedModel, component: str = "latent.d.3") -> set[str]:
        return {each.text for each in await store.list(model, [component])}

    assert await shown(with_hash("11")) == {"of 11", "of "}
    assert await shown(with_hash("33")) == {"of "}
    assert await shown(MODEL) == {"of 11", "of 22", "of "}
    assert await shown(replace(MODEL, dictionaries=(("e", "99"),))) == {"of 11", "of 22", "of "}
    assert await shown(with_hash("33"), "neuron.1.7") == {"a neuron"}
    found = await store.list(with_hash("11"), ["latent.d.3"])
    assert [each.model.dictionaries for each in found] == [(), (("d", "11"),)]


async def test_explanations_come_in_the_order_asked_for(store: ExplanationStore) -> None:
    for component in ("neuron.1.7", "latent.d.3", "head.0.1", "neuron.1.7"):
        await store.add(new(component=component))
    asked = ["head.0.1", "neuron.9.9", "neuron.1.7", "latent.d.3"]
    found = await store.list(MODEL, asked)
    assert [each.component for each in found] == [
        "head.0.1", "neuron.1.7", "neuron.1.7", "latent.d.3"
    ]  # fmt: skip
    assert found[1].created_ms > found[2].created_ms
    found = await store.list(MODEL, asked, best_only=True)
    assert [each.component for each in found] == ["head.0.1", "neuron.1.7", "latent.d.3"]
    assert len(await store.list(MODEL, asked, most=2)) == 3


async def order(store: ExplanationStore) -> list[str]:
    found = await store.list(MODEL, ["neuron.1.7"])
    best = await store.list(MODEL, ["neuron.1.7"], best_only=True)
    assert [each.id for each in best] == [found[0].id]
    return [each.text for each in found]


async def test_judges_are_compared_with_themselves(store: ExplanationStore) -> None:
    await store.add(new("offline 0.9"), [score(0.9)])
    await store.add(new("offline 0.99"), [score(0.99)])
    await store.add(new("judged 0.6"), [score(0.6, judge="m")])
    await store.add(new("judged 0.7"), [score(0.7, judge="m"), score(0.1)])
    await store.add(new("old judge 0.8"), [score(0.8, judge="l")])
    await store.add(new("published 0.2", method=Method.IMPORTED), [published(0.2)])
    await store.add(new("published 0.3", method=Method.IMPORTED), [published(0.3)])
    await store.add(new("rsquared 0.9", method=Method.IMPORTED), [published(0.9, "rsquared")])
    await store.add(new("nothing is known"))
    others = score(1.0, scorer=Scorer.FUZZING), score(1.0, measure=Measure.BALANCED_ACCURACY)
    await store.add(new("other measures"), [*others, score(None)])
    assert await order(store) == [
        "old judge 0.8", "judged 0.7", "judged 0.6", "offline 0.99", "offline 0.9",
        "published 0.3", "published 0.2", "rsquared 0.9", "other measures", "nothing is known",
    ]  # fmt: skip


async def test_of_two_scores_the_newer_counts(store: ExplanationStore) -> None:
    first = await store.add(new("first"), [score(0.9)])
    await store.add(new("second"), [score(0.8)])
    assert await order(store) == ["first", "second"]
    await store.score(first.id, [score(0.5)])
    assert await order(store) == ["second", "first"]


async def test_a_score_that_comes_out_the_same_is_stored_once(
    store: ExplanationStore, path: Path
) -> None:
    id = (await store.add(new(), [score(0.9)])).id
    (first,) = (await store.get(id)).scores
    await store.score(id, [score(0.9)])
    await store.score(id, [score(0.9, n=10)])
    await store.score(id, [score(0.9)])
    (last,) = (await store.get(id)).scores
    assert last.created_ms > first.created_ms
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(*) FROM score").fetchone() == (2,)


async def test_what_people_write_comes_first(store: ExplanationStore) -> None:
    await store.add(new("machine"), [score(1.0)])
    one = await store.add(new("one", method=Method.HUMAN))
    two = await store.add(new("two", method=Method.HUMAN))
    assert await order(store) == ["two", "one", "machine"]
    await store.rate(one.id, 4, user="ada")
    assert await order(store) == ["one", "two", "machine"]
    # An edit stands for the text that it was made from, until it is rated itself.
    edit = await store.add(new("edited", method=Method.HUMAN, based_on=one.id))
    assert await order(store) == ["edited", "one", "two", "machine"]
    await store.rate(edit.id, 1, user="ada")
    assert await order(store) == ["one", "two", "edited", "machine"]
    await store.rate(two.id, 5, user="ada")
    assert await order(store) == ["two", "one", "edited", "machine"]


async def test_the_best_alone_has_the_scores_it_was_chosen_by(store: ExplanationStore) -> None:
    others = score(0.1, scorer=Scorer.FUZZING), score(0.2, measure=Measure.BALANCED_ACCURACY)
    await store.add(new(), [*others, score(0.3), published(0.4)])
    (whole,) = await store.list(MODEL, ["neuron.1.7"])
    (best,) = await store.list(MODEL, ["neuron.1.7"], best_only=True)
    assert [each.value for each in whole.scores] == [0.4, 0.3, 0.2, 0.1]
    assert [each.value for each in best.scores] == [0.4, 0.3]


async def test_ten_thousand_components_are_one_question(store: ExplanationStore) -> None:
    items = [(new(component=f"neuron.0.{number}"), ()) for number in range(1000)]
    await store.add_many(items)
    asked = [f"neuron.0.{number}" for number in range(10_000)]
    assert len(await store.list(MODEL, asked, best_only=True)) == 1000


WRITER = """
import asyncio, sys
from pathlib import Path
from tests.explainer.test_store import new, score
from services.explainer.database import Database
from services.explainer.store import ExplanationStore

async def main():
    store = ExplanationStore(Database(Path(sys.argv[1])))
    number = 0
    while True:
        scores = [score(each) for each in (0.1, 0.2, 0.3)]
        await store.add(new(str(number), documents=frozenset({"a", "b"})), scores)
        number += 1
        print(number, flush=True)

asyncio.run(main())
"""


def test_a_killed_process_leaves_whole_explanations(path: Path) -> None:
    for _ in range(2):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert writer.stdout is not None
        for _ in range(5):
            said = int(writer.stdout.readline())
        writer.send_signal(signal.SIGKILL)
        said = max([said, *map(int, writer.stdout.read().split())])
        writer.wait()
        writer.stdout.close()
    with closing(sqlite3.connect(path)) as connection:
        (count,) = connection.execute("SELECT count(*) FROM explanation").fetchone()
        assert count >= said + 5
        for table, each in (("explanation_document", 2), ("score", 3)):
            found = connection.execute(f"SELECT count(*) FROM {table}").fetchone()
            assert found == (each * count,)
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
