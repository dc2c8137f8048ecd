"""Explanations are found by their words, and by what they mean."""

import sqlite3
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.common.errors import FailedPrecondition, InvalidArgument, Unavailable
from services.common.setting_values import Secret
from services.explainer.database import Database
from services.explainer.embedding import Embedded, Embedding
from services.explainer.engine.budget import Budget, BudgetExceeded
from services.explainer.engine.embeddings import EmbeddingsNotConfigured
from services.explainer.engine.explanations import Method
from services.explainer.engine.openai_calls import ATTEMPTS
from services.explainer.engine.openai_embeddings import OpenAIEmbeddings
from services.explainer.engine.provider_settings import Endpoint
from services.explainer.pages import Pages, Ranking
from services.explainer.search import Filter, Mode, Page, Question, Search, words
from services.explainer.store import ExplanationStore
from services.explainer.stored import ExplainedModel, NewExplanation
from services.explainer.vectors import Vectors, stored
from tests.explainer.openai_server import EMBEDDING_MODEL, KEY, Fault, OpenAIServer, failing

MODEL = ExplainedModel("demo", "ab" * 32)
TEXTS = {
    "neuron.0.1": 'Fires on the token " Mary" (10). Promotes " her", " she".',
    "neuron.0.2": "names of women",
    "neuron.1.1": "names of towns, and the word of",
    "head.0.3": "looks from a name to its earlier copy",
    "latent.D.0": "naïve cafés",
}
MEANINGS = {"female": (1, 0), "woman": (1, 0), "women": (1, 0), "her": (1, 0), "towns": (0, 1)}


def meaning(text: str) -> list[float]:
    """A vector that knows two things: women and towns."""
    vector = np.array([0.0, 0.0, 0.1])
    for word in words(text.casefold()):
        vector[:2] += MEANINGS.get(word, (0, 0))
    return [float(value) for value in vector]


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    made = Database(tmp_path / "explanations.sqlite3", 2**30)
    yield made
    made.close()


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with OpenAIServer() as running:
        running.embedding = meaning
        yield running


@pytest.fixture
async def embeddings(server: OpenAIServer) -> AsyncIterator[OpenAIEmbeddings]:
    async def sleep(seconds: float) -> None:
        pass

    endpoint = Endpoint(server.url, EMBEDDING_MODEL, Secret(KEY), 30.0, "TDB_EMBEDDING")
    made = OpenAIEmbeddings(endpoint, sleep=sleep)
    yield made
    await made.close()


async def fill(database: Database, texts: dict[str, str] = TEXTS, **more: Any) -> list[str]:
    """The ids."""
    given = {"model": MODEL, "method": Method.HUMAN, "code_version": "1", "author": "ann", **more}
    added = await ExplanationStore(database).add_many(
        [(NewExplanation(component=each, text=text, **given), ()) for each, text in texts.items()]
    )
    return [each.id for each in added]


async def find(
    database: Database,
    query: str,
    mode: Mode = Mode.WORDS,
    embeddings: OpenAIEmbeddings | None = None,
    **filter: Any,
) -> Page:
    question = Question(query, mode, Filter(**filter))
    return await Search(database, embeddings).find(question, limit=100)


def components(page: Page) -> list[str]:
    return [explanation.component for explanation, _ in page.found]


async def embed(
    database: Database, embeddings: OpenAIEmbeddings, most: int = 10**6, **filter: Any
) -> Embedded:
    steps = [
        each
        async for each in Embedding(database, embeddings).run(
            Filter(**filter), Budget(max_tokens=most)
        )
    ]
    return steps[-1]


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("names", {"neuron.0.2", "neuron.1.1"}),
        ("NAME", {"neuron.0.2", "neuron.1.1", "head.0.3"}),
        ("name wom", {"neuron.0.2"}),
        ("women names", {"neuron.0.2"}),
        ("naive CAFE", {"latent.D.0"}),
        ('" Mary"', {"neuron.0.1"}),
        ("ames", set()),
        ("names women towns", set()),
    ],
)
async def test_each_word_or_one_that_starts_with_it_stands_in_the_text(
    database: Database, query: str, found: set[str]
) -> None:
    await fill(database)
    page = await find(database, query)
    assert set(components(page)) == found
    assert (page.total, page.next_cursor, page.without_embedding) == (len(found), "", 0)


