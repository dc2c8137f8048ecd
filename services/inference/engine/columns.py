"""The columns of the node table: values of all nodes of one kind in one layer of one run.

A group answers for its nodes by flat index, computes a whole column only when asked to rank by it,
and the four columns of a few listed nodes by gathering. No per-node d-vector is ever made: write
norms need only W_O W_O^T and row norms, and direct effects only the tokens that J reads.

Formulas: SEMANTICS section 5. Notation: e, A, v, a, G, g* as in its section 1.
"""

from abc import ABC, abstractmethod
from enum import Enum, auto
from functools import cached_property

import torch
from torch import Tensor

from services.common.addresses import Address, Kind
from services.inference.engine.architecture import Layer
from services.inference.engine.direct_path import HeadPath
from services.inference.engine.numerics import precise
from services.inference.engine.sublayers import Sublayer


class Column(Enum):
    ACTIVATION = auto()
    WRITE_MAGNITUDE = auto()
    DIRECT_EFFECT = auto()
    TOTAL_EFFECT = auto()


COLUMNS = tuple(Column)
"""The order of the last axis of `NodeGroup.gather`."""


class NodeGroup(ABC):
    """All nodes of one kind in one layer, by flat index in [0, size)."""

    size: int
    device: torch.device
    start: Tensor | None = None
    """x0 of its nodes, shaped like x: what the estimate is measured from; None: 0."""

    @property
    def sublayer(self) -> Sublayer:
        return Sublayer.of(self.address(0))

    def measure_from(self, start: Tensor) -> None:
        """Sets x0."""
        self.start = start

    def _moved(self, values: Tensor) -> Tensor:
        """x - x0"""
        return values if self.start is None else values - self.start

    def prepare(self, k: int) -> None:  # noqa: B027  # most groups have nothing to prepare
        """Called before `column` with the number of nodes wanted; groups that count only some of
        their nodes make sure that there are enough."""

    @abstractmethod
    def column(self, column: Column) -> Tensor:
        """[size]: one column of every node."""

    @abstractmethod
    def gather(self, indices: Tensor) -> Tensor:
        """[n] -> [n, 4]: all columns of some nodes, in the order of `COLUMNS`."""

    @abstractmethod
    def order(self, indices: Tensor) -> Tensor:
        """[n] -> [n]: a number that sorts nodes by address."""

    @abstractmethod
    def address(self, index: int) -> Address:
        """The node's address."""

    @abstractmethod
    def find(self, address: Address) -> int | None:
        """The flat index of an address of this group, None where it does not exist in this run."""

    @abstractmethod
    def direct_total(self) -> float:
        """Sum of the direct-effect column."""

    @abstractmethod
    def token_effects(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Per kind of sum: direct and estimated total effect summed over nodes, each [T]."""


class EmbedNodes(NodeGroup):
    """`embed~t`: one node per token, whose write e is a vector."""

    component = Address(Kind.EMBED)
    token_kind = "embed"

    def __init__(self, embed: Tensor, gradient: Tensor, *, written: Tensor, read: Tensor) -> None:
        """embed, gradient: e and G(e), [T, d]; written: e before edits; read: the gradient that
        it meets on the direct path."""
        self._embed = embed
        self._gradient = gradient
        self._written = written
        self._read = read
        self.size = embed.shape[0]
        self.device = embed.device

    def column(self, column: Column) -> Tensor:
        match column:
            case Column.ACTIVATION:
                return torch.ones_like(self._embed[:, 0])
            case Column.WRITE_MAGNITUDE:
                return self._embed.square().sum(1).sqrt()
            case Column.DIRECT_EFFECT:
                return (self._written * self._read).sum(1)
            case Column.TOTAL_EFFECT:
                return (self._moved(self._embed) * self._gradient).sum(1)

    def gather(self, indices: Tensor) -> Tensor:
        return torch.stack([self.column(column)[indices] for column in COLUMNS], 1)

    def order(self, indices: Tensor) -> Tensor:
        return indices

    def address(self, index: int) -> Address:
        return self.component.at(index)

    def find(self, address: Address) -> int | None:
        position = address.position
        return position if position is not None and position < self.size else None

    def direct_total(self) -> float:
        return float(precise(self.column(Column.DIRECT_EFFECT)).sum())

    def token_effects(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {
            self.token_kind: (self.column(Column.DIRECT_EFFECT), self.column(Column.TOTAL_EFFECT))
        }


class ExpertsNodes(EmbedNodes):
    """`mlp.L~t` where the MLP is a mixture of experts: nothing finer exists there."""

    token_kind = "mlp"

    def __init__(self, layer: int, write: Tensor, gradient: Tensor, **path: Tensor) -> None:
        super().__init__(write, gradient, **path)
        self.component = Address(Kind.MLP, layer)


class HeadNodes(NodeGroup):
    """`head.L.h~q-k`: one node per head and visible pair; flat index h, q, k."""

    def __init__(
        self,
        layer_index: int,
        layer: Layer,
        probabilities: Tensor,
        gradient: Tensor,
        values: Tensor,
        scale: Tensor | None,
        path: HeadPath,
        reads: tuple[int, ...],
    ) -> None:
        """probabilities, gradient: A and G(A), [H, T, T]; values: v per query head, [H, T, dh];
        scale: of the norm behind attention, [T, 1]; reads: the tokens that J reads, where alone
        the direct effect is not zero."""
        self._layer_index = layer_index
        self._layer = layer
        self._probabilities = probabilities
        self._gradient = gradient
        self._values = values
        self._scale = scale
        self._path = path
        self._reads = list(reads)
        self._heads, self._tokens, _ = probabilities.shape
        self.device = values.device
        self._rows, self._keys = _visible_pairs(self._tokens, layer.window, self.device)
        self._pairs = self._rows.numel()
        self.size = self._heads * self._pairs

    def _value_norms(self) -> Tensor:
        """[H, T]: norm of v W_O."""
        squares = ((self._values @ self._layer.w_o_gram) * self._values).sum(-1)
        return squares.clamp_min(0).sqrt()

    @cached_property
    def _read_effects(self) -> Tensor:
        """[H, reads, T]: direct effect of the pairs whose query is a token that J reads."""
        met = self._path.z.transpose(0, 1) @ self._path.values.transpose(1, 2)
        return self._probabilities[:, self._reads] * met

    def _direct(self) -> Tensor:
        full = torch.zeros_like(self._probabilities)
        full[:, self._reads] = self._read_effects
        return full

    def _matrix(self, column: Column) -> Tensor:
        """[H, T, T]"""
        match column:
            case Column.ACTIVATION:
                return self._probabilities
            case Column.WRITE_MAGNITUDE:
                sizes = self._probabilities.abs() * self._value_norms()[:, None, :]
                return sizes if self._scale is None else sizes / self._scale
            case Column.DIRECT_EFFECT:
                return self._direct()
            case Column.TOTAL_EFFECT:
                return self._moved(self._probabilities) * self._gradient

    def column(self, column: Column) -> Tensor:
        return self._matrix(column)[:, self._rows, self._keys].flatten()

    def _locate(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pairs = indices % self._pairs
        return indices // self._pairs, self._rows[pairs], self._keys[pairs]

    def gather(self, indices: Tensor) -> Tensor:
        where = self._locate(indices)
        heads, queries, keys = where
        activation = self._probabilities[where]
        magnitude = activation.abs() * self._value_norms()[heads, keys]
        if self._scale is not None:
            magnitude = magnitude / self._scale[queries, 0]
        return torch.stack(
            [
                activation,
                magnitude,
                self._direct()[where],
                self._moved(self._probabilities)[where] * self._gradient[where],
            ],
            1,
        )

    def order(self, indices: Tensor) -> Tensor:
        return indices

    def address(self, index: int) -> Address:
        head, pair = divmod(index, self._pairs)
        query, key = int(self._rows[pair]), int(self._keys[pair])
        return Address(Kind.HEAD, self._layer_index, head, position=query, key=key)

    def find(self, address: Address) -> int | None:
        query, key, head = address.position, address.key, address.index
        if query is None or key is None or head is None or query >= self._tokens:
            return None
        window = self._layer.window or self._tokens
        first = max(0, query - window + 1)
        if not first <= key <= query:
            return None
        full = min(query, window)
        before = full * (full + 1) // 2 + (query - full) * window
        return head * self._pairs + before + key - first

    def direct_total(self) -> float:
        return float(precise(self._read_effects).sum())

    def token_effects(self) -> dict[str, tuple[Tensor, Tensor]]:
        direct = self._direct().sum(0)
        total = self._matrix(Column.TOTAL_EFFECT).sum(0)
        return {
            "attn_reading": (direct.sum(1), total.sum(1)),
            "attn_source": (direct.sum(0), total.sum(0)),
        }


def _visible_pairs(tokens: int, window: int | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Query and key of each pair that is causal and inside the window, in address order."""
    queries, keys = torch.tril_indices(tokens, tokens, device=device)
    if window is None or window >= tokens:
        return queries, keys
    visible = queries - keys < window
    return queries[visible], keys[visible]


class NeuronNodes(NodeGroup):
    """`neuron.L.n~t`: one node per neuron and token; flat index t, n."""

    def __init__(
        self,
        layer_index: int,
        layer: Layer,
        activations: Tensor,
        gradient: Tensor,
        scale: Tensor | None,
        read: Tensor,
        reads: tuple[int, ...],
    ) -> None:
        """activations, gradient: a and G(a), [T, F]; scale: of the norm behind the MLP, [T, 1];
        read: the gradient that writes before that norm meet on the direct path, [T, d], zero but
        at the tokens `reads`."""
        self._layer_index = layer_index
        self._layer = layer
        self._activations = activations
        self._gradient = gradient
        self._scale = scale
        self._read = read
        self._reads = list(reads)
        self._tokens, self._neurons = activations.shape
        self.size = activations.numel()
        self.device = activations.device

    @cached_property
    def _read_effects(self) -> Tensor:
        """[reads, F]: direct effect of the neurons at the tokens that J reads."""
        return self._activations[self._reads] * (self._read[self._reads] @ self._layer.w_out.T)

    def _direct(self) -> Tensor:
        full = torch.zeros_like(self._activations)
        full[self._reads] = self._read_effects
        return full

    def _matrix(self, column: Column) -> Tensor:
        """[T, F]"""
        match column:
            case Column.ACTIVATION:
                return self._activations
            case Column.WRITE_MAGNITUDE:
                sizes = self._activations.abs() * self._layer.w_out_norm
                return sizes if self._scale is None else sizes / self._scale
            case Column.DIRECT_EFFECT:
                return self._direct()
            case Column.TOTAL_EFFECT:
                return self._moved(self._activations) * self._gradient

    def column(self, column: Column) -> Tensor:
        return self._matrix(column).flatten()

    def gather(self, indices: Tensor) -> Tensor:
        positions, neurons = indices // self._neurons, indices % self._neurons
        activation = self._activations[positions, neurons]
        magnitude = activation.abs() * self._layer.w_out_norm[neurons]
        if self._scale is not None:
            magnitude = magnitude / self._scale[positions, 0]
        return torch.stack(
            [
                activation,
                magnitude,
                self._direct()[positions, neurons],
                self._moved(self._activations)[positions, neurons]
                * self._gradient[positions, neurons],
            ],
            1,
        )

    def order(self, indices: Tensor) -> Tensor:
        return (indices % self._neurons) * self._tokens + indices // self._neurons

    def address(self, index: int) -> Address:
        position, neuron = divmod(index, self._neurons)
        return Address(Kind.NEURON, self._layer_index, neuron, position=position)

    def find(self, address: Address) -> int | None:
        if address.position is None or address.index is None or address.position >= self._tokens:
            return None
        return address.position * self._neurons + address.index

    def direct_total(self) -> float:
        return float(precise(self._read_effects).sum())

    def token_effects(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {"mlp": (self._direct().sum(1), self._matrix(Column.TOTAL_EFFECT).sum(1))}
