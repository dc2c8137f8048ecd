"""Running sums of activations at every place of some tokens."""

import torch
from torch import Tensor

from services.inference.engine.numerics import precise


class Located:
    """Where in a batch these tokens are, worked out once for all that is summed there."""

    def __init__(self, tokens: Tensor, ids: Tensor) -> None:
        """tokens: [V], ascending; ids: the token of every place, [B, P]."""
        flat = ids.flatten()
        rows = torch.searchsorted(tokens, flat).clamp_max_(max(0, len(tokens) - 1))
        there = tokens[rows] == flat if len(tokens) else torch.zeros_like(flat, dtype=torch.bool)
        rows[~there] = len(tokens)
        # In the order of tokens: sums over neighbours come out the same each time on any device.
        ordered, order = rows.sort(stable=True)
        found = int(there.sum())
        self.places = order[:found]
        """Of the flattened ids, [M], those of a token side by side."""
        self.rows, self.lengths = torch.unique_consecutive(ordered[:found], return_counts=True)
        """The tokens that occur, and how often."""


class TokenSums:
    """Of N components at V tokens, [V, N] in float64."""

    def __init__(self, components: int, tokens: Tensor) -> None:
        """tokens: [V]."""
        self.sums = precise(torch.zeros(len(tokens), components, device=tokens.device))
        self.counts = torch.zeros(len(tokens), dtype=torch.long, device=tokens.device)

    def count(self, located: Located) -> None:
        self.counts[located.rows] += located.lengths

    def add(self, values: Tensor, located: Located, part: slice) -> None:
        """values: [B, P, n] of the components `part`."""
        if not len(located.places):
            return
        found = precise(values.flatten(0, 1)[located.places])
        self.sums[located.rows, part] += torch.segment_reduce(
            found, "sum", lengths=located.lengths.to(found.device), axis=0
        ).to(self.sums)
