"""What a latent reads at its own token: its sublayer run again for single tokens.

The pre-activation of `latent.D.i~t` is a function of the residual stream that its sublayer reads.
Its gradient there, at token t alone, needs no pass of the model: token t of that one sublayer is
run again, for n latents at once as n rows, and everything that other tokens give it (their keys and
values) stays what it was in the pass. As in a trace of the latent, the scales of all norms on the
way are constants, the dictionary's norm_in included; the pattern and the MLP are live. The edits of
the run lie where they lay.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from services.common.addresses import Kind
from services.inference.engine.dictionaries.sites import Point, Site
from services.inference.engine.interventions import Edit
from services.inference.engine.norms import Norm, at_least_float32
from services.inference.engine.rotation import rotated
from services.inference.engine.run_view import RunView
from services.inference.engine.splice import LatentSite

_CHUNK = 64
"""Latents run at once."""


def encoder_gradients(
    run: RunView, site: LatentSite, tokens: Sequence[int], latents: Sequence[int]
) -> Tensor:
    """[n, d_in]: gradient of each pre-activation at what its dictionary reads at its token."""
    x = site.x[run.row].detach()
    dictionary = site.bound.dictionary
    found = x.new_empty(len(tokens), x.shape[-1], dtype=dictionary.w_enc.dtype)
    by_token: dict[int, list[int]] = {}
    for place, token in enumerate(tokens):
        by_token.setdefault(token, []).append(place)
    for token, places in by_token.items():
        which = torch.tensor([latents[place] for place in places], device=x.device)
        found[places] = dictionary.encoder_directions(x[token], which)
    return found


def input_gradients(
    run: RunView, site: LatentSite, tokens: Sequence[int], latents: Sequence[int]
) -> Tensor:
    """[n, d]: gradient of each pre-activation at the residual stream its sublayer reads, at the
    latent's own token."""
    parts = [
        _input_gradients(run, site, tokens[first : first + _CHUNK], latents[first : first + _CHUNK])
        for first in range(0, len(tokens), _CHUNK)
    ]
    return torch.cat(parts)


def _input_gradients(
    run: RunView, site: LatentSite, tokens: Sequence[int], latents: Sequence[int]
) -> Tensor:
    rows = encoder_gradients(run, site, tokens, latents)
    read = site.bound.site_in
    if read.is_residual:
        return rows
    again = Again(run, site, tokens)
    if read.point is Point.MLP_IN:
        norm, stream = run.layer(read.layer).mlp_norm, again.read_by_mlp
        return norm.frozen_gradient(rows, norm.scale(stream))
    attention = site.bound.reading is Kind.ATTN
    stream = (again.read_by_attention if attention else again.read_by_mlp).requires_grad_()
    with torch.enable_grad():
        at = again.of_heads(again.heads(stream)) if attention else again.of_mlp(stream)
        (gradient,) = torch.autograd.grad(at, stream, rows.to(at))
    return gradient


def source_scores(
    run: RunView, site: LatentSite, tokens: Sequence[int], latents: Sequence[int]
) -> Tensor:
    """[n, T]: how much of each pre-activation comes through each token that its own attends to.

    Pattern and scales are constants; what edited dictionaries add on the way is a constant too.
    """
    row, length = run.row, run.tokens
    attention = run.attention(site.bound.site_in.layer)
    values = attention.values_per_head(row)[:, :length]
    pattern = attention.used(row)[:, list(tokens), :length]
    rows = encoder_gradients(run, site, tokens, latents)
    again = Again(run, site, tokens, splices=False)
    sums = torch.einsum("hnt,hte->nhe", pattern, values).requires_grad_()
    with torch.enable_grad():
        at = again.of_heads(again.edited_rows(sums))
        (gradient,) = torch.autograd.grad(at, sums, rows.to(at))
    return torch.einsum("hnt,nht->nt", pattern, torch.einsum("nhe,hte->nht", gradient, values))


