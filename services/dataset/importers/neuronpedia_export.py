"""Neuronpedia's exports of one source (`v1/MODEL/SOURCE/`), as published:

    features/batch-N.jsonl.gz       modelId, layer (the source's id, `10-res-jb`), index (text),
                                    maxActApprox, frac_nonzero, histogram, pos_str, neg_str, ...
    activations/batch-N.jsonl.gz    modelId, layer, index, tokens, values, binMin, binMax,
                                    binContains, ...
    explanations/batch-N.jsonl.gz   modelId, layer, index, description, typeName, ...

What the files are like, beyond their layout:

- One line is one feature, one sequence or one explanation; null and absent mean the same.
- A feature's sequences may be in any file, in any order. Files are read again for each shard that
  has something in them, so memory holds one shard's sequences.
- A sequence without bins, or with binContains -1, is one of the top.

Left out are embeddings, vectors, neighbours, the histogram of logits and values by pair (`dfa*`,
`z*`).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tdb.dataset.v1 import record_pb2

from services.common.errors import InvalidArgument, inside
from services.dataset.explanations import Explanation
from services.dataset.groups import Group
from services.dataset.importers import json_lines, neuronpedia_batch
from services.dataset.importers.about import about

_INDEX = re.compile(r"0|[1-9]\d{0,8}")
_LISTS = (
    "pos_str",
    "pos_values",
    "neg_str",
    "neg_values",
    "freq_hist_data_bar_values",
    "freq_hist_data_bar_heights",
)


@dataclass
class Export:
    """What an export's files hold, by feature index; the files are read when they are wanted."""

    model: str = ""
    source: str = ""
    features: dict[Path, set[int]] = field(default_factory=dict)
    activations: dict[Path, set[int]] = field(default_factory=dict)
    explanations: list[Path] = field(default_factory=list)

    @property
    def dictionary(self) -> str:
        """As Neuronpedia names it, in characters that an address can hold."""
        return re.sub(r"[^A-Za-z0-9_-]", "-", self.source)

    @property
    def paths(self) -> list[Path]:
        return [*self.features, *self.activations, *self.explanations]

    def indices(self) -> list[int]:
        """All features, ascending."""
        return sorted(index for found in self.features.values() for index in found)

    def records(self, group: Group, indices: list[int]) -> Iterator[record_pb2.ComponentRecord]:
        """The records of some features, in the order given. Raises InvalidArgument."""
        wanted = set(indices)
        lines: dict[int, tuple[Path, dict[str, Any]]] = {}
        sequences: dict[int, list[dict[str, Any]]] = {index: [] for index in wanted}
        for path, held in self.features.items():
            if not held.isdisjoint(wanted):
                for index, line in self._lines(path):
                    if index in wanted:
                        lines[index] = path, line
        for path, held in self.activations.items():
            if not held.isdisjoint(wanted):
                for index, line in self._lines(path):
                    if index in wanted:
                        sequences[index].append(_as_in_a_batch(line))
        for index in indices:
            path, line = lines[index]
            with about(path), inside(f"feature {index}"):
                yield _record(line, sequences.pop(index), group.component(index))

    def explained(self, group: Group) -> Iterator[Explanation]:
        """Its explanations, in the order of the files. Raises InvalidArgument."""
        for path in self.explanations:
            for index, line in self._lines(path):
                with about(path), inside(f"feature {index}"):
                    yield Explanation(
                        component=group.component(index),
                        text=_text(line, "description", required=True),
                        method=_text(line, "typeName"),
                        model=_text(line, "explanationModelName"),
                        author=_text(line, "authorId"),
                        notes=_text(line, "notes"),
                        id=_text(line, "id"),
                    )

    def _lines(self, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
        """Feature indices and lines. Raises InvalidArgument for another model's or source's."""
        with about(path):
            for number, line in json_lines.read(path):
                with inside(f"line {number}"):
                    whose = (
                        _text(line, "modelId", required=True),
                        _text(line, "layer", required=True),
                    )
                    self.model, self.source = self.model or whose[0], self.source or whose[1]
                    if whose != (self.model, self.source):
                        raise InvalidArgument(
                            f"is of {whose[0]} {whose[1]}, the others are of {self.model} "
                            f"{self.source}: import one source at a time"
                        )
                    yield _index(line), line


def is_one(folder: Path) -> bool:
    return (folder / "features").is_dir()


def scan(folder: Path) -> Export:
    """Reads all files once. Raises InvalidArgument."""
    export = Export()
    seen: set[int] = set()
    for path in _batches(folder / "features"):
        held = export.features.setdefault(path, set())
        for index, _ in export._lines(path):
            if index in seen:
                with about(path):
                    raise InvalidArgument(f"feature {index} is there twice")
            seen.add(index)
            held.add(index)
    for path in _batches(folder / "activations"):
        held = {index for index, _ in export._lines(path)}
        if unknown := held - seen:
            with about(path):
                raise InvalidArgument(
                    f"has sequences of feature {min(unknown)}, which no file in features has: is "
                    "one missing?"
                )
        export.activations[path] = held
    export.explanations = _batches(folder / "explanations")
    return export


def _batches(folder: Path) -> list[Path]:
    paths = [*folder.glob("batch-*.jsonl.gz"), *folder.glob("batch-*.jsonl")]
    return sorted(paths, key=lambda path: (len(path.name), path.name))


def _as_in_a_batch(line: dict[str, Any]) -> dict[str, Any]:
    """A sequence as SAEDashboard's files have it."""
    bins = [line.get(name) for name in ("binMin", "binMax", "binContains")]
    lower, upper, share = (-1.0, -1.0, -1.0) if None in bins else bins
    return {
        "tokens": line.get("tokens"),
        "values": line.get("values"),
        "bin_min": lower,
        "bin_max": upper,
        "bin_contains": share,
    }


def _record(
    line: dict[str, Any], sequences: list[dict[str, Any]], component: str
) -> record_pb2.ComponentRecord:
    feature = {**line, "activations": sequences}
    feature |= {name: [] for name in _LISTS if line.get(name) is None}
    highest = line.get("maxActApprox")
    if highest and not sequences:
        raise InvalidArgument(
            f"has activations up to {highest} and no file in activations has one: is one missing?"
        )
    return neuronpedia_batch.record(feature, component)


def _index(line: dict[str, Any]) -> int:
    text = str(line.get("index"))
    if not _INDEX.fullmatch(text):
        raise InvalidArgument("is a number from 0", field="index")
    return int(text)


def _text(line: dict[str, Any], name: str, *, required: bool = False) -> str:
    value = line.get(name)
    if value is None and not required:
        return ""
    if not isinstance(value, str) or (required and not value):
        raise InvalidArgument("is text" + (", never empty" if required else ""), field=name)
    return value
