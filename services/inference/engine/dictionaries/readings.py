"""What a reader returns: a header at once, the weights when they are first needed.

A matrix is turned by its shape, compared with the vectors beside it, never by its name: `W_enc` is
[d_in, N] in one format and [N, d_in] in another. Only where d_in equals N does the format decide.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from services.common.errors import FailedPrecondition
from services.inference.engine.dictionaries.dictionary import Dictionary
from services.inference.engine.dictionaries.files import TensorFile, sha256
from services.inference.engine.dictionaries.overrides import Override
from services.inference.engine.dictionaries.sites import Header, Point, Provenance, Site


@dataclass(frozen=True)
class Origin:
    """Where a reader looks, and what the caller said about it."""

    uri: str
    revision: str
    override: Override | None = None

    def place(self, path: Path, site_in: Site, site_out: Site) -> tuple[Site, Site]:
        """The sites, or those that the URI names instead."""
        override = self.override
        if override is None:
            return site_in, site_out
        if site_in != site_out and override.reads.point is override.writes.point:
            raise FailedPrecondition(
                f"{path} is a transcoder from {site_in} to {site_out}: "
                "#site=POINT.LAYER:POINT.LAYER names both ends"
            )
        return override.reads.in_place_of(site_in), override.writes.in_place_of(site_out)

    def place_unnamed(
        self, path: Path, layer: int | None, *, before_post_norm: bool, looked: str
    ) -> tuple[Site, Site]:
        """The sites of a file that does not say where it belongs, from the URI alone."""
        ends = (self.override.reads, self.override.writes) if self.override else ()
        sites = [site for end in ends if (site := end.site(layer, before_post_norm))]
        if len(sites) < 2:
            raise FailedPrecondition(
                f"{path} does not say which site of which layer it was trained on ({looked}): end "
                "its URI in #site=POINT.LAYER, for example #site=mlp_out.3; the points are "
                f"{', '.join(Point)}"
            )
        return sites[0], sites[1]

    def provenance(self, format: str, *paths: Path) -> Provenance:
        return Provenance(
            self.uri, self.revision, format, tuple((path.name, sha256(path)) for path in paths)
        )


@dataclass(frozen=True)
class Reading:
    """A dictionary that was found. `path` is its folder or file, for messages."""

    path: Path
    header: Header
    load: Callable[[], Dictionary]
    """Reads the weights to the CPU in float32. Raises FailedPrecondition."""


@dataclass(frozen=True)
class Matrix:
    """A matrix in a file that is wanted as [rows, columns]."""

    file: TensorFile
    name: str
    rows: int
    columns: int
    turned: bool
    """Whether the file holds [columns, rows]."""

    def read(self) -> Tensor:
        tensor = self.file.read(self.name)
        return tensor.T.contiguous() if self.turned else tensor


def encoder(file: TensorFile, name: str, latents: int, *, turned: bool) -> Matrix:
    """The encoder as [d_in, N]. `turned`: the format writes [N, d_in], which decides if square."""
    shape = file.shapes[name]
    if len(shape) != 2 or latents not in shape:
        raise FailedPrecondition(
            f"{file.path}: {name!r} is {list(shape)}, but its {latents} biases ask for a matrix "
            f"with {latents} latents on one side"
        )
    if shape[0] != shape[1]:
        turned = shape[0] == latents
    width = shape[1] if turned else shape[0]
    return Matrix(file, name, width, latents, turned)


def matrix(file: TensorFile, name: str, rows: int, columns: int, *, turned: bool) -> Matrix:
    """A matrix as [rows, columns]. `turned`: the format writes [columns, rows], if square."""
    shape = file.shapes[name]
    if shape not in ((rows, columns), (columns, rows)):
        raise FailedPrecondition(
            f"{file.path}: {name!r} is {list(shape)}, but the other tensors ask for "
            f"[{rows}, {columns}] or its transpose"
        )
    if rows != columns:
        turned = shape == (columns, rows)
    return Matrix(file, name, rows, columns, turned)


def checked_k(path: Path, key: str, k: object, latents: int) -> int:
    """How many latents a token keeps. Raises FailedPrecondition unless 1 <= k <= latents."""
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= latents:
        raise refuse_option(path, key, k, f"a whole number from 1 to its {latents} latents")
    return k


def refuse_option(path: Path, key: str, value: object, supported: str) -> FailedPrecondition:
    """The refusal of a configuration key whose value this version cannot honour."""
    return FailedPrecondition(f"{path}: {key} is {value!r}, but only {supported} is supported")
