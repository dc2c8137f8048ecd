"""The direct path: how g* reaches each write, through the edits that lie between (SEMANTICS 7).

An edit of a vector site is x -> M x + c. On the way from a write to the reference residual every
edit multiplies the write by M, which is the same as multiplying the gradient by M from the right:
so each sublayer gets the gradient that its writes meet. The write of c is a row of its own,
`edit.<target>~t`.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from services.common.addresses import Address, Kind
from services.inference.engine.interventions import Edit
from services.inference.engine.numerics import precise


@dataclass(frozen=True)
class DirectPath:
    """Gradients that writes meet, [T, d] each, and what the constants of edits write."""

    embed: Tensor
    attention: tuple[Tensor, ...]
    """Per layer, for heads and the output bias."""
    mlp: tuple[Tensor, ...]
    """Per layer, for neurons and the output bias."""
    residual: dict[Address, Tensor]
    """At each point of the residual stream, for what is added there before its edits."""
    edits: dict[Address, float]
    """Direct effect of each edit's constant, by the edited node."""


def direct_path(
    reference: Tensor,
    point: Address,
    edits: Sequence[Edit],
    layers: int,
    *,
    before_edits: bool = False,
) -> DirectPath:
    """`reference` is g*, [T, d], at a point of the residual stream after its edits, or before them.

    Whatever is not upstream of the point meets a gradient of 0.
    """
    rows: dict[Address, float] = defaultdict(float)

    def before(kind: Kind, layer: int | None, gradient: Tensor) -> Tensor:
        """The gradient before the edits of one site; the last edit comes first."""
        for edit in reversed(edits):
            if edit.target.kind is kind and edit.target.layer == layer:
                gradient = through(edit, edit.target, gradient, rows)
        return gradient

    attention: list[Tensor] = []
    mlp: list[Tensor] = []
    residual: dict[Address, Tensor] = {}

    def at(kind: Kind, layer: int | None, gradient: Tensor) -> Tensor:
        is_point = (kind, layer) == (point.kind, point.layer)
        if is_point and before_edits:
            residual[Address(kind, layer)] = torch.zeros_like(reference)
            return reference
        if is_point:
            gradient = reference
        residual[Address(kind, layer)] = found = before(kind, layer, gradient)
        return found

    gradient = torch.zeros_like(reference)
    for layer in reversed(range(layers)):
        gradient = at(Kind.RESID_POST, layer, gradient)
        mlp.append(before(Kind.MLP, layer, gradient))
        gradient = at(Kind.RESID_MID, layer, gradient)
        attention.append(before(Kind.ATTN, layer, gradient))
    embed = at(Kind.EMBED, None, gradient)
    return DirectPath(embed, tuple(reversed(attention)), tuple(reversed(mlp)), residual, rows)


def through(edit: Edit, target: Address, gradient: Tensor, rows: dict[Address, float]) -> Tensor:
    """The gradient [T, w] before an edit of the vectors at its positions; enters c's rows."""
    positions = list(edit.positions)
    met = gradient[positions]
    if edit.constant is not None:
        effects = (precise(met) * precise(edit.constant.to(met))).sum(-1)
        for position, effect in zip(positions, effects.tolist(), strict=True):
            if effect:
                rows[target.component.at(position)] += effect
    changed = gradient.clone()
    changed[positions] = edit.linear(met)
    return changed


@dataclass(frozen=True)
class HeadPath:
    """One layer's heads: what the direct path makes of their outputs and values."""

    z: Tensor
    """[reads, H, dh]: gradient that each head's output z meets at the read tokens."""
    values: Tensor
    """[H, T, dh]: values without the constants of their edits."""


def head_path(
    gradient: Tensor,
    reads: Sequence[int],
    w_o: Tensor,
    values: Tensor,
    probabilities: Tensor,
    edits: Sequence[Edit],
    rows: dict[Address, float],
) -> HeadPath:
    """gradient [T, d] at the heads' writes, w_o [H, dh, d], values [H, T, dh], A [H, T, T].

    Enters the rows of the constants that edits of head outputs and values add.
    """
    z = torch.einsum("hed,rd->rhe", w_o, gradient[list(reads)])
    for edit in reversed(edits):
        if edit.target.kind is not Kind.HEAD or edit.target.key is not None:
            continue
        for number, position in enumerate(reads):
            if position in edit.positions:
                place = (number, edit.target.index)
                met = z[place]
                _enter(edit, position, met, rows)
                z = z.clone()
                z[place] = edit.linear(met[None])[0]
    # What a value vector at token k meets: sum over the read tokens of A[q, k] times z's gradient.
    moved = values
    pending: dict[tuple[int, int], Tensor] = {}
    for edit in reversed(edits):
        if edit.target.kind is not Kind.VALUE:
            continue
        head = edit.target.index
        assert head is not None
        for position in edit.positions:
            weights = probabilities[head, list(reads), position]
            met = pending.get((head, position), weights @ z[:, head])
            _enter(edit, position, met, rows)
            pending[head, position] = edit.linear(met[None])[0]
    if pending:
        moved = _without_constants(values, edits)
    return HeadPath(z, moved)


def _enter(edit: Edit, position: int, met: Tensor, rows: dict[Address, float]) -> None:
    """Enters the row of the constant that the edit writes at a position, met by `met` [w]."""
    constant = edit.constant
    if constant is None:
        return
    if constant.dim() == 2:
        constant = constant[edit.positions.index(position)]
    effect = float(precise(met) @ precise(constant.to(met)))
    if effect:
        rows[edit.target.component.at(position)] += effect


def _without_constants(values: Tensor, edits: Sequence[Edit]) -> Tensor:
    """Values [H, T, dh] after edits, less what the edits' constants add to them."""
    added = torch.zeros_like(values)
    for edit in edits:
        if edit.target.kind is Kind.VALUE:
            where = (edit.target.index, list(edit.positions))
            added[where] = edit.apply(added[where])
    return values - added
