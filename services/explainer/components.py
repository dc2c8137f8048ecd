"""Components as the dataset service knows them, in the engine's terms.

    subject = await Records(upstream).fetch("demo", "neuron.1.7")

A record holds an example in several places (a top example may also be one of a quantile, or drawn
at random); the engine has each once.
"""

import asyncio
import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

from tdb.dataset.v1 import dataset_pb2, read_pb2, record_pb2

from services.common.addresses import Kind, parse
from services.common.errors import FailedPrecondition, NotFound, TdbError, Unavailable, inside
from services.explainer.engine.components import Component, Example, HeadExample, TextScore
from services.explainer.read_outs import AGAIN_S, read_out
from services.explainer.stored import Dataset, ExplainedModel
from services.explainer.upstream import Upstream

E = TypeVar("E", Example, HeadExample)

_log = logging.getLogger("tdb.explainer")


@dataclass(frozen=True)
class Subject:
    """What is explained: a component with its examples, and the dataset that they are from.

    `fraction_active` is the share of the corpus where it is active, None where that is not known.
    """

    component: Component
    dataset: Dataset
    fraction_active: float | None = None

    @property
    def address(self) -> str:
        return self.component.address


class Records:
    """Reads components. Raises what the dataset service refuses, as it does."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self._known: dict[str, Dataset] = {}
        self._ask_again = 0.0

    async def fetch(
        self, dataset: str, address: str, *, read_outs: bool, required: bool = False
    ) -> Subject:
        """One component; with `read_outs` what it promotes and suppresses too, where that is known:
        from its record, else from the inference service where that has the same weights. Where that
        is away an explanation does without, unless it is `required`: Unavailable."""
        request = read_pb2.GetRecordRequest(dataset=dataset, component=address)
        response = await self._upstream.dataset.GetRecord(request)
        found = await self.dataset(dataset, response.manifest_hash)
        statistics = response.record.statistics
        active = statistics.fraction_active if statistics.HasField("fraction_active") else None
        component = await asyncio.to_thread(component_of, response.record)
        subject = Subject(component, found, active)
        if not read_outs:
            return subject
        return await self.with_read_outs(subject, required=required)

    async def dataset(self, name: str, manifest_hash: str = "") -> Dataset:
        """What the dataset is about; with a hash, of that version of it. Raises NotFound."""
        known = self._known.get(name)
        if known is not None and known.hash == manifest_hash:
            return known
        response = await self._upstream.dataset.ListDatasets(dataset_pb2.ListDatasetsRequest())
        for each in response.datasets:
            if each.name == name:
                if manifest_hash not in ("", each.manifest_hash):
                    raise Unavailable(
                        f"the dataset {name!r} is being replaced", field="dataset", retry_after_s=1
                    )
                self._known[name] = dataset_of(name, each.manifest_hash, each.header)
                return self._known[name]
        raise NotFound(f"there is no dataset {name!r}", field="dataset")

    async def with_read_outs(self, subject: Subject, *, required: bool = False) -> Subject:
        """With what the component promotes and suppresses, where the record does not say and the
        inference service does."""
        now = time.monotonic()
        if subject.component.promoted or (now < self._ask_again and not required):
            return subject
        try:
            found = await read_out(self._upstream, subject.dataset, subject.address)
        except Unavailable as error:
            if required:
                raise
            # Many components would wait for it in vain, one after the other.
            self._ask_again = now + AGAIN_S
            _log.info("no read-outs for now", extra={"fields": {"why": error.message}})
            return subject
        if found is None:
            return subject
        component = replace(subject.component, promoted=found.promoted, suppressed=found.suppressed)
        return replace(subject, component=component)


def dataset_of(name: str, hash: str, header: dataset_pb2.DatasetHeader) -> Dataset:
    return Dataset(
        name,
        hash,
        ExplainedModel(
            header.model.id,
            header.model.weights_hash,
            tuple((each.id, each.weights_hash) for each in header.model.dictionaries),
        ),
    )


def component_of(record: record_pb2.ComponentRecord) -> Component:
    """The engine's component. Raises FailedPrecondition where the record cannot be read as one."""
    try:
        return _component(record)
    except TdbError as error:
        raise FailedPrecondition(
            f"the record of {record.component} cannot be explained: {error.message} "
            f"({error.field})",
            field="component",
            reason="RECORD_UNREADABLE",
        ) from None


def _component(record: record_pb2.ComponentRecord) -> Component:
    with inside("component"):
        is_head = parse(record.component).kind is Kind.HEAD
    examples: tuple[Example, ...] | tuple[HeadExample, ...]
    if is_head:
        examples = _distinct(map(_head_example, _examples(record)))
    else:
        examples = _distinct(map(_example, _examples(record)))
    return Component(
        address=record.component,
        examples=examples,
        promoted=_text_scores(record.promoted),
        suppressed=_text_scores(record.suppressed),
        max_activation=record.statistics.max if record.statistics.HasField("max") else None,
    )


def _examples(record: record_pb2.ComponentRecord) -> Iterator[record_pb2.Example]:
    yield from record.top
    for quantile in record.quantiles:
        yield from quantile.examples
    yield from record.random


def _example(example: record_pb2.Example) -> Example:
    return Example(
        token_texts=_texts(example),
        token_ids=tuple(example.token_ids),
        activations=tuple(example.activations),
        document_id=example.document_id,
        document_offset=_offset(example),
    )


def _head_example(example: record_pb2.Example) -> HeadExample:
    return HeadExample(
        token_texts=_texts(example),
        token_ids=tuple(example.token_ids),
        pair_activations=tuple(example.pair_activations),
        pair_width=example.pair_width if example.HasField("pair_width") else None,
        document_id=example.document_id,
        document_offset=_offset(example),
    )


def _texts(example: record_pb2.Example) -> tuple[str, ...]:
    """Where the dataset does not know them, its tokens are shown as their ids, as everywhere."""
    return tuple(example.token_texts) or tuple(f"<{each}>" for each in example.token_ids)


def _offset(example: record_pb2.Example) -> int | None:
    return example.document_offset if example.HasField("document_offset") else None


def _distinct(examples: Iterator[E]) -> tuple[E, ...]:
    return tuple(dict.fromkeys(examples))


def _text_scores(scores: Iterable[record_pb2.TextScore]) -> tuple[TextScore, ...]:
    return tuple(TextScore(each.text, each.score) for each in scores)
