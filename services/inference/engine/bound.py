"""A dictionary bound to one model: what its site's vectors do to the residual stream.

A dictionary writes at its site. From there to the stream lie W_out (site `mlp_act`), W_O (`z`) and
the post-norm where the architecture has one, all linear once the post-norm's scale is held
constant. `to_residual` and its transpose `from_residual` are that map without the scale, which is
one number per token.
"""

import torch
from torch import Tensor

from services.common.addresses import Address, Kind
from services.inference.engine.architecture import Architecture
from services.inference.engine.dictionaries.dictionary import Dictionary, NormKind
from services.inference.engine.dictionaries.sites import Header, Point, Site
from services.inference.engine.norms import Norm

_ROWS = 8192
"""Decoder rows mapped to the residual stream at a time."""

_ORDER = (Point.Z, Point.MLP_IN, Point.MLP_ACT, Point.ATTN_OUT, Point.MLP_OUT)


class Place:
    """Where a dictionary stands in a model, which its header says."""

    def __init__(self, header: Header, architecture: Architecture) -> None:
        self.header = header
        self._architecture = architecture

    @property
    def id(self) -> str:
        return self.header.id

    @property
    def site_in(self) -> Site:
        """Where it reads."""
        return canonical(self.header.site_in)

    @property
    def site(self) -> Site:
        """Where it writes."""
        return canonical(self.header.site_out)

    @property
    def layer(self) -> int:
        return self.site.layer

    @property
    def reading(self) -> Kind | None:
        """The sublayer whose values it reads: ATTN, MLP, or None where it reads the stream."""
        if self.site_in.is_residual:
            return None
        return Kind.ATTN if self.site_in.point in (Point.Z, Point.ATTN_OUT) else Kind.MLP

    def read_tokens(self, position: int) -> tuple[int, ...]:
        """The tokens of the residual stream that its latents at a position depend on, through the
        sublayer they read alone."""
        if self.reading is not Kind.ATTN:
            return (position,)
        first = self._architecture.shape.first_visible(self.site_in.layer, position)
        return tuple(range(first, position + 1))

    @property
    def is_view(self) -> bool:
        """Whether it reads the residual stream, so that it stands outside the table's sum."""
        return self.site.is_residual

    @property
    def sublayer(self) -> Kind | None:
        """The sublayer whose nodes its latents stand for: ATTN, MLP, or None for a view."""
        if self.is_view:
            return None
        return Kind.ATTN if self.site.point in (Point.Z, Point.ATTN_OUT) else Kind.MLP

    def precedes(self, other: "BoundDictionary") -> bool:
        """Whether its site lies before the other's in the same sublayer: what it adds is then a
        part of what the other decomposes."""
        if (self.sublayer, self.layer) != (other.sublayer, other.layer):
            return False
        return self._depth < other._depth

    @property
    def _depth(self) -> tuple[int, bool]:
        return _ORDER.index(self.site.point), not self.site.before_post_norm

    @property
    def _post_norm(self) -> Norm | None:
        """The post-norm between the site and the residual stream, if there is one."""
        if self.is_view or not self.site.before_post_norm:
            return None
        layer = self._architecture.layers[self.layer]
        return layer.attn_post_norm if self.sublayer is Kind.ATTN else layer.mlp_post_norm

    @property
    def passes_post_norm(self) -> bool:
        """Whether writes are divided by the post-norm's scale on their way to the stream."""
        return self._post_norm is not None

    def to_residual(self, vectors: Tensor) -> Tensor:
        """[..., d_out] at the site -> [..., d], before the division by the post-norm's scale."""
        layer = self._architecture.layers[self.layer]
        match self.site.point:
            case Point.MLP_ACT:
                return vectors @ layer.w_out  # the post-norm's gain is folded in
            case Point.Z:
                return vectors @ layer.w_o.flatten(0, 1)
        norm = self._post_norm
        if norm is None:
            return vectors
        if norm.centres:
            vectors = vectors - vectors.mean(-1, keepdim=True)
        return vectors * norm.gain

    def from_residual(self, gradient: Tensor) -> Tensor:
        """[..., d] -> [..., d_out]: the transpose of `to_residual`."""
        layer = self._architecture.layers[self.layer]
        match self.site.point:
            case Point.MLP_ACT:
                return gradient @ layer.w_out.T
            case Point.Z:
                return gradient @ layer.w_o.flatten(0, 1).T
        norm = self._post_norm
        if norm is None:
            return gradient
        return norm.frozen_gradient(gradient, torch.ones_like(gradient[..., :1]))


class BoundDictionary(Place):
    """A dictionary on the model's device, with the map from its site to the residual stream."""

    def __init__(
        self,
        dictionary: Dictionary,
        architecture: Architecture,
        norms: dict[str, Tensor] | None = None,
    ) -> None:
        """`norms` keeps write norms by id for as long as the caller likes: N numbers that cost a
        product of decoder and down projection."""
        self.dictionary = dictionary
        self._norms = {} if norms is None else norms
        super().__init__(dictionary.header, architecture)

    @property
    def write_norms(self) -> Tensor:
        """[N]: length of what one unit of each latent adds to the stream, scales omitted."""
        if self.id not in self._norms:
            rows = torch.split(self.dictionary.w_dec, _ROWS)
            norms = [torch.linalg.vector_norm(self.to_residual(part), dim=1) for part in rows]
            self._norms[self.id] = torch.cat(norms)
        return self._norms[self.id]

    def unit_writes(self, latents: Tensor) -> Tensor:
        """[n] -> [n, d]: what one unit of each latent adds to the stream, scales omitted."""
        return self.to_residual(self.dictionary.w_dec[latents])

    def unit_reads(self, latents: Tensor) -> Tensor | None:
        """[n] -> [n, d]: what their pre-activations read in the stream, scales left out.

        None where the sublayer lies between, which is not linear.
        """
        rows, norm_in = self.dictionary.encoder_rows(latents), self.dictionary.norm
        match norm_in.kind:
            case NormKind.CENTRE | NormKind.LAYER_NORM:
                rows = rows - rows.mean(-1, keepdim=True)
            case NormKind.FACTOR:
                rows = rows * norm_in.factor
        if self.site_in.is_residual:
            return rows
        if self.site_in.point is not Point.MLP_IN:
            return None
        norm = self._architecture.layers[self.site_in.layer].mlp_norm
        return norm.frozen_gradient(rows, torch.ones_like(rows[..., :1]))

    @property
    def constant_scale(self) -> float:
        """What recon multiplies by to undo norm_in, where that is the same at every token; else 1,
        as for every other scale that is left out."""
        norm = self.dictionary.norm
        return 1 / norm.factor if norm.kind is NormKind.FACTOR and norm.undone else 1.0


_RESIDUAL = {
    Point.RESID_PRE: Kind.EMBED,
    Point.RESID_MID: Kind.RESID_MID,
    Point.RESID_POST: Kind.RESID_POST,
}


def residual_point(site: Site) -> Address:
    """The address of a canonical site of the residual stream."""
    kind = _RESIDUAL[site.point]
    return Address(kind, None if kind is Kind.EMBED else site.layer)


def canonical(site: Site) -> Site:
    """`resid_pre.L` is `resid_post.(L-1)`; only `resid_pre.0`, the embedding, has no other name."""
    if site.point is Point.RESID_PRE and site.layer:
        return Site(Point.RESID_POST, site.layer - 1)
    return site
