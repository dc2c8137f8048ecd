"""From the merged state of a group to its records."""

import math
from collections.abc import Callable, Iterator

import numpy as np
from tdb.dataset.v1 import record_pb2

from services.common.harvest import reading
from services.common.harvest.state import State
from services.dataset import groups
from services.dataset.building.array_file import Array
from services.dataset.building.output_tokens import OutputTokens

TOKEN_STATISTICS = 10
"""Vocabulary entries named in a record."""

Record = record_pb2.ComponentRecord

Lookup = Callable[[int], tuple[Array, str, int]]
"""A sequence's ids, its document's id, and where in it the sequence starts."""


def records(
    state: State,
    output: OutputTokens | None,
    quantiles: int,
    lookup: Lookup,
    start: int,
    stop: int,
) -> Iterator[record_pb2.ComponentRecord]:
    """The records of components `start` to `stop` of a group, by index. `output` is what they
    promote and suppress; heads have none."""
    group = groups.parse(state.group)
    statistics = reading.statistics(state)
    for index in range(start, stop):
        record = record_pb2.ComponentRecord(component=group.component(index))
        largest = float(statistics.largest[index])
        if largest > 0 or not group.dictionary:  # a latent that is silent has no top
            for example in reading.top(state, index):
                _add(record.top.add(), example, state, lookup)
        for interval in reading.intervals(state, index, quantiles) if quantiles else ():
            added = record.quantiles.add(
                lower=interval.lower, upper=interval.upper, fraction=interval.fraction
            )
            for example in interval.examples:
                _add(added.examples.add(), example, state, lookup)
        for example in reading.random(state, index):
            _add(record.random.add(), example, state, lookup)
        _state_statistics(record.statistics, statistics, state, index)
        if output is not None:
            output.add_to(record, index)
        record.token_statistics.extend(_by_mean(state, "token", index))
        if state.is_of_heads:
            record.key_token_statistics.extend(_by_mean(state, "key_token", index))
        yield record


def _add(added: record_pb2.Example, example: reading.Example, state: State, lookup: Lookup) -> None:
    ids, document, offset = lookup(example.sequence)
    if len(ids) != example.tokens:
        raise ValueError(f"sequence {example.sequence} has {len(ids)} tokens, not {example.tokens}")
    added.token_ids.extend(ids.tolist())
    added.document_id = document
    added.document_offset = offset
    if not state.is_of_heads:
        added.activations.extend(example.activations.tolist())
        return
    added.pair_activations.extend(example.activations.tolist())
    if state.window is not None and state.window < example.tokens:
        added.pair_width = state.window


def _state_statistics(
    stated: record_pb2.Statistics, found: reading.Statistics, state: State, index: int
) -> None:
    stated.count = state.count
    for name, values in (
        ("max", found.largest),
        ("min", found.smallest),
        ("mean", found.mean),
        ("variance", found.variance),
        ("skewness", found.skewness),
        ("kurtosis", found.kurtosis),
        ("fraction_active", found.fraction_active),
    ):
        value = float(values[index])
        if math.isfinite(value):
            setattr(stated, name, value)
    if stated.max > 0:
        stated.scale = stated.max
    edges, counts = reading.histogram(state, index)
    stated.histogram.edges.extend(edges.tolist())
    stated.histogram.counts.extend(counts.tolist())


def _by_mean(state: State, prefix: str, index: int) -> Iterator[record_pb2.TokenStatistic]:
    """The tokens that occur with the largest means, descending; equal ones by id."""
    counts = state[f"{prefix}_counts"]
    occurring = np.nonzero(counts)[0]
    means = state[f"{prefix}_sums"][index][occurring] / counts[occurring]
    for place in np.argsort(-means, kind="stable")[:TOKEN_STATISTICS]:
        token = occurring[place]
        yield record_pb2.TokenStatistic(
            token_id=int(state["tokens"][token]), count=int(counts[token]), mean=float(means[place])
        )
