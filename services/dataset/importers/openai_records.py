"""OpenAI's neuron records, as Transformer Debugger reads them: one JSON file for each component,
`LAYER/INDEX.json`.

    NeuronRecord      {neuron_id, most_positive_activation_records, random_sample,
                       random_sample_by_quantile, quantile_boundaries, mean, variance, skewness,
                       kurtosis}
    ActivationRecord  {tokens, activations}

What the files are like, beyond their layout:

- `dataclass_name` tags may be missing; `neuron_id` may say `idx` and `layer` for `neuron_index` and
  `layer_index`, and the layer may be text.
- Heads have the lower triangle of their pairs, row by row; where a query was recorded with at most
  w keys, only the count of values tells w.
- A moment that was not computed is null or NaN.
- Top records are ordered by a figure of merit; here they come by their largest value.
- Tokens are text; their ids are unknown.
- Where the bucket has no such file it answers in XML.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tdb.dataset.v1 import record_pb2

from services.common.addresses import Kind
from services.common.errors import InvalidArgument, inside
from services.dataset import records
from services.dataset.groups import Group
from services.dataset.importers import json_text

_MOMENTS = ("mean", "variance", "skewness", "kurtosis")
_RENAMED = {"idx": "neuron_index", "layer": "layer_index"}
_FIELDS = {
    "neuron_id",
    "most_positive_activation_records",
    "random_sample",
    "random_sample_by_quantile",
    "quantile_boundaries",
    *_MOMENTS,
}


def parse(content: bytes, group: Group, index: int) -> record_pb2.ComponentRecord:
    """The record of a component. Raises InvalidArgument for anything but a whole record of it."""
    document = _object(_json(content), "a neuron record", _FIELDS)
    check_id(document.get("neuron_id"), group, index)
    paired = group.kind is Kind.HEAD
    record = record_pb2.ComponentRecord(component=group.component(index))
    top = _examples(document, "most_positive_activation_records", paired)
    record.top.extend(sorted(top, key=records.peak, reverse=True))
    record.random.extend(_examples(document, "random_sample", paired))
    record.quantiles.extend(_quantiles(document, paired))
    for name in _MOMENTS:
        with inside(name):
            value = number_or_none(document.get(name))
            if value is not None:
                setattr(record.statistics, name, value)
    if record.top:
        record.statistics.max = records.peak(record.top[0])
    scale = max((records.peak(each) for each in records.examples(record)), default=0.0)
    if scale > 0:
        record.statistics.scale = scale
    records.check(record)
    return record


def _json(content: bytes) -> Any:
    try:
        return json_text.loads(content)
    except InvalidArgument:
        start = content[:40].decode(errors="replace").lstrip()
        what = "XML or HTML, which is how a server says no" if start.startswith("<") else "no JSON"
        raise InvalidArgument(f"this is {what}: it starts {start!r}") from None


def _object(value: Any, what: str, fields: set[str]) -> Mapping[str, Any]:
    """A JSON object with none but known fields."""
    if not isinstance(value, dict):
        raise InvalidArgument(f"{what} is a JSON object, not {type(value).__name__}")
    if unknown := sorted(value.keys() - fields - {"dataclass_name"}):
        raise InvalidArgument(f"{what} has no field {unknown[0]!r}")
    return value


def check_id(value: Any, group: Group, index: int) -> None:
    """Raises InvalidArgument where a neuron_id is none, or another component's."""
    with inside("neuron_id"):
        given = _object(value, "a neuron id", {"neuron_index", "layer_index", *_RENAMED})
        named = {_RENAMED.get(name, name): number for name, number in given.items()}
        try:
            found = int(named["layer_index"]), int(named["neuron_index"])
        except (KeyError, ValueError, TypeError):
            raise InvalidArgument("does not give layer and index as numbers") from None
        # A dictionary's id need not hold its layer, so only its latent can be compared.
        layer = found[0] if group.layer < 0 else group.layer
        if found != (layer, index):
            raise InvalidArgument(
                f"says layer {found[0]}, index {found[1]}, where {group.component(index)} is wanted"
            )


def _examples(document: Mapping[str, Any], name: str, paired: bool) -> list[record_pb2.Example]:
    return _example_list(document.get(name) or [], name, paired)


def _example_list(value: Any, name: str, paired: bool) -> list[record_pb2.Example]:
    if not isinstance(value, list):
        raise InvalidArgument("is a list of activation records", field=name)
    found = []
    for number, each in enumerate(value):
        with inside(f"{name}[{number}]"):
            found.append(_example(each, paired))
    return found


def _example(value: Any, paired: bool) -> record_pb2.Example:
    given = _object(value, "an activation record", {"tokens", "activations"})
    tokens, activations = given.get("tokens"), given.get("activations")
    if not (isinstance(tokens, list) and tokens and all(isinstance(t, str) for t in tokens)):
        raise InvalidArgument("is a list of text, never empty", field="tokens")
    if not (isinstance(activations, list) and all(map(_is_number, activations))):
        raise InvalidArgument("is a list of numbers", field="activations")
    example = record_pb2.Example(token_texts=tokens)
    wanted = len(tokens)
    if paired:
        width = _pair_width(len(tokens), len(activations))
        wanted = records.pair_count(len(tokens), width)
        example.pair_activations.extend(activations)
        if width < len(tokens):
            example.pair_width = width
    else:
        example.activations.extend(activations)
    # Here, because the largest value is asked for before the record is whole.
    if len(activations) != wanted:
        raise InvalidArgument(
            f"has {len(activations)} values for {len(tokens)} tokens", field="activations"
        )
    return example


def _pair_width(tokens: int, pairs: int) -> int:
    """How many keys a query was recorded with at most; the nearest where no width gives `pairs`."""
    return next(
        (width for width in range(1, tokens) if records.pair_count(tokens, width) >= pairs), tokens
    )


def _quantiles(document: Mapping[str, Any], paired: bool) -> list[record_pb2.QuantileExamples]:
    name = "random_sample_by_quantile"
    given = document.get(name) or []
    boundaries = document.get("quantile_boundaries") or []
    if not isinstance(given, list):
        raise InvalidArgument("is a list of lists", field=name)
    if not (isinstance(boundaries, list) and all(map(_is_number, boundaries))):
        raise InvalidArgument("is a list of numbers", field="quantile_boundaries")
    lower, upper = _ends(boundaries, len(given))
    found = []
    for number, each in enumerate(given):
        quantile = record_pb2.QuantileExamples()
        quantile.examples.extend(_example_list(each or [], f"{name}[{number}]", paired))
        if (end := lower[number]) is not None:
            quantile.lower = end
        if (end := upper[number]) is not None:
            quantile.upper = end
        found.append(quantile)
    return found[::-1]  # theirs ascend


def _ends(boundaries: Sequence[float], count: int) -> tuple[list[float | None], list[float | None]]:
    """Lower and upper ends of `count` intervals: given are all ends, or those between two."""
    if len(boundaries) == count + 1:
        return [*boundaries[:-1]], [*boundaries[1:]]
    if len(boundaries) == count - 1:
        return [None, *boundaries], [*boundaries, None]
    if boundaries:
        raise InvalidArgument(
            f"has {len(boundaries)} numbers, which do not bound {count} intervals",
            field="quantile_boundaries",
        )
    return [None] * count, [None] * count


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number_or_none(value: Any) -> float | None:
    """A finite number; None for null and NaN. Raises InvalidArgument."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if not _is_number(value):
        raise InvalidArgument(f"is a finite number or null, not {value!r}")
    return float(value)
