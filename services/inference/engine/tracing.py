"""Tracing upstream: J becomes a node's own value (SEMANTICS section 6).

    TracedNeuron   its pre-activation (one branch of a gated one), or its activation
    TracedScore    a head pair's score or probability, through the query, the key or both
    TracedValue    a head pair's write, measured on what another objective reads from it

Each is an `Objective`: what the value is in the run as it is, at the residual stream that the
node's sublayer reads. Gradients are those of the model's own graph, so nothing is computed twice;
what a trace holds constant is detached, or taken from another run by `hold`.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Self, TypeVar

import torch
from torch import Tensor

from services.common.addresses import Address, Kind
from services.inference.engine.architecture import Architecture
from services.inference.engine.direct_path import direct_path, head_path
from services.inference.engine.interventions import Edit
from services.inference.engine.norms import NormPlace
from services.inference.engine.objectives import (
    Constant,
    EditedVectors,
    Objective,
    Unconditional,
)
from services.inference.engine.run_view import (
    RunView,
    before_post_norm,
    is_upstream,
    read_by_attention,
    read_by_mlp,
)

Part = TypeVar("Part")


def _given(part: Part | None) -> Part:
    """A part of an address that its kind always has."""
    assert part is not None
    return part


class Branch(Enum):
    """An input of a neuron's activation; one that is not gated has only the first."""

    GATE = auto()
    UP = auto()


@dataclass(frozen=True)
class TracedNeuron(Unconditional):
    """A neuron's value at a token: before its non-linearity, or after it (`branch` is None)."""

    node: Address
    branch: Branch | None

    @property
    def position(self) -> int:
        return _given(self.node.position)

    @property
    def logit_positions(self) -> tuple[int, ...]:
        return (self.position,)

    @property
    def reads(self) -> tuple[int, ...]:
        return (self.position,)

    @property
    def _layer(self) -> int:
        return _given(self.node.layer)

    def point(self, architecture: Architecture) -> Address:
        return read_by_mlp(self._layer, parallel=architecture.layers[self._layer].parallel)

    def reading_norms(self, architecture: Architecture) -> frozenset[NormPlace]:
        return frozenset({("mlp", self._layer)})

    def value(self, run: RunView) -> Tensor:
        captured = run.captured
        match self.branch:
            case Branch.GATE:
                values = captured.gates[self._layer]
            case Branch.UP:
                values = captured.ups[self._layer]
            case None:
                values = captured.neurons[self._layer]
        return values[run.row, self.position, self.node.index]

    def constants(self, run: RunView) -> tuple[Constant, ...]:
        return tuple(mlp_constants(run, self._layer))


