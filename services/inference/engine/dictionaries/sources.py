"""From `NAME=URI` to registered dictionaries: fetch, recognise, name, check against the model.

A URI is a local path, `hf://org/repo/path[@revision]`, or the same without `hf://`. It names one
dictionary, which is then called NAME, or a folder of several (a release, circuit-tracer's set,
OpenAI's layers), which are then called NAME-SITE-LAYER. `#site=` at its end says where a file
belongs that does not say so itself (`overrides`).
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

from services.common.errors import FailedPrecondition
from services.common.settings import DictionarySource
from services.inference.engine import hub
from services.inference.engine.dictionaries import overrides
from services.inference.engine.dictionaries.dictionary import Dictionary
from services.inference.engine.dictionaries.readers import (
    circuit_tracer,
    dictionary_learning,
    gemma_scope,
    openai,
    saelens,
    sparsify,
)
from services.inference.engine.dictionaries.readings import Origin, Reading
from services.inference.engine.dictionaries.sites import Header, Site
from services.inference.engine.dictionaries.widths import Widths

_READERS: tuple[ModuleType, ...] = (
    saelens,
    gemma_scope,
    sparsify,
    circuit_tracer,
    dictionary_learning,
    openai,
)
_SETS = (openai, circuit_tracer)
"""Formats that keep the dictionaries of several layers in one folder."""
_LOOKED_FOR = (
    "cfg.json + sae_weights.safetensors (SAELens), params.npz or config.json + params.safetensors "
    "(Gemma Scope), LAYER.pt (OpenAI), cfg.json + sae.safetensors (sparsify), config.yaml "
    "(circuit-tracer), config.json + ae.pt (dictionary_learning)"
)
_PATTERNS = ("*.json", "*.yaml", "*.safetensors", "*.npz", "*.pt")
_CROSS_LAYER = re.compile(r"(W_enc_\d+|params_layer_\d+)\.safetensors\Z")


@dataclass(frozen=True)
class Registered:
    """A dictionary that can be used. Its header is known, its weights are read by `load`."""

    header: Header
    set_name: str
    """The NAME it was given under; its id, unless the URI named a set."""
    unchecked: bool
    """Whether the operator takes it whatever its self-test says."""
    path: Path
    """The folder or file it was found in."""
    read: Callable[[Header], Dictionary]
    """Reads the weights for the sites of a header."""

    @property
    def id(self) -> str:
        return self.header.id

    def load(self) -> Dictionary:
        """Reads the weights to the CPU in float32. Raises FailedPrecondition."""
        return self.read(self.header)

    def at(self, site_in: Site, site_out: Site) -> "Registered":
        """The same weights at other sites, to see whether they fit there."""
        return replace(self, header=replace(self.header, site_in=site_in, site_out=site_out))


def open_dictionaries(sources: Iterable[DictionarySource], widths: Widths) -> list[Registered]:
    """Registers every dictionary of these sources, in order. Raises FailedPrecondition."""
    registered: list[Registered] = []
    for source in sources:
        try:
            registered += _open(source, widths)
        except FailedPrecondition as error:
            message = f"dictionary {source.name!r}: {error.message}"
            raise FailedPrecondition(message, reason=error.reason) from error
    taken: dict[str, Registered] = {}
    for each in registered:
        if each.id in taken:
            raise FailedPrecondition(
                f"two dictionaries would be called {each.id!r}: {taken[each.id].path} and "
                f"{each.path}; give them different names, or URIs that name less"
            )
        taken[each.id] = each
    return registered


def _open(source: DictionarySource, widths: Widths) -> list[Registered]:
    location, override = overrides.split(source.uri)
    root, revision = _fetch(location)
    origin = Origin(source.uri, revision, override)
    is_set, readings = _read(root, origin)
    name = re.sub(r"[^A-Za-z0-9_-]", "-", source.name)
    opened = []
    for reading in readings:
        site = reading.header.site_in
        header = replace(reading.header, id=f"{name}-{site.point}-{site.layer}" if is_set else name)
        widths.check(header)
        read = _reading(reading, widths)
        opened.append(Registered(header, name, source.unchecked, reading.path, read))
    return opened


def _reading(reading: Reading, widths: Widths) -> Callable[[Header], Dictionary]:
    def read(header: Header) -> Dictionary:
        dictionary = replace(reading.load(), header=header)
        if not header.site_in.before_gain:
            return dictionary
        return dictionary.through_gain(*widths.mlp_norm(header))

    return read


def _fetch(location: str) -> tuple[Path, str]:
    """The local file or folder, and the Hub commit ("" for a local path)."""
    path = Path(location).expanduser()
    if not location.startswith("hf://") and path.exists():
        return path.absolute(), ""
    address, _, pinned = location.removeprefix("hf://").partition("@")
    parts = [part for part in address.split("/") if part]
    if location.startswith(("/", ".", "~")) or len(parts) < 2 or ".." in parts:
        raise FailedPrecondition(
            f"{location!r} is neither an existing path nor hf://org/repo/path[@revision]"
        )
    repo, inside = "/".join(parts[:2]), "/".join(parts[2:])

    def whole(cached: Path) -> bool:
        """Of a set the cache may hold some layers only: that is taken if the Hub is away."""
        target = cached / inside
        if target.is_file() or (target.is_dir() and _reader(target) not in (None, *_SETS)):
            return True
        some = target.is_dir() and (_reader(target) in _SETS or bool(_places(target)))
        return some and bool(hub.unreachable())

    patterns = [f"{inside}/{pattern}" if inside else pattern for pattern in _PATTERNS]
    if inside:
        above = inside.rpartition("/")[0]
        patterns += [inside, *(f"{above}/{p}".lstrip("/") for p in ("*.json", "*.yaml"))]
    root, revision = hub.folder(repo, patterns, whole, pinned or None)
    target = root / inside
    if not target.exists():
        raise FailedPrecondition(f"{repo!r} has no {inside!r} at revision {revision}")
    return target, revision


def _read(root: Path, origin: Origin) -> tuple[bool, list[Reading]]:
    """Whether the URI names a set, and its dictionaries."""
    if root.is_file():
        if root.suffix == ".pt" and root.name not in dictionary_learning.WEIGHTS:
            return False, [openai.read_file(root, origin)]
        reader = _reader(root.parent)
        if reader is None or reader in _SETS:
            raise FailedPrecondition(f"{root} is not recognised beside {_listing(root.parent)}")
        return False, _readings(reader, root.parent, origin)
    reader = _reader(root)
    if reader is not None:
        return reader in _SETS, _readings(reader, root, origin)
    places = _places(root)
    if not places:
        _refuse_cross_layer(root)
        raise FailedPrecondition(
            f"{root} holds no dictionary: it has {_listing(root)}, and below it was looked for "
            f"{_LOOKED_FOR}"
        )
    return True, [
        reading for reader, place in places for reading in _readings(reader, place, origin)
    ]


def _readings(reader: ModuleType, folder: Path, origin: Origin) -> list[Reading]:
    readings: list[Reading] = reader.read(folder, origin)
    return readings


def _reader(folder: Path) -> ModuleType | None:
    return next((reader for reader in _READERS if reader.matches(folder)), None)


def _places(root: Path) -> list[tuple[ModuleType, Path]]:
    """The folders below that hold dictionaries, layers in their order."""
    folders = sorted(
        (path for path in root.rglob("*") if path.is_dir() and not path.name.startswith(".")),
        key=lambda path: [
            (0, int(part), "") if part.isdigit() else (1, 0, part)
            for part in re.split(r"(\d+)", str(path.relative_to(root)))
            if part
        ],
    )
    return [(reader, folder) for folder in folders if (reader := _reader(folder))]


def _refuse_cross_layer(root: Path) -> None:
    for path in root.rglob("*.safetensors"):
        if _CROSS_LAYER.match(path.name):
            raise FailedPrecondition(
                f"{path} belongs to a cross-layer transcoder: its latents write into many layers "
                "at once, which this version does not support; per-layer transcoders work"
            )


def _listing(folder: Path) -> str:
    names = sorted(path.name + ("/" if path.is_dir() else "") for path in folder.iterdir())
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return (", ".join(names[:8]) + more) or "nothing"
