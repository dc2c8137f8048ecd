"""From folders of others' records to a dataset: what is there is listed, then written shard by
shard, so an import that was killed goes on with the first shard that is not whole.

A file that is not what its format says stops the import with its name and what is wrong in it;
nothing of it is kept.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tdb.dataset.v1 import dataset_pb2, record_pb2

from services.common.addresses import Kind
from services.common.errors import InvalidArgument, NotFound
from services.dataset import explanations, groups, room
from services.dataset.groups import Group
from services.dataset.importers import neuronpedia_export, openai_explanations, openai_records
from services.dataset.importers.about import about
from services.dataset.importers.neuronpedia_batch import Batch
from services.dataset.manifest import Manifest
from services.dataset.store import DatasetWriter

SHARD_RECORDS = 4096
EXPORT_SHARD_RECORDS = 1024
"""Fewer: their sequences are held together."""
ROOM_LEFT_BYTES = 64 * 2**20

OPENAI_NOTE = "Tokens are known by their text only: OpenAI's records do not hold ids."
OPENAI_NEURON_NOTE = (
    "OpenAI's published activations of GPT-2's neurons may have been computed with another GELU "
    "than the model's: take their size as approximate."
)
NEURONPEDIA_NOTE = (
    "Tokens are known by their text only; values are rounded to three digits, and the ends of "
    "histogram bins are computed from their middles."
)

_NUMBER = re.compile(r"0|[1-9]\d{0,8}")

Progress = Callable[[Group, int, int], None]
"""Called with a group, records written of it, and records it will have."""


def silent(group: Group, done: int, total: int) -> None:
    """Progress that nobody wants."""


Stop = Callable[[], None]
"""Called before each record; raises to end the import there. The same import goes on later."""


def unstopped() -> None:
    """Nothing ends the import."""


def import_openai(
    source: Path,
    target: Path,
    kind: Kind,
    model: str,
    dictionary: str = "",
    progress: Progress = silent,
    stop: Stop = unstopped,
    most_bytes: int | None = None,
) -> Manifest:
    """Imports a folder of `LAYER/INDEX.json`, or one that holds it as `collated-activations`;
    `explanations/LAYER/INDEX.jsonl` in the folder are kept beside the records.

    `kind` says what an index is. For latents, `dictionary` is the dictionaries' id with `{layer}`
    in it where there are several layers; all datasets beside `target` may take `most_bytes`. Raises
    NotFound where there is nothing to import,
    InvalidArgument for a file that is no record, FailedPrecondition as DatasetWriter does.
    """
    inner = source / "collated-activations"
    layers = dict(_numbered(inner if inner.is_dir() else source, "*/*.json"))
    explained = dict(_numbered(source / "explanations", "*/*.jsonl"))
    if not layers:
        raise NotFound(f"{source} holds no LAYER/INDEX.json")
    files = _by_group(layers, kind, dictionary)
    notes = [OPENAI_NOTE, *([OPENAI_NEURON_NOTE] if kind is Kind.NEURON else [])]
    header = dataset_pb2.DatasetHeader(
        source=dataset_pb2.SOURCE_OPENAI,
        model=dataset_pb2.RecordedModel(
            id=model,
            dictionaries=[
                dataset_pb2.RecordedDictionary(id=group.dictionary)
                for group in files
                if group.dictionary
            ],
        ),
        notes=notes,
    )

    def read(group: Group, index: int, path: Path) -> record_pb2.ComponentRecord:
        with about(path):
            return openai_records.parse(path.read_bytes(), group, index)

    texts = _by_group(explained, kind, dictionary)
    paths = [path for found in (*files.values(), *texts.values()) for _, path in found]
    _check_room(target, paths, most_bytes)
    plan = {"files": _listing(source, paths)}
    with DatasetWriter(target, header, plan) as writer:
        for group in sorted(files, key=lambda each: each.order):
            total = len(files[group])
            for part, start in enumerate(range(0, total, SHARD_RECORDS)):
                some = files[group][start : start + SHARD_RECORDS]
                if not writer.has(group, part):
                    writer.write(group, part, _until(stop, (read(group, *each) for each in some)))
                progress(group, start + len(some), total)
        explained_count = explanations.write(
            target,
            (
                each
                for group, found in texts.items()
                for index, path in found
                for each in openai_explanations.read(path, group, index)
            ),
        )
        return writer.finish(explanations=explained_count)


def import_neuronpedia(
    source: Path,
    target: Path,
    dictionary: str = "",
    progress: Progress = silent,
    stop: Stop = unstopped,
    most_bytes: int | None = None,
) -> Manifest:
    """Imports a folder of `batch-N.json` of one model, or an export of one source.

    `dictionary` names the latents' dictionary instead of Neuronpedia's LAYER-SET; it takes batches
    of one dictionary. Raises as `import_openai`.
    """
    if neuronpedia_export.is_one(source):
        return _import_export(source, target, dictionary, progress, stop, most_bytes)
    paths = sorted(source.glob("batch-*.json"), key=_batch_number)
    if not paths:
        raise NotFound(f"{source} holds no batch-N.json, nor features/batch-N.jsonl.gz")
    found: dict[str, list[_Batched]] = {}
    models, corpora = set(), set()
    for path in paths:
        with about(path):
            batch = Batch.parse(path.read_bytes())
            indices = batch.indices()
        if not indices:
            continue
        models.add(batch.model)
        corpora.add(batch.corpus)
        found.setdefault(batch.dictionary, []).append(_Batched(path, min(indices), len(indices)))
    if not found:
        raise NotFound(f"{source} holds no features")
    if len(models) > 1 or len(corpora) > 1:
        raise InvalidArgument(f"{source} holds features of several models or corpora: import one")
    if dictionary and len(found) > 1:
        raise InvalidArgument(
            f"{source} holds several dictionaries ({', '.join(found)}), which one name cannot tell"
        )
    header = dataset_pb2.DatasetHeader(
        source=dataset_pb2.SOURCE_NEURONPEDIA,
        model=dataset_pb2.RecordedModel(
            id=models.pop(),
            dictionaries=[
                dataset_pb2.RecordedDictionary(id=dictionary or name) for name in sorted(found)
            ],
        ),
        corpus=dataset_pb2.Corpus(name=corpora.pop()),
        notes=[NEURONPEDIA_NOTE],
    )

    def read(path: Path) -> Iterator[record_pb2.ComponentRecord]:
        with about(path):
            yield from Batch.parse(path.read_bytes()).records(dictionary)

    _check_room(target, paths, most_bytes)
    with DatasetWriter(target, header, {"files": _listing(source, paths)}) as writer:
        for name in sorted(found):
            group = Group(Kind.LATENT, dictionary=dictionary or name)
            total, done = sum(each.count for each in found[name]), 0
            for part, each in enumerate(sorted(found[name], key=lambda each: each.first)):
                if not writer.has(group, part):
                    writer.write(group, part, _until(stop, read(each.path)))
                done += each.count
                progress(group, done, total)
        return writer.finish()


def _import_export(
    source: Path,
    target: Path,
    dictionary: str,
    progress: Progress,
    stop: Stop,
    most_bytes: int | None,
) -> Manifest:
    export = neuronpedia_export.scan(source)
    indices = export.indices()
    if not indices:
        raise NotFound(f"{source} holds no features")
    group = Group(Kind.LATENT, dictionary=dictionary or export.dictionary)
    header = dataset_pb2.DatasetHeader(
        source=dataset_pb2.SOURCE_NEURONPEDIA,
        model=dataset_pb2.RecordedModel(
            id=export.model,
            dictionaries=[dataset_pb2.RecordedDictionary(id=group.dictionary)],
        ),
        notes=[NEURONPEDIA_NOTE],
    )
    _check_room(target, export.paths, most_bytes)
    with DatasetWriter(target, header, {"files": _listing(source, export.paths)}) as writer:
        for part, start in enumerate(range(0, len(indices), EXPORT_SHARD_RECORDS)):
            some = indices[start : start + EXPORT_SHARD_RECORDS]
            if not writer.has(group, part):
                writer.write(group, part, _until(stop, export.records(group, some)))
            progress(group, start + len(some), len(indices))
        return writer.finish(explanations=explanations.write(target, export.explained(group)))


def _until(
    stop: Stop, items: Iterable[record_pb2.ComponentRecord]
) -> Iterator[record_pb2.ComponentRecord]:
    for item in items:
        stop()
        yield item


def _check_room(target: Path, paths: Iterable[Path], most_bytes: int | None) -> None:
    """Raises FailedPrecondition where there is not the room that records of these files may take:
    as much as what is compressed, a quarter of what is not."""
    needed = 0
    for path in paths:
        size = path.stat().st_size
        needed += size if path.suffix == ".gz" else size // 4
    folder = next(each for each in (target, *target.parents) if each.exists())
    if most_bytes is not None:
        room.check_cap(target, needed, most_bytes)
    room.check_disk(
        folder, needed + ROOM_LEFT_BYTES, "the import may need, with some to spare,", " first"
    )


@dataclass(frozen=True)
class _Batched:
    """A batch file, the lowest index in it and how many it holds."""

    path: Path
    first: int
    count: int


_Files = list[tuple[int, Path]]
"""Indices with their files, ascending."""


def _by_group(layers: dict[int, _Files], kind: Kind, dictionary: str) -> dict[Group, _Files]:
    """Raises InvalidArgument for a name that does not tell dictionaries from each other."""
    if kind is not Kind.LATENT:
        if dictionary:
            raise InvalidArgument(f"a {kind.value} has no dictionary", field="dictionary")
        return {Group(kind, layer): found for layer, found in layers.items()}
    found = {
        groups.parse(f"latent.{dictionary.replace('{layer}', str(layer))}"): files
        for layer, files in layers.items()
    }
    if len(found) < len(layers):
        raise InvalidArgument(
            f"there are {len(layers)} layers, so the dictionary's name must hold {{layer}}",
            field="dictionary",
        )
    return found


def _numbered(folder: Path, pattern: str) -> Iterator[tuple[int, _Files]]:
    """Layers, ascending, and their files."""
    layers: dict[int, _Files] = {}
    for path in folder.glob(pattern):
        layer, index = path.parent.name, path.stem
        if _NUMBER.fullmatch(layer) and _NUMBER.fullmatch(index):
            layers.setdefault(int(layer), []).append((int(index), path))
    for number in sorted(layers):
        yield number, sorted(layers[number])


def _batch_number(path: Path) -> tuple[int, str]:
    number = path.stem.removeprefix("batch-")
    return (int(number) if number.isdigit() else -1, path.name)


def _listing(source: Path, paths: Iterable[Path]) -> str:
    """A hash of what there is to import: names, sizes and times of change."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        stat = path.stat()
        line = f"{path.relative_to(source)}\0{stat.st_size}\0{stat.st_mtime_ns}\n"
        digest.update(line.encode())
    return digest.hexdigest()
