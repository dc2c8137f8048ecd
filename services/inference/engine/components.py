"""Components without a prompt: what the weights say that a neuron or head writes and reads.

No prompt, so no scales: what a component writes goes through the linear part of the norms on its
way (a post-norm's is in the write weights, the final norm's is applied for tokens), what it reads
through that of the norm before it. Biases are constants and left out.

    neuron   writes w_out[n]; its pre-activation reads w_in[n] (gated: gate and up)
    latent   writes its decoder row; its encoder reads the stream or what the MLP reads, or,
             behind a sublayer, no direction of the stream
    head     output-value circuit  x -> x A^T B        A: value rows [dh, d], B: output rows [dh, d]
             query-key circuit     score = (x_q Q^T) . (x_k K^T) * scaling, rotation left out,
             which is the score of two tokens at the same position

A head's circuits are [d, d] of rank dh. Their singular directions come from QR of the two thin
factors and an SVD [dh, dh]; the cosine of two heads' output-value maps from two products [dh, dh]:
<A1^T B1, A2^T B2> = sum of (A1 A2^T) * (B1 B2^T).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from services.common.addresses import Address, Kind
from services.common.errors import FailedPrecondition
from services.inference.engine.architecture import Architecture, Layer
from services.inference.engine.bound import BoundDictionary
from services.inference.engine.cancellation import CancelToken
from services.inference.engine.norms import Norm
from services.inference.engine.readouts import Scores, scored

_LATENTS = 8192
"""Latents compared at a time."""


@dataclass(frozen=True)
class ComponentDirection:
    """One direction that a component writes or reads, or a pair of a head's circuit.

    `norm` is its length, or the singular value. Token lists are empty for the side it lacks.
    """

    name: str
    norm: float
    output: Scores = ()
    input: Scores = ()
    key_input: Scores = ()


@dataclass(frozen=True)
class Description:
    """`similar` has components of the same kind and their cosines, most similar first."""

    directions: tuple[ComponentDirection, ...]
    similar: tuple[tuple[Address, float], ...]


class Singular(NamedTuple):
    """Singular directions of left^T right, strongest first."""

    values: Tensor
    """[r]"""
    left: Tensor
    """[r, d], of length 1."""
    right: Tensor
    """[r, d], of length 1."""


class Extremes(NamedTuple):
    """The tokens of the k largest and the k smallest scores of n writes, equal scores by id: ids
    int32 [n, k], scores float32 [n, k], on the CPU."""

    largest: Tensor
    largest_scores: Tensor
    smallest: Tensor
    smallest_scores: Tensor


class Describer:
    """Describes neurons, heads and latents of one model. Runs on the torch thread."""

    def __init__(self, architecture: Architecture, vocabulary: int) -> None:
        """Ids from `vocabulary` on are never listed."""
        self._architecture = architecture
        self._vocabulary = vocabulary

    def describe(
        self, component: Address, tokens: int, circuits: int, similar: int, cancel: CancelToken
    ) -> Description:
        """`tokens` per list, `circuits` singular directions of each circuit of a head, and
        `similar` components. Raises Cancelled and DeadlineExceeded."""
        if component.kind is Kind.NEURON:
            directions = self._neuron(component, tokens)
            found = self._similar(component, similar, self._neuron_cosines(component, cancel))
        else:
            directions = self._head(component, tokens, circuits)
            found = self._similar(component, similar, self._head_cosines(component, cancel))
        return Description(directions, found)

    def describe_latent(
        self, bound: BoundDictionary, latent: int, tokens: int
    ) -> tuple[ComponentDirection, ...]:
        """What a latent writes and, where that is a direction of the stream, reads."""
        which = torch.tensor([latent], device=bound.dictionary.w_dec.device)
        write = bound.constant_scale * bound.unit_writes(which)
        (output,) = self.output_tokens(write, tokens)
        found = [ComponentDirection("write", _length(write), output=output)]
        read = bound.unit_reads(which)
        if read is not None:
            (scores,) = self.input_tokens(read, tokens)
            found.append(ComponentDirection("read", _length(read), input=scores))
        return tuple(found)

    def similar_latents(
        self,
        bound: BoundDictionary,
        write: Tensor,
        count: int,
        own: int | None,
        cancel: CancelToken,
    ) -> tuple[tuple[Address, float], ...]:
        """The `count` latents of a dictionary whose writes have the largest cosines with `write`
        [d]; `own` is left out. Raises Cancelled and DeadlineExceeded."""
        rows = []
        for latents in torch.split(torch.arange(bound.dictionary.latents), _LATENTS):
            cancel.check()
            writes = bound.unit_writes(latents.to(write.device)).float()
            rows.append(torch.cosine_similarity(writes, write[None].float(), eps=0.0))

        def address(index: int) -> Address:
            return Address(Kind.LATENT, index=index, dictionary=bound.id)

        return _largest(torch.cat(rows), count, own, address)

    def _neuron(self, neuron: Address, tokens: int) -> tuple[ComponentDirection, ...]:
        layer, index = self._layer(neuron), neuron.index
        write = layer.w_out[index]
        names = {"gate": layer.w_in, "up": layer.w_up} if layer.gated else {"read": layer.w_in}
        reads = {
            name: _read_through(layer.mlp_norm, weights[index])
            for name, weights in names.items()
            if weights is not None
        }
        (output,) = self.output_tokens(write[None], tokens)
        inputs = self.input_tokens(torch.stack(list(reads.values())), tokens)
        return (
            ComponentDirection("write", _length(write), output=output),
            *(
                ComponentDirection(name, _length(read), input=scores)
                for (name, read), scores in zip(reads.items(), inputs, strict=True)
            ),
        )

    def _head(self, head: Address, tokens: int, circuits: int) -> tuple[ComponentDirection, ...]:
        layer, index = self._layer(head), head.index
        assert index is not None
        values, outputs = _value_rows(layer)[index], layer.w_o[index]
        ov = _singular(values, outputs, circuits)
        qk = _singular(*_query_key_rows(layer, index), circuits)
        # Of each read direction of length 1, what comes out of the circuit.
        written = self.output_tokens(ov.right * ov.values[:, None], tokens)
        read = self.input_tokens(torch.cat([ov.left, qk.left, qk.right]), tokens)
        count = len(ov.values)
        of_values, of_queries, of_keys = read[:count], read[count : 2 * count], read[2 * count :]
        return (
            *(
                ComponentDirection(f"ov.{number}", float(value), output=output, input=scores)
                for number, (value, output, scores) in enumerate(
                    zip(ov.values, written, of_values, strict=True)
                )
            ),
            *(
                ComponentDirection(f"qk.{number}", float(value), input=scores, key_input=keys)
                for number, (value, scores, keys) in enumerate(
                    zip(qk.values, of_queries, of_keys, strict=True)
                )
            ),
        )

    def output_tokens(self, writes: Tensor, tokens: int) -> list[Scores]:
        """Of writes [n, d]: logits they move, above the mean over the vocabulary."""
        architecture = self._architecture
        writes = architecture.final_norm.linear(writes.to(architecture.w_u))
        w_u = architecture.w_u[: self._vocabulary]
        return scored(writes, w_u, tokens, architecture.w_u_mean)

    def extreme_tokens(self, writes: Tensor, tokens: int) -> Extremes:
        """Of writes [n, d], by the scores of `output_tokens`.

        Raises FailedPrecondition (NON_FINITE)."""
        architecture = self._architecture
        w_u = architecture.w_u[: self._vocabulary]
        writes = architecture.final_norm.linear(writes.to(w_u))
        scores = (w_u @ writes.T).T.float().contiguous()
        scores -= (writes @ architecture.w_u_mean)[:, None]
        largest, largest_scores = _extreme(scores, tokens, largest=True)
        smallest, smallest_scores = _extreme(scores, tokens, largest=False)
        # A sum is finite where all are; what is not a number counts as large.
        if not bool(torch.isfinite(largest_scores.sum() + smallest_scores.sum())):
            raise FailedPrecondition(
                "the model's numbers overflow: scores of tokens are not finite", reason="NON_FINITE"
            )
        return Extremes(largest, largest_scores, smallest, smallest_scores)

    def input_tokens(self, reads: Tensor, tokens: int) -> list[Scores]:
        """Of read directions [n, d]: how far each token's embedding lies along them."""
        w_e = self._architecture.w_e
        return scored(
            reads.to(w_e) * self._architecture.embed_scale, w_e[: self._vocabulary], tokens
        )

    def _neuron_cosines(self, neuron: Address, cancel: CancelToken) -> Tensor:
        """[layers, F]: of the writes of all neurons; not numbers where a layer has fewer."""
        write = self._layer(neuron).w_out[neuron.index].float()
        layers = self._architecture.layers
        found = write.new_full((len(layers), self._architecture.neurons), torch.nan)
        for row, layer in zip(found, layers, strict=True):
            cancel.check()
            lengths = layer.w_out_norm.float() * torch.linalg.vector_norm(write)
            row[: len(lengths)] = (layer.w_out.float() @ write) / lengths
        return found

    def _head_cosines(self, head: Address, cancel: CancelToken) -> Tensor:
        """[layers, H]: of the output-value maps of all heads."""
        mine = self._layer(head)
        values = _value_rows(mine)[head.index].float()
        outputs = mine.w_o[head.index].float()
        own = ((values @ values.T) * (outputs @ outputs.T)).sum().sqrt()
        rows = []
        for layer in self._architecture.layers:
            cancel.check()
            theirs, w_o = _value_rows(layer).float(), layer.w_o.float()
            products = ((theirs @ values.T) * (w_o @ outputs.T)).sum((1, 2))
            grams = (theirs @ theirs.transpose(1, 2)) * (w_o @ w_o.transpose(1, 2))
            rows.append(products / (grams.sum((1, 2)).sqrt() * own))
        return torch.stack(rows)

    def _similar(
        self, component: Address, count: int, cosines: Tensor
    ) -> tuple[tuple[Address, float], ...]:
        """The largest of cosines [layers, n], without the component's own; ties by address."""
        width = cosines.shape[1]
        assert component.layer is not None
        assert component.index is not None
        return _largest(
            cosines.flatten(),
            count,
            component.layer * width + component.index,
            lambda place: Address(component.kind, place // width, place % width),
        )

    def _layer(self, component: Address) -> Layer:
        assert component.layer is not None
        return self._architecture.layers[component.layer]


def _largest(
    cosines: Tensor, count: int, own: int | None, address: Callable[[int], Address]
) -> tuple[tuple[Address, float], ...]:
    """Addresses of the largest cosines [n], but for `own`; ties by place.

    What writes nothing has no direction: its cosines are not numbers, and it is never listed.
    """
    cosines = cosines.clamp(-1, 1)
    if own is not None:
        cosines[own] = torch.nan
    ordered, places = torch.sort(cosines.nan_to_num(nan=-2.0).cpu(), descending=True, stable=True)
    return tuple(
        (address(place), cosine)
        for place, cosine in zip(places[:count].tolist(), ordered[:count].tolist(), strict=True)
        if cosine >= -1.0
    )


def _extreme(scores: Tensor, count: int, *, largest: bool) -> tuple[Tensor, Tensor]:
    """Ids and values of the extreme scores [n, V] of each row, on the CPU."""
    values, ids = torch.topk(scores, min(count, scores.shape[1]), largest=largest)
    ids, order = torch.sort(ids.cpu())
    values, by_value = torch.sort(values.cpu().gather(1, order), descending=largest, stable=True)
    return ids.gather(1, by_value).int(), values


def _read_through(norm: Norm, rows: Tensor) -> Tensor:
    """Rows [..., d] that read a norm's output, as rows that read its input; scale left out."""
    return norm.frozen_gradient(rows, torch.ones_like(rows[..., :1]))


def _value_rows(layer: Layer) -> Tensor:
    """[H, dh, d]: what each query head's values read in the residual stream."""
    rows = _read_through(layer.attn_norm, layer.w_v)
    return rows.repeat_interleave(len(layer.w_o) // len(rows), dim=0)


def _query_key_rows(layer: Layer, head: int) -> tuple[Tensor, Tensor]:
    """[dh, d] each: what a head's scaled queries and its keys read in the residual stream."""
    query, key = layer.w_q[head], layer.w_k[head // (len(layer.w_q) // len(layer.w_k))]
    if layer.q_norm is not None:
        query = layer.q_norm.linear(query.T).T
    if layer.k_norm is not None:
        key = layer.k_norm.linear(key.T).T
    query = query * layer.scaling
    return _read_through(layer.attn_norm, query), _read_through(layer.attn_norm, key)


def _singular(left: Tensor, right: Tensor, count: int) -> Singular:
    """Of left^T right, both [r, d]: the `count` strongest singular directions.

    Of the two signs a pair can have, it gets the one that makes the largest entry of `right`
    positive.
    """
    # In float64 on the CPU: small, and not every device has both.
    left_basis, left_factor = torch.linalg.qr(left.cpu().double().T)
    right_basis, right_factor = torch.linalg.qr(right.cpu().double().T)
    u, values, v = torch.linalg.svd(left_factor @ right_factor.T)
    lefts, rights = (left_basis @ u).T[:count], (right_basis @ v.T).T[:count]
    largest = rights.gather(1, rights.abs().argmax(1, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0)
    device = left.device
    return Singular(
        values[:count].float().to(device),
        (lefts * signs).float().to(device),
        (rights * signs).float().to(device),
    )


def _length(vector: Tensor) -> float:
    return float(torch.linalg.vector_norm(vector.float()))
