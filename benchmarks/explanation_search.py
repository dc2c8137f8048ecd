"""Search among many explanations: by words and by meaning, and importing them, as the service does.

    python -m benchmarks.explanation_search [--explanations 100000] [--width 1536]

Texts are words drawn by Zipf's law, vectors are drawn from the sphere; the store is a file of its
own. Each figure is of one search as the service makes it, from the question to the explanations of
its first page, of 100. The query's own embedding, which its endpoint makes, takes no time here. CPU
time, of one thread, is about what the figure would be on a machine with nothing else to do.
"""

import argparse
import asyncio
import resource
import statistics
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from services.explainer.database import Database
from services.explainer.embedding import put
from services.explainer.engine.budget import Ledger
from services.explainer.engine.embeddings import Vectors
from services.explainer.engine.explanations import Method
from services.explainer.search import Filter, Mode, Question, Search
from services.explainer.store import ExplanationStore
from services.explainer.stored import ExplainedModel, NewExplanation, NewScore

MODEL = ExplainedModel("gpt2", "ab" * 32)
WORDS, LONG, BATCH = 20_000, 15, 1000


class Sphere:
    """Stands in for the endpoint: vectors of length 1, drawn."""

    model, host = "drawn", "nowhere"

    def __init__(self, width: int) -> None:
        self._width = width
        self._numbers = np.random.default_rng(0)

    async def embed(self, texts: Sequence[str], ledger: Ledger) -> Vectors:
        drawn = self._numbers.standard_normal((len(texts), self._width), dtype=np.float32)
        scaled: Vectors = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
        return scaled


async def fill(database: Database, count: int, sphere: Sphere) -> None:
    store = ExplanationStore(database)
    numbers = np.random.default_rng(1)
    started, embedding = time.perf_counter(), 0.0
    for start in range(0, count, BATCH):
        drawn = numbers.zipf(1.3, (BATCH, LONG)) % WORDS
        new = [
            NewExplanation(
                model=MODEL,
                component=f"neuron.{number % 12}.{number // 12}",
                text=" ".join(f"word{word}" for word in drawn[number - start]),
                method=Method.IMPORTED,
                code_version="1",
                author="benchmark",
                source_key=f"imported/{number}",
            )
            for number in range(start, start + BATCH)
        ]
        await store.add_many([(each, [NewScore(measure_name="x", value=0.5)]) for each in new])
        before = time.perf_counter()
        vectors = await sphere.embed([each.text for each in new], Ledger())
        stored = range(start + 1, start + BATCH + 1)
        await database.write(partial(put, model=sphere.model, explanations=stored, vectors=vectors))
        embedding += time.perf_counter() - before
    taken = time.perf_counter() - started - embedding
    print(f"stored with a score each: {count / taken:,.0f} a second; vectors {embedding:.0f} s")


async def timed(name: str, search: Search, question: Question, times: int) -> None:
    wall, cpu = [], []
    for _ in range(times + 1):
        started, used = time.perf_counter(), time.process_time()
        page = await search.find(question, limit=100)
        wall.append((time.perf_counter() - started) * 1e3)
        cpu.append((time.process_time() - used) * 1e3)
    print(
        f"{name:>20}  first {wall[0]:6.0f} ms  then p50 {statistics.median(wall[1:]):5.0f} ms, "
        f"of it CPU {statistics.median(cpu[1:]):5.0f} ms  ({page.total:,} found)"
    )


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--explanations", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--times", type=int, default=20)
    arguments = parser.parse_args()
    sphere = Sphere(arguments.width)
    with tempfile.TemporaryDirectory() as folder:
        database = Database(Path(folder) / "explanations.sqlite3")
        await fill(database, arguments.explanations, sphere)
        search = Search(database, sphere)
        filters = {
            "all": Filter(),
            "one model": Filter(MODEL),
            "one group": Filter(MODEL, ("neuron.3",)),
        }
        for mode, query in ((Mode.WORDS, "word7 word11"), (Mode.MEANING, "word7")):
            for name, filter in filters.items():
                question = Question(query, mode, filter)
                await timed(f"{mode.name.lower()}, {name}", search, question, arguments.times)
        database.close()
    print(f"resident at most {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MiB")


if __name__ == "__main__":
    asyncio.run(main())
