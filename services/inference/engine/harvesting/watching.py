"""A forward pass that hands over what it computes and keeps none of it."""

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from services.common.addresses import Kind
from services.inference.engine.architecture import Architecture
from services.inference.engine.bound import BoundDictionary
from services.inference.engine.cancellation import CancelToken
from services.inference.engine.captured import Pass, Row
from services.inference.engine.dictionaries.sites import Point, Site
from services.inference.engine.harvesting.groups import Group
from services.inference.engine.splice import Apply, EditsOf, Probe

Take = Callable[[Group, Tensor], None]
"""Gets a group's activations [B, P, N]; they may be gone once it returns."""


class Enough(Exception):
    """All groups were taken: what lies behind them need not run."""


class Watched(Pass):
    """Rows of equal length whose activations of some groups go to `take`, layer by layer.

    Raises Enough behind the last one.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        cancel: CancelToken,
        architecture: Architecture,
        groups: Collection[Group],
        dictionaries: Sequence[BoundDictionary],
        take: Take,
    ) -> None:
        super().__init__(rows, (), False, cancel)
        self.keep_running_layer_only(0)
        self._architecture = architecture
        self._groups = {(each.kind, each.layer): each for each in groups if not each.dictionary}
        self._take_one = take
        self._left = set(groups)
        self._pattern: tuple[Tensor, Tensor] | None = None
        latents = {each.dictionary: each for each in groups if each.dictionary}
        self.sites = _Encoding(dictionaries, latents, self._take)

    def _take(self, group: Group, values: Tensor) -> None:
        self._take_one(group, values)
        self._left.remove(group)
        if not self._left:
            raise Enough

    def edit_attention_inputs(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return query, key, value

    def edit_neurons(self, layer: int, activations: Tensor) -> Tensor:
        group = self._groups.get((Kind.NEURON, layer))
        if group:
            self._take(group, activations)
        return activations

    def edit_attention_outputs(
        self,
        layer: int,
        values: Tensor,
        output: Tensor,
        probabilities: Tensor,
        unmasked: Tensor | None = None,
    ) -> Tensor:
        if (Kind.HEAD, layer) in self._groups:
            self._pattern = probabilities, values
        self.at_site(Point.Z, layer, output.flatten(2))
        return output

    def edit_residual(self, kind: Kind, layer: int | None, values: Tensor) -> Tensor:
        if kind is Kind.ATTN and self._pattern is not None:
            # Only here the scale of a norm behind attention is known.
            assert layer is not None
            self._take(self._groups[Kind.HEAD, layer], self._magnitudes(layer, *self._pattern))
            self._pattern = None
        return values

    def _magnitudes(self, layer: int, probabilities: Tensor, values: Tensor) -> Tensor:
        """[B, P, H]: write magnitudes of the visible pairs, row by row."""
        weights, scale = self._architecture.layers[layer], self.attn_scale[layer]
        values = values.repeat_interleave(probabilities.shape[1] // values.shape[1], dim=1)
        norms = ((values @ weights.w_o_gram) * values).sum(-1).clamp_min(0).sqrt()
        magnitudes = probabilities.abs() * norms[:, :, None]
        if scale is not None:
            magnitudes = magnitudes / scale[:, None]
        tokens = probabilities.shape[-1]
        queries, keys = pairs(tokens, weights.window, probabilities.device)
        return magnitudes[:, :, queries, keys].transpose(1, 2)


class _Encoding(Probe):
    """Hands over the latents of dictionaries where these read."""

    def __init__(
        self, dictionaries: Sequence[BoundDictionary], groups: dict[str, Group], take: Take
    ) -> None:
        self._read: dict[Site, list[BoundDictionary]] = {}
        for bound in dictionaries:
            self._read.setdefault(bound.site_in, []).append(bound)
        super().__init__(self._read)
        self._groups = groups
        self._take = take

    def visit(self, site: Site, x: Tensor, edits_of: EditsOf, apply: Apply) -> Tensor:
        for bound in self._read[site]:
            self._take(self._groups[bound.id], bound.dictionary.encode(x))
        return x


def pairs(tokens: int, window: int | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Query and key of each visible pair, row by row."""
    queries, keys = torch.tril_indices(tokens, tokens, device=device)
    if window is None or window >= tokens:
        return queries, keys
    visible = queries - keys < window
    return queries[visible], keys[visible]