class Again:
    """The sublayer that a dictionary reads, run again up to it: n rows, one token each."""

    def __init__(
        self, run: RunView, site: LatentSite, tokens: Sequence[int], *, splices: bool = True
    ) -> None:
        """Without `splices`, dictionaries that are edited on the way add nothing."""
        self._run = run
        self._tokens = list(tokens)
        self._target = site.bound.site_in
        self._splices = splices
        self._layer = run.layer(self._target.layer)
        self._inputs: dict[Site, Tensor] = {}
        """What stands at the sites on the way, [n, w]."""

    @property
    def read_by_attention(self) -> Tensor:
        """[n, d], detached"""
        return self._at(self._run.captured.block_inputs[self._target.layer])

    @property
    def read_by_mlp(self) -> Tensor:
        """[n, d], detached"""
        return self._at(self._run.captured.middles[self._target.layer])

    def _at(self, values: Tensor) -> Tensor:
        """[B, T, w] -> [n, w], detached: at the rows' tokens."""
        return values.detach()[self._run.row, self._tokens]

    def heads(self, stream: Tensor) -> Tensor:
        """[n, d] -> [n, H, dh]: outputs of the heads, keys and values of other tokens given."""
        run, layer, tokens = self._run, self._layer, self._tokens
        site, length = run.attention(self._target.layer), run.tokens
        read = _held(layer.attn_norm, stream, layer.attn_norm.scale(stream.detach()))
        query, key, value = self._own_vectors(read)
        keys, values = (
            each(run.row)[:, :length] for each in (site.keys_per_head, site.values_per_head)
        )
        places = torch.tensor(tokens, device=stream.device)
        own = torch.nn.functional.one_hot(places, length)[:, None] > 0
        scores = torch.einsum("nhe,hte->nht", query, keys)
        scores = torch.where(own, (query * key).sum(-1, keepdim=True), scores) * layer.scaling
        if layer.attn_softcap is not None:
            scores = layer.attn_softcap * (scores / layer.attn_softcap).tanh()
        visible = site.probabilities.detach()[run.row][:, tokens, :length].transpose(0, 1) != 0
        scores = at_least_float32(scores).where(visible, -torch.inf)
        pattern = scores.softmax(-1).to(values.dtype)
        pattern = self._edited_pairs(pattern)
        others = torch.einsum("nht,hte->nhe", pattern.where(~own, 0), values)
        through_own = pattern.where(own, 0).sum(-1, keepdim=True) * value
        return self.edited_rows(others + through_own)

    def _own_vectors(self, read: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[n, d] -> q, k, v [n, H, dh] of the rows' own tokens, after rotation and edits."""
        layer, index = self._layer, self._target.layer
        groups = len(layer.w_q) // len(layer.w_k)
        query = _projected(read, layer.w_q, layer.b_q, layer.q_norm)
        key = _projected(read, layer.w_k, layer.b_k, layer.k_norm)
        value = _projected(read, layer.w_v, layer.b_v, None)
        rotation = self._run.captured.rotations[index]
        query, key = rotated(layer.attention, rotation, self._tokens, query, key)
        key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
        return (
            self._edited(Kind.QUERY, query),
            self._edited(Kind.KEY, key),
            self._edited(Kind.VALUE, value),
        )

    def _edited_pairs(self, pattern: Tensor) -> Tensor:
        """Probabilities [n, H, T] after the edits of pairs; masks are in them already."""
        for edit, rows in self._edits(Kind.HEAD):
            if edit.target.key is not None and not edit.masks:
                where = (rows, edit.target.index, edit.target.key)
                pattern = _put(pattern, where, edit.apply(pattern[where]))
        return pattern

    def edited_rows(self, outputs: Tensor) -> Tensor:
        """Outputs of the heads [n, H, dh] after the edits of heads and their rows."""
        for edit, rows in self._edits(Kind.HEAD):
            if edit.target.key is None:
                where = (rows, edit.target.index)
                outputs = _put(outputs, where, edit.apply(outputs[where]))
        return outputs

    def of_heads(self, outputs: Tensor) -> Tensor:
        """Outputs of the heads [n, H, dh] -> [n, d_in]: what the dictionary reads."""
        z = outputs.flatten(1)
        if self._target.point is Point.Z:
            return z
        z = self._spliced(Point.Z, z, before_post_norm=True)
        write = self._layer.attention_out(z)
        scales = self._run.captured.attn_scale[self._target.layer]
        return self._behind(Point.ATTN_OUT, write, self._layer.attn_post_norm, scales)

    def of_mlp(self, stream: Tensor) -> Tensor:
        """[n, d] -> [n, d_in]: what the dictionary reads behind the MLP's non-linearity."""
        layer, index = self._layer, self._target.layer
        read = _held(layer.mlp_norm, stream, layer.mlp_norm.scale(stream.detach()))
        self._inputs[Site(Point.MLP_IN, index)] = read
        if layer.mlp_gate is None or layer.mlp_down is None:
            write = layer.mlp(read[None])[0]
        else:
            neurons = layer.activation(layer.mlp_gate(read))
            if layer.mlp_up is not None:
                neurons = neurons * layer.mlp_up(read)
            neurons = self._edited(Kind.NEURON, neurons)
            if self._target.point is Point.MLP_ACT:
                return neurons
            neurons = self._spliced(Point.MLP_ACT, neurons, before_post_norm=True)
            write = layer.mlp_down(neurons)
        scales = self._run.captured.mlp_scale[index]
        return self._behind(Point.MLP_OUT, write, layer.mlp_post_norm, scales)

    def _behind(
        self, point: Point, write: Tensor, post_norm: Norm | None, scales: Tensor | None
    ) -> Tensor:
        """A sublayer's output [n, d] -> what the dictionary reads, through a post-norm or not."""
        if self._target.before_post_norm:
            return write
        write = self._spliced(point, write, before_post_norm=True)
        if post_norm is None or scales is None:
            return write
        return _held(post_norm, write, self._at(scales))

    def _spliced(self, point: Point, x: Tensor, *, before_post_norm: bool) -> Tensor:
        """[n, w] -> the same with what edits of dictionaries there add."""
        here = Site(point, self._target.layer, before_post_norm)
        self._inputs[here] = x
        added = torch.zeros_like(x)
        for found in self._run.captured.sites.found.values() if self._splices else ():
            bound = found.bound
            if bound.site != here:
                continue
            edits = [
                replace(edit, positions=tuple(rows))
                for edit, rows in self._placed
                if edit.target.dictionary == bound.id
            ]
            if edits:
                local = LatentSite(bound, self._inputs[bound.site_in][None], x[None])
                added = added + local.splice(0, list(enumerate(edits)), _apply)
        return x + added

    def _edited(self, kind: Kind, values: Tensor) -> Tensor:
        """[n, W, ...] -> the same, after the edits that name an index in W."""
        for edit, rows in self._edits(kind):
            where = (rows, edit.target.index)
            values = _put(values, where, edit.apply(values[where]))
        return values

    def _edits(self, kind: Kind) -> Iterator[tuple[Edit, list[int]]]:
        for edit, rows in self._placed:
            if (edit.target.kind, edit.target.layer) == (kind, self._target.layer):
                yield edit, rows

    @cached_property
    def _placed(self) -> list[tuple[Edit, list[int]]]:
        """The run's edits of this layer and of dictionaries that reach some of the rows, and which
        rows; one position for each."""
        rows_of: dict[int, list[int]] = {}
        for row, token in enumerate(self._tokens):
            rows_of.setdefault(token, []).append(row)
        placed = []
        for edit in self._run.edits:
            if edit.target.layer != self._target.layer and not edit.target.dictionary:
                continue
            rows = [row for position in edit.positions for row in rows_of.get(position, ())]
            if rows:
                placed.append((edit.only([self._tokens[row] for row in rows]), rows))
        return placed


def _apply(row: int, number: int, edit: Edit, before: Tensor) -> Tensor:
    return edit.apply(before)


def _put(values: Tensor, where: tuple[Any, ...], new: Tensor) -> Tensor:
    values = values.clone()
    values[where] = new.to(values.dtype)
    return values


def _projected(read: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm | None) -> Tensor:
    """[n, d] -> [n, heads, dh] before rotation."""
    vectors = torch.einsum("hed,nd->nhe", weight, read)
    if bias is not None:
        vectors = vectors + bias
    return vectors if norm is None else _held(norm, vectors, norm.scale(vectors))


def _held(norm: Norm, x: Tensor, scale: Tensor) -> Tensor:
    """[..., d]: a norm with a given scale."""
    return (norm.linear(x) / scale + norm.bias).to(x.dtype)