class _TracedPair(Unconditional):
    """What traces of a head's pair have in common; `node` is `head.L.h~q-k`."""

    node: Address

    @property
    def position(self) -> int:
        return self._query

    @property
    def logit_positions(self) -> tuple[int, ...]:
        return (self._query,)

    @property
    def _query(self) -> int:
        return _given(self.node.position)

    @property
    def _key(self) -> int:
        return _given(self.node.key)

    @property
    def _head(self) -> int:
        return _given(self.node.index)

    @property
    def _layer(self) -> int:
        return _given(self.node.layer)

    def point(self, architecture: Architecture) -> Address:
        return read_by_attention(self._layer)

    def _shared(self, run: RunView, vectors: Tensor) -> Tensor:
        """Keys or values [B, Hk or H, T, dh] -> [T, dh] of the run, as the head reads them."""
        groups = run.architecture.n_heads // vectors.shape[1]
        return vectors[run.row, self._head // groups, : run.tokens]

    def constants(self, run: RunView) -> tuple[Constant, ...]:
        return tuple(attention_constants(run, self._layer))

    def _edits_of(self, run: RunView, kind: Kind) -> tuple[Edit, ...]:
        component = Address(kind, self._layer, self._head)
        return tuple(edit for edit in run.edits if edit.target.component == component)


class Side(Enum):
    """Which input of a score is live."""

    QUERY = auto()
    KEY = auto()
    BOTH = auto()


@dataclass(frozen=True, eq=False)
class TracedScore(_TracedPair):
    """A pair's scaled score before soft cap and mask, or (`post`) its probability."""

    node: Address
    live: Side
    post: bool = False
    held: Tensor | None = None
    """Keys [T, dh] (the query is live) or the query [dh] of the run they were taken from."""

    @property
    def reads(self) -> tuple[int, ...]:
        keys = set(range(self._query + 1)) if self.post else {self._key}
        match self.live:
            case Side.QUERY:
                return (self._query,)
            case Side.KEY:
                return tuple(sorted(keys))
            case Side.BOTH:
                return tuple(sorted(keys | {self._query}))

    @property
    def itself(self) -> Address | None:
        return self.node if self.post else None

    @property
    def holds(self) -> bool:
        return self.live is not Side.BOTH

    def reading_norms(self, architecture: Architecture) -> frozenset[NormPlace]:
        return frozenset((name, self._layer) for name in ("attn", "q", "k"))

    def hold(self, run: RunView) -> Self:
        site = run.attention(self._layer)
        match self.live:
            case Side.QUERY:
                return replace(self, held=self._shared(run, site.key).detach())
            case Side.KEY:
                return replace(self, held=site.query[run.row, self._head, self._query].detach())
            case Side.BOTH:
                return self

    def value(self, run: RunView) -> Tensor:
        held = self if self.held is not None else self.hold(run)
        site = run.attention(self._layer)
        query = site.query[run.row, self._head, self._query]
        keys = self._shared(run, site.key)
        if held.held is not None:
            query, keys = (query, held.held) if self.live is Side.QUERY else (held.held, keys)
        scores = keys @ query * run.layer(self._layer).scaling
        return self._probability(run, scores) if self.post else scores[self._key]

    def _probability(self, run: RunView, scores: Tensor) -> Tensor:
        """scores [T] of the query -> the pair's probability, after edits of it."""
        site = run.attention(self._layer)
        cap = run.layer(self._layer).attn_softcap
        if cap is not None:
            scores = cap * (scores / cap).tanh()
        visible = site.probabilities[run.row, self._head, self._query, : run.tokens] != 0
        probability = scores.where(visible, -torch.inf).softmax(-1)[self._key]
        for edit in self._edits_of(run, Kind.HEAD):
            if edit.masks:  # in `visible` already
                continue
            if edit.target.key == self._key and edit.target.position == self._query:
                probability = edit.apply(probability.view(1)).view(())
            elif edit.target.key is None and edit.zeroes and self._query in edit.positions:
                probability = 0 * probability
        return probability

    def edited(self, run: RunView) -> tuple[EditedVectors, ...]:
        site = run.attention(self._layer)
        sides = {Side.QUERY: [Kind.QUERY], Side.KEY: [Kind.KEY], Side.BOTH: [Kind.QUERY, Kind.KEY]}
        vectors = {Kind.QUERY: site.query, Kind.KEY: site.key}
        return tuple(
            EditedVectors(edits, vectors[kind], self._head)
            for kind in sides[self.live]
            if (edits := self._edits_of(run, kind))
        )


@dataclass(frozen=True, eq=False)
class HeldWrite:
    """What a trace through a value holds constant."""

    probability: Tensor
    """A, scalar."""
    direction: Tensor
    """[dh]: what one unit of the value adds to the downstream objective, per unit of A."""
    constant: Tensor
    """[dh]: what edits of the value add to it: a row of its own, no part of the pair's write."""


@dataclass(frozen=True, eq=False)
class TracedValue(_TracedPair):
    """A pair's direct effect on `downstream`, as a function of its value vector alone."""

    node: Address
    downstream: Objective
    held: HeldWrite | None = None
    notices: tuple[str, ...] = ()

    @property
    def logit_positions(self) -> tuple[int, ...]:
        return (self.position, *self.downstream.logit_positions)

    @property
    def reads(self) -> tuple[int, ...]:
        return (self._key,)

    @property
    def dictionaries(self) -> tuple[str, ...]:
        return self.downstream.dictionaries

    @property
    def holds(self) -> bool:
        return True

    def reading_norms(self, architecture: Architecture) -> frozenset[NormPlace]:
        """The downstream objective's too: its gradient comes from the same pass."""
        own: frozenset[NormPlace] = frozenset({("attn", self._layer)})
        return own | self.downstream.reading_norms(architecture)

    def hold(self, run: RunView) -> Self:
        site = run.attention(self._layer)
        values = site.values_per_head(run.row)[:, : run.tokens]
        probabilities = site.used(run.row)[:, : run.tokens, : run.tokens]
        gradient, notices = self._downstream(run)
        path = head_path(
            gradient,
            (self._query,),
            run.layer(self._layer).w_o,
            values,
            probabilities,
            [edit for edit in run.edits if edit.target.layer == self._layer],
            defaultdict(float),
        )
        held = HeldWrite(
            probability=probabilities[self._head, self._query, self._key],
            direction=path.z[0, self._head],
            constant=(values - path.values)[self._head, self._key],
        )
        return replace(self, held=held, notices=notices)

    def _downstream(self, run: RunView) -> tuple[Tensor, tuple[str, ...]]:
        """[T, d]: the gradient of `downstream` that the layer's heads meet, before a post-norm."""
        point = self.downstream.point(run.architecture)
        reference = self.downstream.reference(run)
        (gradient,) = torch.autograd.grad(
            self.downstream.value(run), reference, retain_graph=True, materialize_grads=True
        )
        gradient = gradient[run.row, : run.tokens]
        path = direct_path(
            gradient,
            point,
            run.edits,
            len(run.architecture.layers),
            before_edits=self.downstream.before_edits,
        )
        met = path.attention[self._layer]
        if not is_upstream(Kind.ATTN, self._layer, point):
            reason = (
                f"attn.{self._layer} is no part of {point}, which the downstream objective reads"
            )
        elif not gradient[self._query].any():
            reason = f"the downstream objective does not read token {self._query}"
        elif not met[self._query].any():
            reason = "interventions cut the path to the downstream objective"
        else:
            return before_post_norm(run, path, Kind.ATTN, self._layer), ()
        return torch.zeros_like(met), (f"{self.node} has no direct effect to trace: {reason}",)

    def value(self, run: RunView) -> Tensor:
        held = self.held or _given(self.hold(run).held)
        value = self._shared(run, run.attention(self._layer).values)[self._key]
        return held.probability * ((value - held.constant) @ held.direction)


def mlp_constants(run: RunView, layer: int) -> Iterator[Constant]:
    """What enters between the residual stream that an MLP reads and its neurons."""
    captured, weights = run.captured, run.layer(layer)
    yield Constant(weights.mlp_norm.bias, captured.mlp_in[layer])
    if weights.b_in is not None:
        yield Constant(weights.b_in, captured.gates[layer])
    if weights.b_up is not None:
        yield Constant(weights.b_up, captured.ups[layer])


def attention_constants(run: RunView, layer: int) -> Iterator[Constant]:
    """What enters between the residual stream that attention reads and its q, k and v."""
    captured, weights = run.captured, run.layer(layer)
    yield Constant(weights.attn_norm.bias, captured.attn_in[layer])
    for bias, output in captured.biased.get(layer, []):
        yield Constant(bias, output)
    for name, norm in (("q", weights.q_norm), ("k", weights.k_norm)):
        if norm is not None:
            yield Constant(norm.bias, captured.qk_normed[name, layer])