@pytest.mark.parametrize(
    "query",
    ["names OR women", "NOT names", "NEAR(names women)", "text:names", "names*", "^names",
     "names AND", "(names", "names -women", "na+mes", "{names}", "names'", "names\x00",
     '"names"', "a b" * 300],
)  # fmt: skip
async def test_no_sign_of_a_query_is_an_operator(database: Database, query: str) -> None:
    await fill(database, {"neuron.0.0": "nothing", "neuron.0.1": "names or NOT near text, women"})
    page = await find(database, query)
    plain = await find(database, " ".join(words(query)))
    assert page.found == plain.found
    assert "neuron.0.0" not in components(page)


@pytest.mark.parametrize("query", ["", " ", "?!", '"*"', "-", "\n\t", "…", "😀", "a" * 1001])
@pytest.mark.parametrize("mode", Mode)
def test_a_query_without_a_word_is_refused(query: str, mode: Mode) -> None:
    with pytest.raises(InvalidArgument) as refused:
        Question(query, mode)
    assert refused.value.field == "query"


async def test_the_best_come_first_and_the_newest_of_equals(database: Database) -> None:
    texts = {
        "neuron.0.0": "cats among many other words that are here so that this text is long",
        "neuron.0.1": "cats",
        "neuron.0.2": "cats and cats",
        "neuron.0.3": "dogs",
        "neuron.0.4": "cats",
    }
    await fill(database, texts)
    page = await find(database, "cats")
    assert components(page)[:2] in (["neuron.0.4", "neuron.0.1"], ["neuron.0.2", "neuron.0.4"])
    assert components(page)[-1] == "neuron.0.0"
    relevances = [relevance for _, relevance in page.found]
    assert relevances == sorted(relevances, reverse=True)


@pytest.mark.parametrize("mode", Mode)
async def test_filters(database: Database, embeddings: OpenAIEmbeddings, mode: Mode) -> None:
    await fill(database)
    await fill(database, {"neuron.0.1": "names"}, method=Method.TOKEN_PATTERN)
    await fill(database, {"neuron.0.1": "names"}, model=ExplainedModel("demo", "cd" * 32))
    await fill(database, {"neuron.0.1": "names"}, model=ExplainedModel("demo"))
    await fill(database, {"neuron.0.1": "names"}, model=ExplainedModel("other"))
    await embed(database, embeddings)

    async def count(**filter: Any) -> int:
        return (await find(database, "name", mode, embeddings, **filter)).total

    everything = {Mode.WORDS: 3, Mode.MEANING: 5}[mode]
    assert await count() == everything + 4
    assert await count(model=MODEL) == everything + 2
    assert await count(model=ExplainedModel("demo")) == everything + 3
    assert await count(model=ExplainedModel("other", "ef" * 32)) == 1
    assert await count(model=ExplainedModel("nobody")) == 0
    assert await count(groups=("head.0", "neuron.1")) == 2
    assert await count(groups=("latent.D",)) == everything - (3 if mode is Mode.WORDS else 4)
    assert await count(methods=(Method.TOKEN_PATTERN,)) == 1
    assert await count(methods=(Method.TOKEN_PATTERN,), groups=("head.0",)) == 0


async def test_what_is_deleted_is_not_found(
    database: Database, embeddings: OpenAIEmbeddings
) -> None:
    ids = await fill(database)
    await embed(database, embeddings)
    search = Search(database, embeddings)
    meant = Question("women", Mode.MEANING)
    assert (await search.find(meant, limit=10)).total == 5
    await ExplanationStore(database).delete(ids[1])
    assert components(await search.find(Question("women"), limit=10)) == []
    page = await search.find(meant, limit=10)
    assert "neuron.0.2" not in components(page)
    assert (page.total, page.without_embedding) == (4, 0)
    # The number of what was deleted may be given again, to something that has no embedding.
    await ExplanationStore(database).delete(ids[4])
    await fill(database, {"neuron.5.5": "new"})
    page = await search.find(meant, limit=10)
    assert "neuron.5.5" not in components(page)
    assert (page.total, page.without_embedding) == (3, 1)


