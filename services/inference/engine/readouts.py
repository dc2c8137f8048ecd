"""Token read-outs: what a node's write promotes, and what moves the node (SEMANTICS section 8).

All listed nodes of a run are read out in a few matrix products with the unembedding and the
embedding; only the tokens of largest absolute score leave the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from services.common.addresses import Address, Kind
from services.inference.engine.architecture import Architecture
from services.inference.engine.attribution import Explanation
from services.inference.engine.latents import LatentNodes
from services.inference.engine.own_token import input_gradients, source_scores
from services.inference.engine.rotation import unrotated
from services.inference.engine.run_view import RunView
from services.inference.engine.splice import LatentSite

Scores = tuple[tuple[int, float], ...]
"""(token id, score), largest absolute score first."""

_READING = (Kind.HEAD, Kind.NEURON, Kind.LATENT)
"""Kinds of nodes that have inputs."""

SCORED_AT_ONCE = 128
"""Nodes per matrix product: [128, V] of scores at a time."""
READ_AT_ONCE = 64
"""Head pairs whose weights [64, dh, d] are gathered at a time."""


@dataclass(frozen=True)
class ReadOut:
    """Tokens of one node. `key_input` is of head pairs only; embeddings and MLPs have no inputs."""

    output: Scores
    input: Scores
    key_input: Scores
    sources: tuple[tuple[int, float], ...] = ()
    """(position, score) of an active latent of an attention dictionary: what its value comes from,
    largest absolute score first."""


def read_out(
    architecture: Architecture,
    explanation: Explanation,
    nodes: Sequence[Address],
    tokens: int,
    vocabulary: int,
    sources: int = 0,
) -> dict[Address, ReadOut]:
    """Reads out nodes of a run; ids from `vocabulary` on are never listed.

    `sources`: positions listed per latent of an attention dictionary.
    """
    directions = directions_of(architecture, explanation, nodes, sources)
    (found,) = read_outs(architecture, [(directions, tokens)], vocabulary)
    return found


@dataclass(frozen=True)
class Directions:
    """What read-outs of nodes of a run are scored by."""

    nodes: tuple[Address, ...]
    outputs: Tensor
    """[nodes, d]"""
    inputs: Tensor
    """[those with inputs and then pairs through their keys, d]"""
    sources: dict[Address, tuple[tuple[int, float], ...]]

    @property
    def reading(self) -> list[Address]:
        return [node for node in self.nodes if node.kind in _READING]

    @property
    def pairs(self) -> list[Address]:
        return [node for node in self.nodes if node.kind is Kind.HEAD]


def directions_of(
    architecture: Architecture, explanation: Explanation, nodes: Sequence[Address], sources: int = 0
) -> Directions:
    """Of nodes that exist in the run."""
    reader = _Reader(architecture, explanation)
    found = Directions(
        tuple(nodes),
        reader.output_directions(nodes),
        torch.empty(0),
        reader.sources(nodes, sources) if sources else {},
    )
    inputs = [
        reader.directions(found.reading, through_key=False),
        reader.directions(found.pairs, through_key=True),
    ]
    return replace(found, inputs=torch.cat(inputs) * architecture.embed_scale)


def read_outs(
    architecture: Architecture, wanted: Sequence[tuple[Directions, int]], vocabulary: int
) -> list[dict[Address, ReadOut]]:
    """Reads out nodes of several runs, as many tokens of each as it says, in the same products."""
    if not wanted:
        return []
    w_u, w_e = architecture.w_u[:vocabulary], architecture.w_e[:vocabulary]
    most = max(tokens for _, tokens in wanted)
    outputs = iter(
        scored(torch.cat([each.outputs for each, _ in wanted]), w_u, most, architecture.w_u_mean)
    )
    inputs = iter(scored(torch.cat([each.inputs for each, _ in wanted]), w_e, most))
    found = []
    for each, tokens in wanted:
        of_output, of_input, of_key = (
            {node: next(scores)[:tokens] for node in nodes}
            for nodes, scores in (
                (each.nodes, outputs),
                (each.reading, inputs),
                (each.pairs, inputs),
            )
        )
        found.append(
            {
                node: ReadOut(
                    of_output[node],
                    of_input.get(node, ()),
                    of_key.get(node, ()),
                    each.sources.get(node, ()),
                )
                for node in each.nodes
            }
        )
    return found


def scored(
    directions: Tensor, weights: Tensor, tokens: int, mean: Tensor | None = None
) -> list[Scores]:
    """Directions [n, d] against weights [V, d], less the score of `mean` [d]: top of each."""
    found: list[Scores] = []
    for chunk in torch.split(directions.to(weights.dtype), SCORED_AT_ONCE):
        # In this order the product is a quarter faster on a CPU than its transpose.
        scores = (weights @ chunk.T).T.contiguous()
        if mean is not None:
            scores -= (chunk @ mean)[:, None]
        ids = torch.topk(scores.abs(), min(tokens, len(weights))).indices
        best = scores.gather(1, ids)
        for row_ids, row_scores in zip(ids.tolist(), best.tolist(), strict=True):
            found.append(tuple(zip(row_ids, row_scores, strict=True)))
    return found


class _Reader:
    """Directions of nodes in the residual stream, for one run."""

    def __init__(self, architecture: Architecture, explanation: Explanation) -> None:
        self._architecture = architecture
        self._captured = explanation.captured
        self._row = explanation.row
        self._run = RunView(architecture, explanation.captured, explanation.row)
        self._latents = {
            group.dictionary: group
            for group in explanation.groups
            if isinstance(group, LatentNodes)
        }

    def output_directions(self, nodes: Sequence[Address]) -> Tensor:
        """[n, d]: writes through the final norm, with its scale at the token written to."""
        writes = torch.empty(len(nodes), self._architecture.width).to(self._architecture.w_u)
        for name, places in _by_dictionary(nodes).items():
            writes[places] = self._latents[name].writes([nodes[place] for place in places])
        for place, node in enumerate(nodes):
            if node.kind is not Kind.LATENT:
                writes[place] = self._write(node)
        norm = self._architecture.final_norm
        positions = [node.position for node in nodes]
        scale = norm.scale(self._captured.final_input[self._row, positions].detach())
        if norm.centres:
            writes = writes - writes.mean(-1, keepdim=True)
        return writes * norm.gain / scale

    def _write(self, node: Address) -> Tensor:
        """[d]: what a node of the model adds to the residual stream."""
        position = node.position
        if node.layer is None:
            return self._captured.embed[self._row, position].detach()
        layer = self._architecture.layers[node.layer]
        if node.kind is Kind.MLP:
            return self._captured.experts[node.layer].after[self._row, position].detach()
        if node.kind is Kind.NEURON:
            activations = self._captured.neurons[node.layer].detach()
            write = activations[self._row, position, node.index] * layer.w_out[node.index]
            return self._through(self._captured.mlp_scale[node.layer], position, write)
        site = self._captured.attention[node.layer]
        probability = site.used(self._row)[node.index, position, node.key]
        value = site.values_per_head(self._row)[node.index, node.key]
        write = probability * (value @ layer.w_o[node.index])
        return self._through(self._captured.attn_scale[node.layer], position, write)

    def _through(self, scales: Tensor | None, position: int | None, write: Tensor) -> Tensor:
        """[d]: a write after the post-norm, if there is one."""
        return write if scales is None else write / scales[self._row, position]

    def directions(self, nodes: Sequence[Address], *, through_key: bool) -> Tensor:
        """[n, d]: gradient of each node's value before its non-linearity, at the residual stream
        that it reads, with the norm's scale constant."""
        found = torch.empty(len(nodes), self._architecture.width).to(self._architecture.w_e)
        for name, places in _by_dictionary(nodes).items():
            here = [nodes[place] for place in places]
            read = input_gradients(self._run, self._site(name), *_parts(here))
            found[places] = read.to(found)
        by_site: dict[tuple[Kind, int], list[int]] = {}
        for place, node in enumerate(nodes):
            if node.layer is not None:
                by_site.setdefault((node.kind, node.layer), []).append(place)
        for (kind, layer), at_site in by_site.items():
            for first in range(0, len(at_site), READ_AT_ONCE):
                places = at_site[first : first + READ_AT_ONCE]
                here = [nodes[place] for place in places]
                found[places] = (
                    self._of_neurons(layer, here)
                    if kind is Kind.NEURON
                    else self._of_pairs(layer, here, through_key=through_key)
                )
        return found

    def _of_neurons(self, index: int, nodes: Sequence[Address]) -> Tensor:
        layer = self._architecture.layers[index]
        norm = layer.mlp_norm
        positions = [node.position for node in nodes]
        scale = norm.scale(self._captured.middles[index][self._row, positions].detach())
        return norm.frozen_gradient(layer.w_in[[node.index for node in nodes]], scale)

    def _of_pairs(self, index: int, nodes: Sequence[Address], *, through_key: bool) -> Tensor:
        layer = self._architecture.layers[index]
        norm = layer.attn_norm
        site = self._captured.attention[index]
        heads, queries, keys = (
            [getattr(node, part) for node in nodes] for part in ("index", "position", "key")
        )
        if through_key:
            other = site.query[self._row].detach()[heads, queries]
            groups = len(layer.w_q) // len(layer.w_k)
            read = [head // groups for head in heads]
            weights, bias, positions, qk_norm = layer.w_k, layer.b_k, keys, layer.k_norm
        else:
            other = site.keys_per_head(self._row)[heads, keys]
            read = heads
            weights, bias, positions, qk_norm = layer.w_q, layer.b_q, queries, layer.q_norm
        weights = weights[read]
        rotation = self._captured.rotations[index]
        back = unrotated(layer.attention, rotation, positions, other) * layer.scaling
        if qk_norm is not None:
            attn_in = self._captured.attn_in[index][self._row, positions].detach()
            projected = torch.einsum("ned,nd->ne", weights, attn_in)
            if bias is not None:
                projected = projected + bias[read]
            back = qk_norm.frozen_gradient(back, qk_norm.scale(projected))
        gradient = torch.einsum("ne,ned->nd", back, weights)
        scale = norm.scale(self._captured.block_inputs[index][self._row, positions].detach())
        return norm.frozen_gradient(gradient, scale)

    def sources(
        self, nodes: Sequence[Address], count: int
    ) -> dict[Address, tuple[tuple[int, float], ...]]:
        """Of each active latent of an attention dictionary: `count` (position, score), largest
        absolute score first, ties by position."""
        found: dict[Address, tuple[tuple[int, float], ...]] = {}
        for name, places in _by_dictionary(nodes).items():
            site = self._site(name)
            if site.bound.reading is not Kind.ATTN:
                continue
            here = [nodes[place] for place in places]
            values = self._latents[name].activations(here).tolist()
            here = [node for node, value in zip(here, values, strict=True) if value > 0]
            for first in range(0, len(here), SCORED_AT_ONCE):
                some = here[first : first + SCORED_AT_ONCE]
                scores = source_scores(self._run, site, *_parts(some)).cpu()
                for node, row in zip(some, scores, strict=True):
                    found[node] = self._largest(row, site.bound.layer, node, count)
        return found

    def _largest(
        self, scores: Tensor, layer: int, node: Address, count: int
    ) -> tuple[tuple[int, float], ...]:
        """Of scores [T] those of tokens that the node's own can see."""
        assert node.position is not None
        first = self._architecture.shape.first_visible(layer, node.position)
        visible = scores[first : node.position + 1]
        best = torch.sort(visible.abs(), descending=True, stable=True).indices[:count]
        return tuple((first + place, float(visible[place])) for place in best.tolist())

    def _site(self, dictionary: str) -> LatentSite:
        return self._captured.sites.found[dictionary]


def _by_dictionary(nodes: Sequence[Address]) -> dict[str, list[int]]:
    """Places of the latents among nodes, by dictionary."""
    found: dict[str, list[int]] = {}
    for place, node in enumerate(nodes):
        if node.kind is Kind.LATENT:
            found.setdefault(node.dictionary, []).append(place)
    return found


def _parts(latents: Sequence[Address]) -> tuple[list[int], list[int]]:
    """Tokens and indices of latents at tokens."""
    tokens = [node.position for node in latents if node.position is not None]
    return tokens, [node.index for node in latents if node.index is not None]
