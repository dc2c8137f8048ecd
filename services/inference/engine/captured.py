"""One forward pass: what was captured at every site, and the edits applied on the way."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from services.common.addresses import Kind
from services.inference.engine.cancellation import CancelToken
from services.inference.engine.dictionaries.sites import Point as SitePoint
from services.inference.engine.dictionaries.sites import Site
from services.inference.engine.interventions import Edit, Receipt
from services.inference.engine.norms import FINAL, NormPlace
from services.inference.engine.numerics import precise
from services.inference.engine.points import Point
from services.inference.engine.splice import Probe, Sites

_POINTS = {
    Kind.EMBED: "embed",
    Kind.RESID_POST: "resid_post",
    Kind.ATTN: "attn_out",
    Kind.MLP: "mlp_out",
}


@dataclass(frozen=True)
class Row:
    """One prompt of a batch.

    `logits_at` has the positions at which it wants logits beyond those the whole pass has them at.
    `final_norm_frozen`, `block_norms_frozen` (all but the final one) and `frozen_norms` say whose
    scale is constant in the backward pass.
    """

    token_ids: tuple[int, ...]
    edits: tuple[Edit, ...] = ()
    final_norm_frozen: bool = False
    block_norms_frozen: bool = False
    frozen_norms: frozenset[NormPlace] = frozenset()
    logits_at: tuple[int, ...] = ()

    def freezes(self, place: NormPlace) -> bool:
        """Whether this norm's scale is constant in the backward pass of the row."""
        by_mode = self.final_norm_frozen if place == FINAL else self.block_norms_frozen
        return by_mode or place in self.frozen_norms


