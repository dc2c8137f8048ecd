"""Sublayers: all nodes of one kind in one layer, whose values are one tensor of a pass.

Where the MLP is a mixture of experts its write is that tensor, one node per token. The latents of a
dictionary are a sublayer too; their tensor is the dictionary's site, which they write to.
"""

from dataclasses import dataclass

from torch import Tensor

from services.common.addresses import Address, Kind
from services.inference.engine.captured import Pass


@dataclass(frozen=True)
class Sublayer:
    """All nodes of one kind in one layer (None for embeddings), or the latents of a dictionary."""

    kind: Kind
    layer: int | None
    dictionary: str = ""

    @classmethod
    def of(cls, node: Address) -> "Sublayer":
        return cls(node.kind, node.layer, node.dictionary)

    def values(self, current: Pass, row: int, tokens: int) -> Tensor:
        """x of its nodes in a pass, after edits, detached: [T, d], [H, T, T] or [T, F]."""
        if self.dictionary:
            return current.sites.found[self.dictionary].after[row, :tokens].detach()
        if self.layer is None:
            return current.embed[row, :tokens].detach()
        if self.kind is Kind.HEAD:
            return current.attention[self.layer].used(row)[:, :tokens, :tokens]
        if self.kind is Kind.MLP:
            return current.experts[self.layer].after[row, :tokens].detach()
        return current.neurons[self.layer][row, :tokens].detach()

    def sites(self, current: Pass) -> Tensor:
        """The same of every row of a pass, in its graph; all rows must have the same edits."""
        if self.dictionary:
            return current.sites.found[self.dictionary].after
        if self.layer is None:
            return current.embed
        if self.kind is Kind.HEAD:
            site = current.attention[self.layer]
            return site.probabilities if site.edited is None else site.edited
        if self.kind is Kind.MLP:
            return current.experts[self.layer].after
        return current.neurons[self.layer]


EMBEDDINGS = Sublayer(Kind.EMBED, None)


def sublayers(current: Pass) -> tuple[Sublayer, ...]:
    """All of a model that has no dictionaries in its table."""
    layers = len(current.neurons)
    return (
        EMBEDDINGS,
        *(Sublayer(Kind.HEAD, layer) for layer in range(layers)),
        *(
            Sublayer(Kind.MLP if layer in current.experts else Kind.NEURON, layer)
            for layer in range(layers)
        ),
    )
