"""Other forms of a record: a head's pairs as one value per token, values within [0, 1]."""

import numpy as np
from numpy.typing import NDArray
from tdb.dataset.v1 import read_pb2, record_pb2

from services.common.addresses import Kind
from services.common.errors import InvalidArgument
from services.dataset import groups, records

_BY_QUERY = (read_pb2.PAIR_FORM_QUERY_SUM, read_pb2.PAIR_FORM_QUERY_MAX)
_SUMS = (read_pb2.PAIR_FORM_QUERY_SUM, read_pb2.PAIR_FORM_KEY_SUM)


def check(view: read_pb2.View, kind: Kind) -> None:
    """Raises InvalidArgument for a view that components of this kind do not have."""
    if view.pair_form != read_pb2.PAIR_FORM_UNSPECIFIED and kind is not Kind.HEAD:
        raise InvalidArgument(
            f"only heads have pairs; a {kind.value} has one value per token already",
            field="pair_form",
        )


def apply(view: read_pb2.View, record: record_pb2.ComponentRecord) -> None:
    """Changes a record to the form that is wanted. Raises InvalidArgument."""
    group, _ = groups.parse_component(record.component)
    check(view, group.kind)
    examples = list(records.examples(record))
    if view.pair_form != read_pb2.PAIR_FORM_UNSPECIFIED:
        for example in examples:
            _by_token(example, view.pair_form)
    if view.normalised:
        _normalise(examples)


def _by_token(example: record_pb2.Example, form: read_pb2.PairForm.ValueType) -> None:
    tokens = records.length(example)
    width = example.pair_width if example.HasField("pair_width") else None
    query, key = records.pair_places(tokens, width)
    place = query if form in _BY_QUERY else key
    values = records.values(example)
    # Every token has a pair with itself, so no token is left at the start value.
    if form in _SUMS:
        found: NDArray[np.float64] = np.zeros(tokens)
        np.add.at(found, place, values)
    else:
        found = np.full(tokens, -np.inf)
        np.maximum.at(found, place, values)
    example.ClearField("pair_activations")
    example.ClearField("pair_width")
    example.activations.extend(found.tolist())


def _normalise(examples: list[record_pb2.Example]) -> None:
    scale = max((records.peak(example) for example in examples), default=0.0)
    for example in examples:
        values = np.maximum(records.values(example), 0)
        field = example.pair_activations or example.activations
        field[:] = (values / np.float32(scale) if scale > 0 else values).tolist()