@pytest.mark.parametrize("mode", Mode)
async def test_pages_fit_together_whatever_happens_meanwhile(
    database: Database, embeddings: OpenAIEmbeddings, mode: Mode
) -> None:
    ids = await fill(database, {f"neuron.0.{n}": f"names of women {'x ' * n}" for n in range(25)})
    await embed(database, embeddings)
    search = Search(database, embeddings)
    question = Question("women", mode)
    whole = components(await search.find(question, limit=100))
    assert len(whole) == 25
    seen: list[str] = []
    page = await search.find(question, limit=10)
    while True:
        seen += components(page)
        assert page.total == 25
        if not page.next_cursor:
            break
        await fill(database, {"neuron.1.0": "women women"})
        page = await search.find(question, limit=10, cursor_at=page.next_cursor)
    assert seen == whole
    page = await search.find(question, limit=10)
    await ExplanationStore(database).delete(ids[int(whole[-1].rpartition(".")[2])])
    rest = await search.find(question, limit=100, cursor_at=page.next_cursor)
    assert len(rest.found) == page.total - 10 - 1


async def test_cursors_of_others_are_refused(database: Database) -> None:
    await fill(database)
    search = Search(database, None)
    cursor = (await search.find(Question("name"), limit=1)).next_cursor
    for other in (Question("names"), Question("name", filter=Filter(groups=("head.0",)))):
        with pytest.raises(InvalidArgument, match="something else") as refused:
            await search.find(other, limit=1, cursor_at=cursor)
        assert refused.value.field == "cursor"
    for wrong in ("x", cursor + "0000000000", cursor.replace(".", ":"), "." + cursor):
        with pytest.raises(InvalidArgument, match="no cursor"):
            await search.find(Question("name"), limit=1, cursor_at=wrong)
    with pytest.raises(InvalidArgument):
        await search.find(Question("name"), limit=1, cursor_at=cursor + "99")
    with pytest.raises(FailedPrecondition) as expired:
        await Search(database, None).find(Question("name"), limit=1, cursor_at=cursor)
    assert (expired.value.reason, expired.value.field) == ("CURSOR_EXPIRED", "cursor")


def test_what_is_kept_is_bounded() -> None:
    pages = Pages(most_bytes=100)
    ranking = Ranking(np.arange(3), np.zeros(3))
    first, second, third = (pages.keep(number, ranking) for number in range(3))
    with pytest.raises(FailedPrecondition):
        pages.find(f"{first}.1", 0)
    assert pages.find(f"{second}.1", 1)[2] == 1
    pages.keep(3, ranking)
    assert pages.find(f"{second}.1", 1)
    with pytest.raises(FailedPrecondition):
        pages.find(f"{third}.1", 2)


async def test_meaning_finds_what_words_do_not(
    database: Database, embeddings: OpenAIEmbeddings
) -> None:
    await fill(database)
    assert (await embed(database, embeddings)).done == 5
    assert components(await find(database, "female")) == []
    page = await find(database, "female", Mode.MEANING, embeddings)
    assert components(page)[:2] == ["neuron.0.2", "neuron.0.1"]
    assert (page.total, page.without_embedding) == (5, 0)
    expected = {each: meaning(text) for each, text in TEXTS.items()}
    query = np.array(meaning("female"))
    for explanation, cosine in page.found:
        other = np.array(expected[explanation.component])
        assert cosine == pytest.approx(
            query @ other / np.linalg.norm(query) / np.linalg.norm(other), abs=1e-6
        )


async def test_nothing_is_sent_unless_it_is_asked_for(
    database: Database, embeddings: OpenAIEmbeddings, server: OpenAIServer
) -> None:
    await fill(database)
    await find(database, "names", Mode.WORDS, embeddings)
    assert server.requests == []
    search = Search(database, embeddings)
    page = await search.find(Question("women", Mode.MEANING), limit=100)
    assert (page.total, page.without_embedding) == (0, 5)
    assert [each["input"] for each in server.requests] == [["women"]]
    await search.find(Question("women", Mode.MEANING), limit=100)
    assert len(server.requests) == 1, "the same query is paid for once"
    estimate = await Embedding(database, embeddings).estimate(Filter())
    assert (estimate.explanations, estimate.calls) == (5, 1)
    assert len(server.requests) == 1
    done = await embed(database, embeddings, most=estimate.most_tokens)
    assert (done.total, done.done, done.refused) == (5, 5, 0)
    assert done.ledger.tokens <= estimate.most_tokens
    assert server.requests[1]["input"] == list(TEXTS.values())
    page = await search.find(Question("women", Mode.MEANING), limit=100)
    assert (page.total, page.without_embedding) == (5, 0)


