"""Latents as rows of the node table: the columns of one dictionary in one run.

Nearly all latents are 0 at nearly all tokens, and a node whose value is 0 has 0 in every column. So
only active latents are computed with; the others exist, can be looked up, and fill a table that
asks for more rows than there are active nodes.
"""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from services.common.addresses import Address, Kind
from services.inference.engine.bound import BoundDictionary
from services.inference.engine.columns import COLUMNS, Column, NodeGroup
from services.inference.engine.numerics import precise
from services.inference.engine.sublayers import Sublayer

_DENSE = 1 / 16
"""Above this share of active latents one dense product beats gathering decoder rows."""
_GATHERED = 8192
"""Decoder rows gathered at a time."""


class LatentNodes(NodeGroup):
    """`latent.D.i~t`: one node per latent and token.

    Flat indices count the active nodes in any order, then those that `prepare` adds. Any other
    node has the index -1 - (i T + t).
    """

    def __init__(
        self,
        bound: BoundDictionary,
        values: Tensor,
        scale: Tensor,
        post_scale: Tensor | None,
        gradient: Tensor,
        met: Tensor,
        reads: tuple[int, ...],
    ) -> None:
        """values: f after edits, [T, N]; scale: norm_in's where recon undoes it, [T, 1];
        post_scale: that of the post-norm on the way to the stream, [T, 1]; gradient: G at the
        dictionary's output site, [T, d_out]; met: the gradient that writes at the site meet on the
        direct path, [T, d_out], zero but at the tokens `reads`."""
        self.bound = bound
        self._tokens, self._latents = values.shape
        self.nodes = values.numel()
        self.device = values.device
        self._where = _active(values)
        self._values = values[self._where]
        self._changes = self._values
        self._scale = scale
        self._post_scale = post_scale
        self._gradient = gradient
        self._met = met
        self._reads = reads
        self._itself: Address | None = None
        self._padding = torch.empty(0, dtype=torch.long, device=values.device)

    @property
    def dictionary(self) -> str:
        return self.bound.id

    def activations(self, nodes: Sequence[Address]) -> Tensor:
        """[n]: f of some nodes, after edits."""
        found = [self.find(node) for node in nodes]
        active = [
            index if index is not None and 0 <= index < self.active else -1 for index in found
        ]
        values = torch.cat([self._values, self._values.new_zeros(1)])
        return values[active]

    def writes(self, nodes: Sequence[Address]) -> Tensor:
        """[n, d]: what some nodes add to the residual stream."""
        tokens = [node.position for node in nodes]
        decoder = self.bound.dictionary.w_dec[[node.index for node in nodes]]
        written = self.activations(nodes)[:, None] * decoder * self._scale[tokens]
        writes = self.bound.to_residual(written)
        return writes if self._post_scale is None else writes / self._post_scale[tokens]

    @property
    def active(self) -> int:
        return self._values.numel()

    @property
    def size(self) -> int:  # type: ignore[override]
        return self.active + self._padding.numel()

    @property
    def sublayer(self) -> Sublayer:
        return Sublayer(Kind.LATENT, None, self.bound.id)

    def measure_from(self, start: Tensor) -> None:
        """Sets x0, [T, N]; nodes that are not 0 there are active too."""
        values = torch.zeros_like(start)
        values[self._where] = self._values.to(start)
        self._where = _active((values != 0) | (start != 0))
        self._values = values[self._where]
        self._changes = (values - start)[self._where]
        for computed in ("_direct", "_total"):
            self.__dict__.pop(computed, None)

    def is_itself_the_objective(self, node: Address) -> None:
        """J is the value of this node as it stands, so that G(f) is 1 besides what it writes."""
        self._itself = node
        self.__dict__.pop("_total", None)

    @property
    def is_view(self) -> bool:
        return self.bound.is_view

    def prepare(self, k: int) -> None:
        """Where fewer than k nodes are active, the first inactive ones by address stand in."""
        missing = min(k, self.nodes) - self.active
        if missing <= self._padding.numel():
            return
        tokens, latents = self._where
        inactive = torch.ones(self.nodes, dtype=torch.bool, device=self.device)
        inactive[latents * self._tokens + tokens] = False
        self._padding = inactive.nonzero()[:missing, 0]

    def column(self, column: Column) -> Tensor:
        values = self._column(column)
        return torch.cat([values, values.new_zeros(self._padding.numel())])

    def _column(self, column: Column) -> Tensor:
        match column:
            case Column.ACTIVATION:
                return self._values
            case Column.WRITE_MAGNITUDE:
                tokens, latents = self._where
                scale = self._scale[tokens, 0].abs()
                if self._post_scale is not None:
                    scale = scale / self._post_scale[tokens, 0]
                return self._values.abs() * self.bound.write_norms[latents] * scale
            case Column.DIRECT_EFFECT:
                return self._direct
            case Column.TOTAL_EFFECT:
                return self._total

    @cached_property
    def _direct(self) -> Tensor:
        """[active]"""
        tokens, latents = self._where
        found = torch.zeros_like(self._values)
        for position in self._reads:
            here = (tokens == position).nonzero()[:, 0]
            met = self._met[position] * self._scale[position]
            rows = self.bound.dictionary.w_dec[latents[here]]
            found[here] = self._values[here] * (rows @ met)
        return found

    @cached_property
    def _total(self) -> Tensor:
        """[active]: (f - f0) G(f), with G(f) = dec . G at the site."""
        tokens, latents = self._where
        decoder = self.bound.dictionary.w_dec
        gradient = self._gradient * self._scale
        if self.active > _DENSE * self.nodes:
            met = (gradient @ decoder.T)[self._where]
        else:
            parts = zip(
                torch.split(tokens, _GATHERED), torch.split(latents, _GATHERED), strict=True
            )
            met = torch.cat(
                [torch.einsum("nd,nd->n", decoder[those], gradient[here]) for here, those in parts]
                or [self._values]
            )
        if self._itself is not None:
            itself = torch.tensor([self._itself.position, self._itself.index], device=self.device)
            met = met + (torch.stack(self._where, 1) == itself).all(1).to(met)
        return self._changes * met

    def gather(self, indices: Tensor) -> Tensor:
        active = (indices >= 0) & (indices < self.active)
        columns = torch.stack([self._column(column) for column in COLUMNS], 1)
        found = columns.new_zeros(indices.numel(), len(COLUMNS))
        found[active] = columns[indices[active]]
        return found

    def _node(self, index: int) -> tuple[int, int]:
        """(token, latent)"""
        if 0 <= index < self.active:
            return int(self._where[0][index]), int(self._where[1][index])
        by_address = int(self._padding[index - self.active]) if index >= 0 else -1 - index
        latent, token = divmod(by_address, self._tokens)
        return token, latent

    def order(self, indices: Tensor) -> Tensor:
        tokens, latents = self._where
        by_address = torch.cat([latents * self._tokens + tokens, self._padding])
        return by_address[indices]

    def address(self, index: int) -> Address:
        token, latent = self._node(index)
        return Address(Kind.LATENT, index=latent, dictionary=self.bound.id, position=token)

    def find(self, address: Address) -> int | None:
        token, latent = address.position, address.index
        if token is None or latent is None or token >= self._tokens:
            return None
        here = ((self._where[0] == token) & (self._where[1] == latent)).nonzero()
        if here.numel():
            return int(here[0, 0])
        return -1 - (latent * self._tokens + token)

    def direct_total(self) -> float:
        return 0.0 if self.is_view else float(precise(self._direct).sum())

    def total_total(self) -> float:
        """Sum of (f - f0) G(f) over all latents."""
        return float(precise(self._total).sum())

    def token_effects(self) -> dict[str, tuple[Tensor, Tensor]]:
        if self.is_view:
            return {}
        kind = "attn_reading" if self.bound.sublayer is Kind.ATTN else "mlp"
        sums = []
        for column in (self._direct, self._total):
            sums.append(column.new_zeros(self._tokens).index_add(0, self._where[0], column))
        return {kind: (sums[0], sums[1])}


def _active(values: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and latents of what is not 0 in [T, N], in the order of memory."""
    if values.stride(0) != 1:
        tokens, latents = values.nonzero(as_tuple=True)
    else:
        latents, tokens = values.T.nonzero(as_tuple=True)
    return tokens, latents
