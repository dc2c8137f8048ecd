"""A dataset of the demo's model whose neurons and heads do what is planted: what they are explained
by is known.

Neuron i fires at one word, and a head looks back from the end at one; a text has one word, or none.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from tdb.dataset.v1 import dataset_pb2, record_pb2

from services.dataset import explanations, groups
from services.dataset.explanations import Explanation
from services.dataset.store import DatasetWriter

DATASET = "planted"
LAYER = 1
WORDS = (" Mary", " John", " store", " park", " drink", " book", " ball", " ring")
HEADS, NEURONS = 8, 16
PUBLISHED = [
    Explanation(f"neuron.{LAYER}.8", "things of a shop", scores={"ev_correlation": 0.42}),
    Explanation(f"neuron.{LAYER}.9", "games", "oai_token-act-pair", "gpt-4o"),
]
"""What the dataset brings along."""
TEXTS = [
    f"{start}{first}{middle}{second} today"
    for start in ("When", "Then", "Once")
    for first in WORDS[:4]
    for middle in (" and the", " with a")
    for second in WORDS[4:]
]


def call(product: str, method: str, request: dict[str, Any]) -> dict[str, Any]:
    answer = httpx.post(f"{product}{method}", json=request, timeout=60)
    answer.raise_for_status()
    found: dict[str, Any] = answer.json()
    return found


def explainer(product: str, method: str, request: dict[str, Any]) -> dict[str, Any]:
    return call(product, f"tdb.explainer.v1.ExplainerService/{method}", request)


def streamed(product: str, method: str, request: dict[str, Any]) -> str:
    """All that a stream of the explainer brings, as server-sent events."""
    url = f"{product}tdb.explainer.v1.ExplainerService/{method}"
    headers = {"accept": "text/event-stream"}
    answer = httpx.post(url, json=request, headers=headers, timeout=60)
    answer.raise_for_status()
    return answer.text


class Planted:
    def __init__(self, product: str) -> None:
        self.product = product
        service = "tdb.inference.v1.InferenceService"
        self.model = call(product, f"{service}/GetModel", {})["model"]
        self.tokens = [
            call(product, f"{service}/Tokenize", {"prompt": {"text": text}})["tokens"]
            for text in TEXTS
        ]

    def of(self) -> dict[str, str]:
        """The model, as explanations name it."""
        return {"id": self.model["id"], "weightsHash": self.model["weightsHash"]}

    def vocabulary(self) -> list[str]:
        texts = {each.get("id", 0): each["text"] for own in self.tokens for each in own}
        return [texts.get(token, f"<{token}>") for token in range(max(texts) + 1)]

    def neuron(self, index: int) -> record_pb2.ComponentRecord:
        """Fires at WORDS[index], by 4 plus a little that depends on the text; further ones are
        silent."""
        word = dict(enumerate(WORDS)).get(index)
        rows = [
            [(4.0 + number % 7 / 10) * (each["text"] == word) for each in own]
            for number, own in enumerate(self.tokens)
        ]
        return self._record(f"neuron.{LAYER}.{index}", rows, "activations")

    def head(self, index: int) -> record_pb2.ComponentRecord:
        """Looks from the last token to WORDS[index], and else to itself, weakly."""
        rows = []
        for own in self.tokens:
            square = np.full((len(own), len(own)), 0.01)
            for key, each in enumerate(own):
                if each["text"] == WORDS[index % len(WORDS)]:
                    square[-1, key] = 0.9
            rows.append(square[np.tril_indices(len(own))].tolist())
        return self._record(f"head.{LAYER}.{index}", rows, "pair_activations")

    def _record(
        self, component: str, rows: list[list[float]], values: str
    ) -> record_pb2.ComponentRecord:
        made = record_pb2.ComponentRecord(component=component)
        examples = []
        for number, (own, row) in enumerate(zip(self.tokens, rows, strict=True)):
            example = record_pb2.Example(
                token_ids=[each.get("id", 0) for each in own], document_id=f"text-{number}"
            )
            getattr(example, values).extend(row)
            examples.append(example)
        order = sorted(range(len(rows)), key=lambda number: -max(rows[number]))
        made.top.extend(examples[number] for number in order[:20])
        made.random.extend(examples[number] for number in order[20:])
        every = np.concatenate([np.asarray(row) for row in rows])
        statistics = made.statistics
        statistics.count = every.size
        statistics.max, statistics.min = float(every.max()), float(every.min())
        statistics.mean, statistics.variance = float(every.mean()), float(every.var())
        statistics.fraction_active = float((every > 0.1).mean())
        return made


def forget(there: Planted) -> None:
    """Takes all explanations of what is planted away."""
    every = [f"neuron.{LAYER}.{index}" for index in range(NEURONS)]
    every += [f"head.{LAYER}.{index}" for index in range(HEADS)]
    asked = {"model": there.of(), "components": every}
    for each in explainer(there.product, "ListExplanations", asked)["explanations"]:
        explainer(there.product, "DeleteExplanation", {"id": each["id"]})


@contextmanager
def planted(product: str, data: Path) -> Iterator[Planted]:
    """Serves the dataset, and takes it and all explanations away at the end."""
    found = Planted(product)
    header = dataset_pb2.DatasetHeader(
        source=dataset_pb2.SOURCE_BUILT,
        model=dataset_pb2.RecordedModel(
            id=found.model["id"], weights_hash=found.model["weightsHash"]
        ),
        corpus=dataset_pb2.Corpus(name="planted", tokens=sum(map(len, found.tokens))),
    )
    folder = data / "datasets" / DATASET
    with DatasetWriter(folder, header) as writer:
        for name, made in (
            (f"neuron.{LAYER}", [found.neuron(index) for index in range(NEURONS)]),
            (f"head.{LAYER}", [found.head(index) for index in range(HEADS)]),
        ):
            writer.write(groups.parse_component(f"{name}.0")[0], 0, made)
        writer.finish(found.vocabulary(), explanations=explanations.write(folder, PUBLISHED))
    try:
        yield found
    finally:
        call(product, "tdb.dataset.v1.DatasetService/DeleteDataset", {"dataset": DATASET})