async def test_what_was_paid_for_is_not_paid_again(
    database: Database, embeddings: OpenAIEmbeddings, server: OpenAIServer
) -> None:
    texts = {f"neuron.0.{number}": f"text {number} {'of women' * number}" for number in range(96)}
    await fill(database, texts)
    with pytest.raises(BudgetExceeded):
        await embed(database, embeddings, most=5500)
    first = [text for body in server.requests for text in body["input"]]
    assert 0 < len(first) < 96
    server.requests.clear()
    done = await embed(database, embeddings)
    again = [text for body in server.requests for text in body["input"]]
    assert sorted([*first, *again]) == sorted([*texts.values(), "width"])
    assert done.done == 96 - len(first)
    server.requests.clear()
    assert (await embed(database, embeddings)).total == 0
    assert [each["input"] for each in server.requests] == [["width"]]


async def test_only_what_is_asked_for_is_embedded(
    database: Database, embeddings: OpenAIEmbeddings
) -> None:
    await fill(database)
    await fill(database, {"neuron.0.1": "names"}, model=ExplainedModel("other"))
    assert (await embed(database, embeddings, model=ExplainedModel("other"))).done == 1
    page = await find(database, "women", Mode.MEANING, embeddings)
    assert (page.total, page.without_embedding) == (1, 5)
    page = await find(database, "women", Mode.MEANING, embeddings, model=MODEL)
    assert (page.total, page.without_embedding) == (0, 5)


async def test_a_text_that_is_not_taken_stops_no_other(
    database: Database, embeddings: OpenAIEmbeddings, server: OpenAIServer
) -> None:
    await fill(database)
    server.faults.extend(
        [Fault(400, {"message": "too long"}), Fault(), Fault(400, {"message": "too long"})]
    )
    done = await embed(database, embeddings)
    assert (done.total, done.done, done.refused) == (5, 4, 1)
    page = await find(database, "women", Mode.MEANING, embeddings)
    assert (page.total, page.without_embedding) == (4, 1)


async def test_an_endpoint_that_is_down_loses_nothing(
    database: Database, embeddings: OpenAIEmbeddings, server: OpenAIServer
) -> None:
    await fill(database, {f"neuron.0.{number}": f"text {number}" for number in range(200)})
    server.faults.extend([Fault()] * 4 + [failing()] * 3 * ATTEMPTS)
    with pytest.raises(Unavailable):
        await embed(database, embeddings)
    assert (await embed(database, embeddings)).total == 200 - 4 * 32


async def test_embeddings_of_another_model_are_not_compared(
    database: Database, embeddings: OpenAIEmbeddings, server: OpenAIServer
) -> None:
    await fill(database)
    await embed(database, embeddings)
    server.embedding = lambda text: [*meaning(text), 0.5]
    page = await find(database, "women", Mode.MEANING, embeddings)
    assert (page.total, page.without_embedding) == (0, 5)
    assert (await embed(database, embeddings)).done == 5
    page = await find(database, "women", Mode.MEANING, embeddings)
    assert (page.total, page.without_embedding) == (5, 0)


async def test_without_an_endpoint_one_reads_how_to_have_one(database: Database) -> None:
    await fill(database)
    for work in (
        find(database, "women", Mode.MEANING),
        Embedding(database, None).estimate(Filter()),
        anext(Embedding(database, None).run(Filter(), Budget())),
    ):
        with pytest.raises(EmbeddingsNotConfigured, match="TDB_EMBEDDING_URL") as refused:
            await work
        assert refused.value.reason == "EMBEDDINGS_NOT_CONFIGURED"


async def test_memory_is_bounded_and_the_answer_the_same(database: Database) -> None:
    await fill(database, {f"neuron.0.{number}": "x" for number in range(2500)})
    random = np.random.default_rng(0)
    vectors = random.normal(size=(2500, 4)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)

    def put(connection: sqlite3.Connection, start: int, stop: int) -> None:
        connection.executemany(
            "INSERT INTO embedding (explanation, model, vector) VALUES (?, 'm', ?)",
            [(number + 1, stored(vectors[number])) for number in range(start, stop)],
        )

    kept, streamed = Vectors("m"), Vectors("m", most_bytes=0)
    for start, stop in ((0, 700), (700, 2500)):
        await database.write(partial(put, start=start, stop=stop))
        for held in (kept, streamed):
            explanations, cosines = await database.read(partial(held.compare, query=vectors[3]))
            order = np.argsort(explanations)
            assert explanations[order].tolist() == list(range(1, stop + 1))
            np.testing.assert_allclose(cosines[order], vectors[:stop] @ vectors[3], atol=1e-6)
    assert streamed.bytes == 0
    assert kept.bytes > 0
