"""Token read-outs: what a node's write promotes, and what moves the node (SEMANTICS section 8).

All listed nodes of a run are read out in a few matrix products with the unembedding and the
embedding; only the tokens of largest absolute score leave the device.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from services.common.addresses import Address, Kind
from services.inference.engine.architecture import Architecture
from services.inference.engine.attribution import Explanation

Scores = tuple[tuple[int, float], ...]
"""(token id, score), largest absolute score first."""

_CHUNK = 128
"""Nodes per matrix product: [128, V] of scores at a time."""


@dataclass(frozen=True)
class ReadOut:
    """Tokens of one node. `key_input` is of head pairs only; embeddings and MLPs have no inputs."""

    output: Scores
    input: Scores
    key_input: Scores


def read_out(
    architecture: Architecture,
    explanation: Explanation,
    nodes: Sequence[Address],
    tokens: int,
    vocabulary: int,
) -> dict[Address, ReadOut]:
    """Reads out nodes of a run; ids from `vocabulary` on are never listed."""
    reader = _Reader(architecture, explanation)
    w_u, w_e = architecture.w_u[:vocabulary], architecture.w_e[:vocabulary]
    embed_scale = architecture.embed_scale
    outputs = scored(reader.output_directions(nodes), w_u, tokens, architecture.w_u_mean)
    with_inputs = [node for node in nodes if node.kind in (Kind.HEAD, Kind.NEURON)]
    heads = [node for node in nodes if node.kind is Kind.HEAD]
    directions = [
        reader.directions(with_inputs, through_key=False),
        reader.directions(heads, through_key=True),
    ]
    inputs = scored(torch.cat(directions) * embed_scale, w_e, tokens)
    of_input = dict(zip(with_inputs, inputs[: len(with_inputs)], strict=True))
    of_key = dict(zip(heads, inputs[len(with_inputs) :], strict=True))
    return {
        node: ReadOut(output, of_input.get(node, ()), of_key.get(node, ()))
        for node, output in zip(nodes, outputs, strict=True)
    }


def scored(
    directions: Tensor, weights: Tensor, tokens: int, mean: Tensor | None = None
) -> list[Scores]:
    """Directions [n, d] against weights [V, d], less the score of `mean` [d]: top of each."""
    found: list[Scores] = []
    for chunk in torch.split(directions.to(weights.dtype), _CHUNK):
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

    def output_directions(self, nodes: Sequence[Address]) -> Tensor:
        """[n, d]: writes through the final norm, with its scale at the token written to."""
        writes = torch.stack([self._write(node) for node in nodes])
        norm = self._architecture.final_norm
        positions = [node.position for node in nodes]
        scale = norm.scale(self._captured.final_input[self._row, positions].detach())
        if norm.centres:
            writes = writes - writes.mean(-1, keepdim=True)
        return writes * norm.gain / scale

    def _write(self, node: Address) -> Tensor:
        """[d]: what the node adds to the residual stream."""
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
        by_site: dict[tuple[Kind, int], list[int]] = {}
        for place, node in enumerate(nodes):
            assert node.layer is not None
            by_site.setdefault((node.kind, node.layer), []).append(place)
        for (kind, layer), places in by_site.items():
            here = [nodes[place] for place in places]
            if kind is Kind.NEURON:
                found[places] = self._of_neurons(layer, here)
            else:
                found[places] = self._of_pairs(layer, here, through_key=through_key)
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
        unrotated = self._unrotated(index, other, positions) * layer.scaling
        if qk_norm is not None:
            attn_in = self._captured.attn_in[index][self._row, positions].detach()
            projected = torch.einsum("ned,nd->ne", weights, attn_in)
            if bias is not None:
                projected = projected + bias[read]
            unrotated = qk_norm.frozen_gradient(unrotated, qk_norm.scale(projected))
        gradient = torch.einsum("ne,ned->nd", unrotated, weights)
        scale = norm.scale(self._captured.block_inputs[index][self._row, positions].detach())
        return norm.frozen_gradient(gradient, scale)

    def _unrotated(self, index: int, vectors: Tensor, positions: Sequence[int]) -> Tensor:
        """[n, dh] -> [n, dh]: the transpose of the model's own rotation at each position."""
        rotation = self._captured.rotations[index]
        if rotation is None:
            return vectors
        cosine, sine = (part[0, list(positions), None].detach() for part in rotation)
        attention = self._architecture.layers[index].attention
        rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
        with torch.enable_grad():
            start = torch.zeros_like(vectors)[:, None, None].requires_grad_()
            rotated, _ = rotate(start, start.detach(), cosine, sine)
            (found,) = torch.autograd.grad(rotated, start, vectors[:, None, None])
        unrotated: Tensor = found[:, 0, 0]
        return unrotated
