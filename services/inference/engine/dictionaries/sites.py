"""Where a dictionary reads and writes, and what is known of it before its weights are read."""

import hashlib
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path


class Point(StrEnum):
    """A point of one layer."""

    RESID_PRE = "resid_pre"
    RESID_MID = "resid_mid"
    RESID_POST = "resid_post"
    Z = "z"
    """Concatenated head outputs before the output projection: width heads x head width."""
    ATTN_OUT = "attn_out"
    """Attention's output, its bias included."""
    MLP_IN = "mlp_in"
    """What the MLP reads: the output of its input norm, gain and bias included."""
    MLP_ACT = "mlp_act"
    """Input of the MLP's down projection: width neurons."""
    MLP_OUT = "mlp_out"
    """The MLP's output, its bias included."""


_RESIDUAL = (Point.RESID_PRE, Point.RESID_MID, Point.RESID_POST)
_BEFORE_POST_NORM = (Point.Z, Point.MLP_ACT)


@dataclass(frozen=True)
class Site:
    """A point in a layer.

    `before_post_norm` matters where the model has a norm between sublayer and residual stream
    (Gemma-2, Gemma-3): True where a write here still passes that norm. Always True at `z` and
    `mlp_act`, always False at `resid_*` and `mlp_in`; at `attn_out` and `mlp_out` the file's format
    decides, and the same file read at the other side gives other numbers.

    `before_gain` marks an `mlp_in` taken before the norm's gain and bias, as TransformerLens's
    `ln2.hook_normalized` and Gemma Scope's transcoders do. `Dictionary.through_gain` folds the gain
    into the weights, after which the site is `mlp_in` itself.
    """

    point: Point
    layer: int
    before_post_norm: bool = False
    before_gain: bool = False

    def __post_init__(self) -> None:
        if self.point in _BEFORE_POST_NORM:
            object.__setattr__(self, "before_post_norm", True)
        elif self.point not in (Point.ATTN_OUT, Point.MLP_OUT):
            object.__setattr__(self, "before_post_norm", False)

    def __str__(self) -> str:
        return f"{self.point}.{self.layer}"

    @property
    def is_residual(self) -> bool:
        """Whether a dictionary here is a view of the stream rather than a writer into it."""
        return self.point in _RESIDUAL

    @property
    def contains_bias(self) -> bool:
        """Whether the sublayer's bias is inside the point, so that `bias.D` replaces its row."""
        return self.point in (Point.ATTN_OUT, Point.MLP_OUT)


@dataclass(frozen=True)
class Declared:
    """What the publisher says, where it says so."""

    l0: float | None = None
    """Mean number of active latents per token."""
    fvu: float | None = None
    """Fraction of variance unexplained."""
    sample: str = ""
    """The corpus it was trained or measured on."""
    sample_file: Path | None = None
    """A text beside the dictionary that its figures were measured on."""
    leave_out_first: int = 0
    """Leading positions that training left out (attention sinks), to be left out of statistics."""


@dataclass(frozen=True)
class Provenance:
    """Which files these are."""

    uri: str
    revision: str
    """Hub commit; empty for a local path."""
    format: str
    files: tuple[tuple[str, str], ...]
    """Name and SHA-256 in hex of every file that was read."""

    @property
    def weights_hash(self) -> str:
        """SHA-256, in hex, over all of them."""
        lines = "".join(f"{name}\0{digest}\n" for name, digest in sorted(self.files))
        return hashlib.sha256(lines.encode()).hexdigest()


@dataclass(frozen=True)
class Header:
    """All but the weights."""

    id: str
    site_in: Site
    site_out: Site
    d_in: int
    d_out: int
    latents: int
    activation: str
    """`relu`, `jumprelu`, `topk` or `gated`."""
    declared: Declared
    provenance: Provenance
    has_skip: bool = False

    @property
    def is_transcoder(self) -> bool:
        return self.site_in != self.site_out

    @property
    def nbytes(self) -> int:
        """Bytes of the weights in float32."""
        vectors = {"relu": 1, "topk": 1, "jumprelu": 2, "gated": 4}[self.activation]
        matrices = (self.d_in + self.d_out + vectors) * self.latents
        skip = self.d_in * self.d_out if self.has_skip else 0
        return 4 * (matrices + skip + self.d_in + self.d_out)
