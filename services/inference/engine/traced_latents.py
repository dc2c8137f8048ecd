"""Tracing upstream of a dictionary latent: J becomes its pre-activation, or f (SEMANTICS 6).

What the dictionary encodes is of the model's own graph, so the sublayer before it is live: the MLP,
or attention with its pattern. x_ref is the residual stream that this sublayer reads. A dictionary
of the stream itself, and one that reads what the MLP's input norm hands on, have nothing but norms
between, whose scale is held: there J is linear in x_ref and `rest` is 0. Elsewhere `rest` is what
is not linear, which takes in the edits that lie between x_ref and J.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from services.common.addresses import Address, Kind
from services.inference.engine.architecture import Architecture, bias_of
from services.inference.engine.bound import Place, residual_point
from services.inference.engine.dictionaries.sites import Point
from services.inference.engine.norms import NormPlace
from services.inference.engine.objectives import Constant, Unconditional
from services.inference.engine.run_view import RunView, read_by_attention, read_by_mlp
from services.inference.engine.splice import LatentSite
from services.inference.engine.tracing import attention_constants, mlp_constants


@dataclass(frozen=True, eq=False)
class TracedLatent(Unconditional):
    """A latent's encoder pre-activation at a token, even if it is inactive, or (`post`) its f.

    Of a gated dictionary the pre-activation is the second bracket of its formula. f is the value as
    it stands in the run: after edits of the latent, which the pre-activation knows nothing of.
    """

    node: Address
    """`latent.D.i~t`"""
    place: Place
    """Where the dictionary stands."""
    post: bool = False

    @property
    def position(self) -> int:
        assert self.node.position is not None
        return self.node.position

    @property
    def _latent(self) -> int:
        assert self.node.index is not None
        return self.node.index

    @property
    def logit_positions(self) -> tuple[int, ...]:
        return (self.position,)

    @property
    def dictionaries(self) -> tuple[str, ...]:
        return (self.node.dictionary,)

    @property
    def reads(self) -> tuple[int, ...]:
        return self.place.read_tokens(self.position)

    def point(self, architecture: Architecture) -> Address:
        site = self.place.site_in
        match self.place.reading:
            case Kind.ATTN:
                return read_by_attention(site.layer)
            case Kind.MLP:
                return read_by_mlp(site.layer, parallel=architecture.layers[site.layer].parallel)
            case _:
                return residual_point(site)

    @property
    def itself(self) -> Address | None:
        return self.node if self.post else None

    @property
    def before_edits(self) -> bool:
        """A dictionary of the stream encodes it before the stream is edited there."""
        return self.place.reading is None

    def reference(self, run: RunView) -> Tensor:
        if self.place.reading is None:
            return self._site(run).x
        return run.residual(self.point(run.architecture))

    def reading_norms(self, architecture: Architecture) -> frozenset[NormPlace]:
        site, found = self.place.site_in, {self._norm_in}
        match self.place.reading:
            case Kind.ATTN:
                found.add(("attn", site.layer))
            case Kind.MLP:
                found.add(("mlp", site.layer))
        if self._behind_post_norm:
            found.add(("attn_post" if self.place.reading is Kind.ATTN else "mlp_post", site.layer))
        return frozenset(found)

    @property
    def _norm_in(self) -> NormPlace:
        return f"norm_in.{self.node.dictionary}", None

    @property
    def _behind_post_norm(self) -> bool:
        """Whether the dictionary reads what a post-norm, where the model has one, hands on."""
        site = self.place.site_in
        return site.point in (Point.ATTN_OUT, Point.MLP_OUT) and not site.before_post_norm

    def _site(self, run: RunView) -> LatentSite:
        return run.captured.sites.found[self.node.dictionary]

    def _pre_activation(self, run: RunView) -> Tensor:
        """[B, T, 1]"""
        frozen = run.captured.rows[run.row].freezes(self._norm_in)
        return self._site(run).pre_activation(self._latent, frozen=frozen)

    def value(self, run: RunView) -> Tensor:
        pre = self._pre_activation(run)[run.row, self.position, 0]
        return self._activated(run, pre) if self.post else pre

    def _activated(self, run: RunView, pre: Tensor) -> Tensor:
        """f: the pre-activation or 0, whatever the activation function, and then its edits."""
        site = self._site(run)
        latent = torch.tensor([self._latent], device=pre.device)
        with torch.no_grad():
            f = site.bound.dictionary.encode_of(site.x[run.row, self.position], latent)
        value = torch.where(f[0] != 0, pre, torch.zeros_like(pre))
        for edit in run.edits:
            if edit.target.component == self.node.component and self.position in edit.positions:
                value = edit.only((self.position,)).apply(value.view(1)).view(())
        return value

    def constants(self, run: RunView) -> tuple[Constant, ...]:
        dictionary = self._site(run).bound.dictionary
        latent = torch.tensor([self._latent], device=dictionary.b_enc.device)
        own = Constant(dictionary.encoder_constants(latent), self._pre_activation(run))
        return own, *self._constants_between(run)

    def _constants_between(self, run: RunView) -> Iterator[Constant]:
        """What enters between the residual stream and the dictionary's site."""
        site, reading = self.place.site_in, self.place.reading
        if reading is None:
            return
        layer = run.layer(site.layer)
        if site.point is Point.MLP_IN:
            yield Constant(layer.mlp_norm.bias, run.captured.mlp_in[site.layer])
            return
        if reading is Kind.ATTN:
            yield from attention_constants(run, site.layer)
            projection, post_norm = layer.attention_out, layer.attn_post_norm
        else:
            yield from mlp_constants(run, site.layer)
            if layer.mlp_down is None:  # experts have biases of their own, if any
                return
            projection, post_norm = layer.mlp_down, layer.mlp_post_norm
        if not site.contains_bias:
            return
        bias = bias_of(projection)
        if bias is not None:
            yield Constant(bias, run.captured.projected[reading, site.layer])
        if post_norm is not None and self._behind_post_norm:
            yield Constant(post_norm.bias, self._site(run).x)
