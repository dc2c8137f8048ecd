"""Writes records the way OpenAI's code does, from the description of its classes alone: dataclasses
that become JSON objects with the name of their class in `dataclass_name`. Nothing of ours is used.
"""

import json
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any


@dataclass
class ActivationRecord:
    tokens: list[str]
    activations: list[float]


@dataclass
class NeuronId:
    layer_index: int
    neuron_index: int


@dataclass
class NeuronRecord:
    neuron_id: NeuronId
    random_sample: list[ActivationRecord] = field(default_factory=list)
    random_sample_by_quantile: list[list[ActivationRecord]] | None = None
    quantile_boundaries: list[float] | None = None
    mean: float | None = float("nan")
    variance: float | None = float("nan")
    skewness: float | None = float("nan")
    kurtosis: float | None = float("nan")
    most_positive_activation_records: list[ActivationRecord] = field(default_factory=list)


def encoded(value: Any, *, tags: bool = True) -> Any:
    """As JSON values; `tags`: whether the names of classes are written."""
    if is_dataclass(value) and not isinstance(value, type):
        inner = {name: encoded(getattr(value, name), tags=tags) for name in vars(value)}
        return {"dataclass_name": type(value).__name__, **inner} if tags else inner
    if isinstance(value, list):
        return [encoded(each, tags=tags) for each in value]
    return value


def write(folder: Path, record: NeuronRecord, *, tags: bool = True) -> Path:
    """At LAYER/INDEX.json below `folder`."""
    identity = record.neuron_id
    path = folder / str(identity.layer_index) / f"{identity.neuron_index}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(encoded(record, tags=tags)))
    return path


def triangle(tokens: list[str], values: dict[tuple[int, int], float], width: int) -> list[float]:
    """The values (query, key) of a head as they are written: for each query in order its keys, of
    which only the last `width`; 0 where there is none in `values`."""
    flat = []
    for query in range(len(tokens)):
        for key in range(query + 1):
            if query - key < width:
                flat.append(values.get((query, key), 0.0))
    return flat
