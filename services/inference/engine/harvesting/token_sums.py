"""Running sums of activations at every place of some tokens."""

import torch
from torch import Tensor

from services.inference.engine.numerics import precise


class TokenSums:
    """Of N components at V tokens, [V, N] in float64."""

    def __init__(self, components: int, tokens: Tensor) -> None:
        """tokens: [V], ascending."""
        self._tokens = tokens
        self.sums = precise(torch.zeros(len(tokens), components, device=tokens.device))
        self.counts = torch.zeros(len(tokens), dtype=torch.long, device=tokens.device)

    def count(self, ids: Tensor) -> None:
        """ids: the token of every place, [B, P]."""
        places, _ = self._located(ids)
        self.counts += torch.bincount(places, minlength=len(self.counts))

    def add(self, values: Tensor, ids: Tensor, part: slice) -> None:
        """values: [B, P, n] of the components `part`; ids: the token of every place, [B, P]."""
        places, where = self._located(ids)
        if not places.numel():
            return
        # In the order of tokens: sums over neighbours come out the same each time on any device.
        order = torch.argsort(places, stable=True)
        rows, lengths = torch.unique_consecutive(places[order], return_counts=True)
        found = precise(values.flatten(0, 1)[where[order]])
        self.sums[rows, part] += torch.segment_reduce(
            found, "sum", lengths=lengths.to(found.device), axis=0
        ).to(self.sums)

    def _located(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens' rows [M], and which of the flattened places they are at [M]."""
        if not len(self._tokens):
            none = torch.zeros(0, dtype=torch.long, device=ids.device)
            return none, none
        flat = ids.flatten()
        places = torch.searchsorted(self._tokens, flat).clamp_max(len(self._tokens) - 1)
        where = (self._tokens[places] == flat).nonzero()[:, 0]
        return places[where], where