@dataclass
class AttentionSite:
    """One layer's attention in one pass. Rows with edits have probabilities of their own."""

    query: Tensor
    """[B, H, T, dh], after rotation and edits."""
    key: Tensor
    """[B, Hk or H, T, dh], after rotation and edits."""
    probabilities: Tensor
    """[B, H, T, T] as query, key: post-softmax, before edits of pairs and rows."""
    values: Tensor
    """[B, Hk or H, T, dh], bias included, after edits of values."""
    z: Tensor = field(init=False)
    """[B, T, H, dh]: the heads' outputs, after edits: input of the output projection."""
    edited_rows: tuple[int, ...] = ()
    edited: Tensor | None = None
    """[edited rows, H, T, T]: the probabilities that the values were summed with."""
    zeroed: list[tuple[int, int | None, tuple[int, ...]]] = field(default_factory=list)
    """(row, head, positions) of zeroed rows: the same as if their probabilities were 0."""

    def scores(self, row: int, scaling: float) -> Tensor:
        """[H, T, T] as query, key: scaled scores before soft cap and mask, of the graph."""
        query, key = self.query[row], self.key[row]
        key = key.repeat_interleave(query.shape[0] // key.shape[0], dim=0)
        return query @ key.transpose(1, 2) * scaling

    def used(self, row: int) -> Tensor:
        """[H, T, T], detached: the probabilities the row's values were summed with."""
        if row not in self.edited_rows or self.edited is None:
            return self.probabilities[row].detach()
        used = self.edited[self.edited_rows.index(row)].detach().clone()
        for zeroed_row, head, positions in self.zeroed:
            if zeroed_row == row:
                used[head, list(positions)] = 0
        return used

    def keys_per_head(self, row: int) -> Tensor:
        """[H, T, dh], detached: keys as each query head reads them."""
        keys = self.key[row].detach()
        return keys.repeat_interleave(self.query.shape[1] // keys.shape[0], dim=0)

    def values_per_head(self, row: int) -> Tensor:
        """[H, T, dh], detached: values as each query head reads them."""
        values = self.values[row].detach()
        return values.repeat_interleave(self.probabilities.shape[1] // values.shape[0], dim=0)


@dataclass(frozen=True)
class ExpertsWrite:
    """What a mixture of experts adds to the stream, [B, T, d] each."""

    before: Tensor
    """Before edits, detached."""
    after: Tensor
    """After them."""


class _Running(list[Any]):
    """What a pass captures per layer, kept for the running layer only, under its number."""

    def __init__(self, first_layer: int) -> None:
        super().__init__()
        self._next = first_layer

    def append(self, value: Any) -> None:
        self[:] = [value]
        self._next += 1

    def __getitem__(self, layer: Any) -> Any:
        if layer != self._next - 1:
            raise LookupError(f"layer {layer} is not the one that runs now")
        return super().__getitem__(0)


@dataclass
class Pass:
    """One forward pass and what it captured.

    Tensors of one graph, but where they are called detached. The lists marked with gradients are
    filled in passes with gradients only: others keep no more than they need.
    """

    rows: Sequence[Row]
    positions: Sequence[int]
    """Where `logits` are, besides where each row wants its own."""
    gradients: bool
    cancel: CancelToken
    embed: Tensor = field(init=False)
    """[B, T, d]: input of the first block, after edits; the leaf of the graph."""
    embed_before: Tensor = field(init=False)
    """[B, T, d]: the same before edits."""
    block_inputs: list[Tensor] = field(default_factory=list)
    """Per layer [B, T, d]: the residual stream that the block reads."""
    attn_in: list[Tensor] = field(default_factory=list)
    """Per layer [B, T, d]: output of the norm before attention (with gradients)."""
    biased: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    """By layer: bias [w] and output [B, T, w] of each projection to q, k and v that has a bias
    (with gradients)."""
    qk_normed: dict[NormPlace, Tensor] = field(default_factory=dict)
    """Outputs of QK-norms, token axis anywhere but first (with gradients)."""
    projected: dict[tuple[Kind, int], Tensor] = field(default_factory=dict)
    """[B, T, d]: output of a layer's `attn` or `mlp`, bias included, before any dictionary,
    post-norm or edit of it (with gradients)."""
    attn_scale: list[Tensor | None] = field(default_factory=list)
    """Per layer [B, T, 1], detached: scale of the norm behind attention, if there is one."""
    attn_write: list[Tensor] = field(default_factory=list)
    """Per layer [B, T, d]: what attention adds to the stream, after post-norm and edits (with
    gradients)."""
    middles: list[Tensor] = field(default_factory=list)
    """Per layer [B, T, d]: the residual stream that the norm before the MLP reads; the block's
    input in a parallel block."""
    edited_middle: Tensor | None = None
    """The running layer's middle where it was edited; the block's output is then summed anew."""
    last_write: Tensor = field(init=False)
    """[B, T, d]: what the MLP that ran last adds to the stream."""
    mlp_in: list[Tensor] = field(default_factory=list)
    """Per layer [B, T, d]: output of the norm before the MLP (with gradients)."""
    gates: dict[int, Tensor] = field(default_factory=dict)
    """By layer [B, T, F]: pre-activations, of the gate where it is gated (with `branches`)."""
    ups: dict[int, Tensor] = field(default_factory=dict)
    """By layer [B, T, F]: the other branch of gated MLPs, else empty (with `branches`)."""
    mlp_scale: list[Tensor | None] = field(default_factory=list)
    """Per layer [B, T, 1], detached: scale of the norm behind the MLP, if there is one."""
    mlp_write: list[Tensor] = field(default_factory=list)
    """Per layer [B, T, d]: what the MLP adds to the stream, after post-norm and edits (with
    gradients)."""
    rotations: list[tuple[Tensor, Tensor] | None] = field(default_factory=list)
    """Per layer cosine and sine [1, T, dh] of the rotary embedding, if there is one."""
    _inputs: tuple[Tensor, Tensor] = field(init=False)
    """q and k of the attention that runs now."""
    attention: list[AttentionSite] = field(default_factory=list)
    neurons: list[Tensor] = field(default_factory=list)
    """Per layer [B, T, F], after edits."""
    experts: dict[int, ExpertsWrite] = field(default_factory=dict)
    """By layer, where the MLP is a mixture of experts."""
    final_input: Tensor = field(init=False)
    """[B, T, d]: the residual stream after the last block, after edits."""
    final_output: Tensor = field(init=False)
    """[B, T, d]: output of the final norm."""
    logits: Tensor = field(init=False)
    """[B, P, V]: of each row at its `logits_at`; what lies behind them repeats the last."""
    forward_ms: float = 0.0
    branches: bool = False
    """Whether pre-activations of neurons are kept."""
    wanted: frozenset[Point] = frozenset()
    """Points to keep beyond what every pass captures."""
    kept: dict[Point, Tensor] = field(default_factory=dict)
    """Their values [B, T, ...], after edits; filled by `keep`."""
    sites: Sites | Probe = field(default_factory=lambda: Sites(()))
    """Dictionaries read or edited in this pass."""
    edited_biases: dict[tuple[Kind, int], Tensor] = field(default_factory=dict)
    """[B, T, d]: what edited biases of sublayers add to the stream, after the edits."""
    _receipts: dict[tuple[int, int], Receipt] = field(default_factory=dict)
    _applied: dict[tuple[int, int], Edit] = field(default_factory=dict)
    _values: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    _at_site: dict[tuple[Kind, int | None], list[tuple[int, int, Edit]]] = field(init=False)

    def __post_init__(self) -> None:
        self._at_site = defaultdict(list)
        for row, spec in enumerate(self.rows):
            for number, edit in enumerate(spec.edits):
                self._at_site[edit.target.kind, edit.target.layer].append((row, number, edit))

    def keep_running_layer_only(self, first_layer: int) -> None:
        """Of all that is captured per layer; the pass begins with that layer."""
        for each in fields(Pass):
            if each.default_factory is list:
                setattr(self, each.name, _Running(first_layer))

    def logits_at(self, row: int) -> tuple[int, ...]:
        """The row's positions that `logits` are at, in order."""
        return (*self.positions, *self.rows[row].logits_at)

    def receipts(self, row: int) -> tuple[Receipt, ...]:
        """What each of the row's edits did, in order. Raises KeyError if one was never applied."""
        return tuple(self._receipts[row, number] for number in range(len(self.rows[row].edits)))

    def skips(self, layer: int) -> bool:
        """Whether the layer is not run, because the pass goes on from a later one."""
        return False

    def keep(self, name: str, layer: int | None, values: Tensor) -> None:
        """Keeps [B, T, ...] if that point was asked for."""
        point = Point(name, layer)
        if point in self.wanted:
            self.kept[point] = values.detach()

    def resid_post(self, layer: int) -> Tensor:
        """[B, T, d]: the residual stream after a layer, after edits."""
        later = self.block_inputs[layer + 1 :]
        return later[0] if later else self.final_input

    def applied(self, row: int) -> tuple[Edit, ...]:
        """The row's edits in order, as they were applied: every constant is known."""
        return tuple(self._applied[row, number] for number in range(len(self.rows[row].edits)))

    def read(self, row: int, number: int) -> Tensor:
        """[P] or [P, w], float64 on the CPU: what one of the row's edits read."""
        return self._values[row, number]

    def edits_at(self, kind: Kind, layer: int | None) -> Sequence[tuple[int, int, Edit]]:
        """(row, number within the row, edit) of every edit of this kind in the layer."""
        return self._at_site.get((kind, layer), ())

    def at_site(
        self, point: SitePoint, layer: int, values: Tensor, *, before_post_norm: bool = False
    ) -> Tensor:
        """Shows dictionaries a site, [B, T, w], and adds what edits of their parts change."""
        site = Site(point, layer, before_post_norm)
        if not self.sites.wants(site):
            return values
        return self.sites.visit(site, values, self._dictionary_edits, self._apply)

    def _dictionary_edits(self, dictionary: str) -> dict[int, list[tuple[int, Edit]]]:
        """Edits of one dictionary's parts, by row."""
        found: dict[int, list[tuple[int, Edit]]] = {}
        for row, spec in enumerate(self.rows):
            for number, edit in enumerate(spec.edits):
                if edit.target.dictionary == dictionary:
                    found.setdefault(row, []).append((number, edit))
        return found

    def edit_residual(self, kind: Kind, layer: int | None, values: Tensor) -> Tensor:
        """Applies edits of a residual-width site to [B, T, d]."""
        edits = self.edits_at(kind, layer)
        if edits:
            values = values.clone()
        for row, number, edit in edits:
            where = (row, list(edit.positions))
            values[where] = self._apply(row, number, edit, values[where])
        if kind in _POINTS:
            self.keep(_POINTS[kind], layer, values)
        return values

    def edit_bias(self, kind: Kind, layer: int, write: Tensor, bias: Tensor) -> Tensor:
        """Applies edits of a sublayer's bias, [1, d] or [B, T, d], to its write [B, T, d]."""
        whole = bias.expand_as(write)
        edited = whole.clone()
        for row, number, edit in self.edits_at(kind, layer):
            where = (row, list(edit.positions))
            edited[where] = self._apply(row, number, edit, edited[where])
        self.edited_biases[kind, layer] = edited
        return write + (edited - whole)

    def edit_neurons(self, layer: int, activations: Tensor) -> Tensor:
        """Applies the layer's neuron edits to [B, T, F] and captures the result."""
        edits = self.edits_at(Kind.NEURON, layer)
        if edits:
            activations = activations.clone()
        for row, number, edit in edits:
            where = (row, list(edit.positions), edit.target.index)
            activations[where] = self._apply(row, number, edit, activations[where])
        self.neurons.append(activations)
        return activations

    def edit_attention_inputs(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Applies edits of q, k and v [B, H or Hk, T, dh]; edited k and v become one per head."""
        heads = query.shape[1]
        shared = any(self.edits_at(kind, layer) for kind in (Kind.KEY, Kind.VALUE))
        if shared and key.shape[1] != heads:
            key = key.repeat_interleave(heads // key.shape[1], dim=1)
            value = value.repeat_interleave(heads // value.shape[1], dim=1)
        query = self._edit_heads(Kind.QUERY, layer, query)
        key = self._edit_heads(Kind.KEY, layer, key)
        self._inputs = query, key
        return query, key, self._edit_heads(Kind.VALUE, layer, value)

    def _edit_heads(self, kind: Kind, layer: int, vectors: Tensor) -> Tensor:
        """Edits of one vector per head, [B, H, T, dh]."""
        edits = self.edits_at(kind, layer)
        if edits:
            vectors = vectors.clone()
        for row, number, edit in edits:
            where = (row, edit.target.index, list(edit.positions))
            vectors[where] = self._apply(row, number, edit, vectors[where])
        return vectors

    def edit_attention_mask(self, layer: int, mask: Tensor) -> Tensor:
        """The additive mask [B or 1, 1, T, T]; per query head where pairs are masked."""
        edits = [each for each in self.edits_at(Kind.HEAD, layer) if each[2].masks]
        if not edits:
            return mask
        heads = self._inputs[0].shape[1]
        mask = mask.expand(len(self.rows), heads, -1, -1).clone()
        for row, _, edit in edits:
            where = (row, edit.target.index, edit.target.position, edit.target.key)
            mask[where] = torch.finfo(mask.dtype).min
        return mask

    def edit_attention_outputs(
        self,
        layer: int,
        values: Tensor,
        output: Tensor,
        probabilities: Tensor,
        unmasked: Tensor | None = None,
    ) -> Tensor:
        """Applies the layer's edits of pairs, then of rows, and captures the attention.

        values [B, Hk or H, T, dh], output [B, T, H, dh], probabilities [B, H, T, T] -> output.
        `unmasked` are the probabilities without the edits of the mask, if there are any.
        """
        site = AttentionSite(*self._inputs, probabilities, values)
        self.attention.append(site)
        edits = self.edits_at(Kind.HEAD, layer)
        if unmasked is not None:
            self._record_masks([each for each in edits if each[2].masks], unmasked)
        z = self._edited_outputs([each for each in edits if not each[2].masks], site, output)
        site.z = self.at_site(SitePoint.Z, layer, z.flatten(2)).view_as(z)
        return site.z

    def _edited_outputs(
        self, edits: Sequence[tuple[int, int, Edit]], site: AttentionSite, output: Tensor
    ) -> Tensor:
        """[B, T, H, dh] -> the same, edited; enters the edited probabilities in the site."""
        values, probabilities = site.values, site.probabilities
        if not edits:
            return output
        site.edited_rows = tuple(sorted({row for row, _, _ in edits}))
        rows = list(site.edited_rows)
        edited = probabilities[rows]
        for row, number, edit in edits:
            if edit.target.key is not None and not edit.reads:
                pair = (rows.index(row), edit.target.index, list(edit.positions), edit.target.key)
                edited[pair] = self._apply(row, number, edit, edited[pair])
        site.edited = edited
        groups = probabilities.shape[1] // values.shape[1]
        summed = edited @ values[rows].repeat_interleave(groups, dim=1)
        summed = summed.transpose(1, 2).to(output.dtype)
        for row, number, edit in edits:
            if edit.target.key is None:
                where = (rows.index(row), list(edit.positions), edit.target.index)
                after = self._apply(row, number, edit, summed[where])
                summed = summed.clone()
                summed[where] = after
                if edit.zeroes:
                    site.zeroed.append((row, edit.target.index, edit.positions))
        for row, number, edit in edits:
            if edit.target.key is not None and edit.reads:
                used = site.used(row)[edit.target.index, list(edit.positions), edit.target.key]
                self._apply(row, number, edit, used)
        return output.index_copy(0, torch.tensor(rows, device=output.device), summed)

    def _record_masks(self, edits: Sequence[tuple[int, int, Edit]], unmasked: Tensor) -> None:
        for row, number, edit in edits:
            before = unmasked[row, edit.target.index, list(edit.positions), edit.target.key]
            self._applied[row, number] = edit
            self._record(row, number, edit, before, torch.zeros_like(before))

    def _apply(self, row: int, number: int, edit: Edit, before: Tensor) -> Tensor:
        """The values [P] or [P, w] of an edit's sites after it."""
        if edit.reads:
            self._values[row, number] = before.detach().cpu().double()
        edit = edit.fixed(before)
        self._applied[row, number] = edit
        after = edit.apply(before)
        self._record(row, number, edit, before, after)
        return after

    def _record(self, row: int, number: int, edit: Edit, before: Tensor, after: Tensor) -> None:
        single = edit.is_scalar and len(edit.positions) == 1
        change = precise(after.detach() - before.detach())
        self._receipts[row, number] = Receipt(
            target=edit.target,
            sites=len(edit.positions),
            positions=edit.positions,
            applied=len(edit.positions),
            delta_norm=float(torch.linalg.vector_norm(change)),
            before=float(before.item()) if single else None,
            after=float(after.item()) if single else None,
        )
