"""How many bytes a pass needs on the device, from its request alone, before it runs.

What is counted are tensors that live at once, by what they grow with. Per row of a batch:

    tokens * layers             residual stream, q, k, v, z and neurons, which every pass keeps;
                                with gradients also all that autograd saves (each norm, each product
                                of a gated MLP, each step of a composed activation), and a gradient
                                of every neuron
    heads * tokens^2 * layers   attention probabilities, kept by every pass; with gradients also
                                theirs, and of a soft cap its output
    tokens^2 * layers           of a node table: the places of the visible pairs (two int64 each)
    heads * tokens^2            of the one layer that runs: scores, scaled, masked, softmax in
                                float32; later a column of it
    positions * vocabulary      logits and what is made of them
    tokens * latents            of the one dictionary that is read: its encoder product; of all of
                                them what is active

It is an upper bound: what is freed as the backward pass goes down is counted beside the gradients
that replace it, and every tensor of a layer counts as if all lived together. It is cheap:
arithmetic on sizes, no tensor is made. Nothing is tuned to a machine: `saved_by` counts once, on
one row, what autograd keeps of the model's own activation function, all else is read off the
architecture. Tests hold it between 1 and 2 times what the allocator really gives, over families,
lengths and batches; up to 2.5 times in half precision, where not every family lifts its softmax to
float32, and up to 3 times for dictionaries, whose active latents are not known before, and for
passes that go on from a later layer.

Allocators round and fragment, and kernels take workspaces: a budget leaves room for that
(`budget`), the estimate does not.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from services.common.addresses import Kind
from services.inference.engine.architecture import Architecture, Layer
from services.inference.engine.dictionaries.sites import Header
from services.inference.engine.interventions import Edit

_FIXED = 2**14
"""Bytes of the many small tensors: positions, rotary tables, norms per token."""
INT64 = 8
_FLOAT64 = 8
_ACTIVE_MARGIN = 4
"""How many times more latents than on its sample a dictionary may have active."""


@dataclass(frozen=True)
class Sizes:
    """What of an architecture memory depends on. Widths are numbers per token of one layer."""

    layers: int
    width: int
    heads: int
    key_value_heads: int
    head_width: int
    neurons: int
    vocabulary: int
    itemsize: int
    gated: bool
    softcapped: bool
    norms: int
    """Over the stream, in a layer."""
    normed_heads: int
    """Query and key heads that have a norm of their own."""
    saved_neurons: int
    """Tensors as wide as the neurons that autograd keeps between the MLP's projections."""
    experts: int
    """Numbers that the experts of one token make, where the MLP is a mixture of them."""

    @classmethod
    def of(cls, architecture: Architecture) -> "Sizes":
        dense = [layer for layer in architecture.layers if not layer.experts]
        layer = (dense or list(architecture.layers))[0]
        places = [place for (place, _), _ in layer.norms(0)]
        return cls(
            layers=len(architecture.layers),
            width=architecture.width,
            heads=architecture.n_heads,
            key_value_heads=architecture.n_key_value_heads,
            head_width=architecture.head_width,
            neurons=architecture.neurons,
            vocabulary=architecture.vocabulary,
            itemsize=architecture.w_u.element_size(),
            gated=layer.gated,
            softcapped=layer.attn_softcap is not None,
            norms=sum(place not in ("q", "k") for place in places),
            normed_heads=("q" in places) * architecture.n_heads
            + ("k" in places) * architecture.n_key_value_heads,
            saved_neurons=(saved_by(layer.activation) + 2 * layer.gated) if dense else 0,
            experts=max(map(_expert_numbers, architecture.layers)),
        )

    @property
    def floats(self) -> int:
        """Bytes of a number that is lifted to float32 at least, as softmax does."""
        return max(self.itemsize, 4)

    @property
    def heads_width(self) -> int:
        return self.heads * self.head_width

    @property
    def key_values_width(self) -> int:
        return self.key_value_heads * self.head_width

    def kept(self, branches: bool) -> int:
        """What every pass keeps: two points of the stream, q, k, v, z, neurons."""
        branched = (1 + self.gated) * self.neurons if branches else 0
        return (
            2 * self.width
            + 2 * self.heads_width
            + 2 * self.key_values_width
            + self.neurons
            + branched
        )

    @property
    def graph(self) -> int:
        """Bytes that a pass with gradients keeps besides a pattern: all that autograd saves or that
        is captured.

        The stream at four places, q and z as they come and as they are used, k and v besides
        repeated over the query heads, the MLP's inside, and two tensors a norm, in float32 at
        least.
        """
        numbers = (
            4 * self.width
            + 5 * self.heads_width
            + 4 * self.key_values_width
            + self.saved_neurons * self.neurons
            + self.experts
        )
        norms = 2 * self.norms * self.width + 2 * self.normed_heads * self.head_width
        return numbers * self.itemsize + norms * self.floats

    @property
    def running(self) -> int:
        """What the layer that runs needs for a while: the larger of its two halves."""
        attention = 2 * self.heads_width + 2 * self.key_values_width
        mlp = max(self.saved_neurons, 2) * self.neurons + self.experts
        return 4 * self.width + max(attention, mlp)

    @property
    def patterns(self) -> int:
        """Bytes per query, key and head of the layer that runs: scores, scaled, masked, softmax."""
        return (3 + self.softcapped) * self.floats + self.itemsize


@dataclass(frozen=True)
class Latents:
    """A dictionary in a pass."""

    count: int
    active: int
    """Per token, at most or nearly so."""
    width: int
    """Of its site."""

    @classmethod
    def of(cls, header: Header, measured_l0: float | None) -> "Latents":
        """Without a measured L0 all of its latents may be active."""
        active = header.latents
        if measured_l0 is not None:
            active = min(active, int(_ACTIVE_MARGIN * measured_l0) + 16)
        return cls(header.latents, active, max(header.d_in, header.d_out))

    def encoded(self, tokens: int, itemsize: int) -> int:
        """Bytes while it encodes one row: products, the values and what picks them."""
        return tokens * self.count * (4 * itemsize + 2)

    def listed(self, tokens: int, itemsize: int) -> int:
        """Bytes of its active nodes in a table: places, values, and two of the columns."""
        return tokens * self.active * (2 * INT64 + 4 * itemsize)


@dataclass(frozen=True)
class Batch:
    """A padded batch of rows, as its memory needs describe it."""

    rows: int
    tokens: int
    """Of each row, padding included."""
    gradients: bool = False
    logits: int = 1
    """Positions per row."""
    branches: bool = False
    """Whether pre-activations of neurons are kept."""
    dictionaries: tuple[Latents, ...] = ()
    """Those whose latents are read or edited."""
    edits: tuple[Edit, ...] = ()
    """Of all rows."""
    kept: int = 0
    """Bytes of points kept besides what every pass keeps."""


def passed(sizes: Sizes, batch: Batch) -> int:
    """Bytes of a forward pass while it runs, and with gradients of its backward pass."""
    rows, tokens, size = batch.rows, batch.tokens, sizes.itemsize
    places = rows * tokens
    pairs = rows * sizes.heads * tokens * tokens
    ends = places * sizes.width * 6 * sizes.floats + places * 4 * sizes.head_width * sizes.floats
    logits = rows * batch.logits * sizes.vocabulary * (3 * sizes.floats + 2)
    if batch.gradients:
        saved = pairs * (1 + sizes.softcapped) * sizes.floats + places * sizes.graph
        gradients = pairs * size + places * sizes.neurons * size
        layers = sizes.layers * (saved + gradients)
        ends, logits = 2 * ends, 2 * logits
    else:
        layers = sizes.layers * (pairs * size + places * sizes.kept(batch.branches) * size)
    sites = sum(places * each.width * 3 * size for each in batch.dictionaries)
    edited = edits(sizes, batch)
    kept = layers + ends + logits + sites + edited + batch.kept
    return _FIXED + kept + running(sizes, batch)


def running(sizes: Sizes, batch: Batch) -> int:
    """Bytes of the one layer that runs, of a forward pass or a backward one."""
    places = batch.rows * batch.tokens
    pairs = places * batch.tokens * sizes.heads
    mask = places * batch.tokens * (2 * sizes.itemsize + 2)
    return pairs * sizes.patterns + places * sizes.running * sizes.floats + mask


def edits(sizes: Sizes, batch: Batch) -> int:
    """Bytes that a batch's edits add.

    The pass copies each site that is edited; a pattern that is edited is kept twice, and a mask
    runs its layer's attention twice. Each edit makes a few vectors of its positions, which a graph
    keeps, and two in float64 for its receipt.
    """
    size, places = sizes.itemsize, batch.rows * batch.tokens
    pairs = batch.rows * sizes.heads * batch.tokens * batch.tokens
    copies = 1 + batch.gradients
    total, largest = 0, 0
    for kind, _ in {(each.target.kind, each.target.layer) for each in batch.edits}:
        if kind is Kind.HEAD:
            total += copies * (pairs * size + 3 * places * sizes.heads_width * size)
        else:
            total += copies * places * _site_width(sizes, kind) * size
    if any(each.masks for each in batch.edits):
        total += pairs * (sizes.patterns + size)
    latents = {each.target.dictionary for each in batch.edits} - {""}
    if latents:  # each row encodes by itself; of a graph every encoding is kept
        encodings = batch.rows * len(latents) if batch.gradients else 1
        encoded = [each.encoded(batch.tokens, size) for each in batch.dictionaries]
        total += encodings * max(encoded, default=0)
    for each in batch.edits:
        numbers = len(each.positions) * (1 if each.is_scalar else _value_width(sizes, each))
        total += 4 * numbers * size if batch.gradients else 0
        largest = max(largest, numbers * (3 * _FLOAT64 + 4 * size))
    return total + largest


def unlike(edits: Iterable[Edit]) -> list[Edit]:
    """One of each sort of edits, that with most positions: no other needs more bytes."""
    found: dict[tuple[Kind, str, bool], Edit] = {}
    for each in edits:
        sort = each.target.kind, each.target.dictionary, each.masks
        if sort not in found or len(each.positions) > len(found[sort].positions):
            found[sort] = each
    return list(found.values())


def _site_width(sizes: Sizes, kind: Kind) -> int:
    match kind:
        case Kind.NEURON:
            return sizes.neurons
        case Kind.QUERY | Kind.KEY | Kind.VALUE:
            return sizes.heads_width
        case _:
            return 2 * sizes.width


def _value_width(sizes: Sizes, edit: Edit) -> int:
    heads = (Kind.HEAD, Kind.QUERY, Kind.KEY, Kind.VALUE)
    return sizes.head_width if edit.target.kind in heads else sizes.width


def recorded(sizes: Sizes, tokens: int, dictionaries: Sequence[Latents] = ()) -> int:
    """Bytes that a recording holds while passes go on from it."""
    size = sizes.itemsize
    pattern = sizes.heads * tokens * tokens * size + tokens * tokens * size
    numbers = sizes.kept(branches=False) + 2 * sizes.width + sizes.heads_width
    sites = sum(tokens * each.width * 3 * size for each in dictionaries)
    return sizes.layers * (pattern + tokens * numbers * size) + sites


def resumed(sizes: Sizes, batch: Batch, first: int = 0) -> int:
    """Bytes of a batch that goes on from a recording, over tokens from `first` on.

    Without gradients nothing is kept but of the layer that runs. Keys and values of all tokens are
    copied for each row.
    """
    if batch.gradients:
        repeated = batch.rows * batch.tokens * sizes.layers * 2 * sizes.key_values_width
        return passed(sizes, batch) + repeated * sizes.itemsize
    rows, tokens, run = batch.rows, batch.tokens, batch.tokens - first
    size = sizes.itemsize
    pairs = rows * sizes.heads * run * tokens
    given = rows * tokens * (2 * sizes.key_values_width + 2 * sizes.heads_width) * size
    stream = rows * run * (8 * sizes.width + sizes.running + sizes.kept(False)) * sizes.floats
    logits = rows * sizes.vocabulary * (3 * sizes.floats + 2)
    edited = edits(sizes, replace(batch, tokens=tokens))
    return _FIXED + pairs * (sizes.patterns + size) + given + stream + logits + edited


def integrated(sizes: Sizes, batch: Batch, first: int = 0) -> int:
    """Bytes of a resumed batch with gradients at all nodes of a sublayer, which are added up in
    float64."""
    nodes = max(sizes.heads * batch.tokens, sizes.neurons, sizes.width) * batch.tokens
    nodes = max(nodes, *(each.width * batch.tokens for each in batch.dictionaries), 0)
    gradients = 2 * batch.rows * nodes * (sizes.itemsize + _FLOAT64)
    return resumed(sizes, replace(batch, gradients=True), first) + gradients


def summed(sizes: Sizes, tokens: int, dictionaries: Sequence[Latents]) -> int:
    """Bytes of the sums of gradients at all nodes, in float64, and of what latents move by."""
    nodes = tokens * (sizes.heads * tokens + sizes.neurons)
    sites = sum(tokens * each.width for each in dictionaries)
    moved = sum(tokens * each.count for each in dictionaries)
    gradients = sizes.layers * nodes + tokens * sizes.width + sites
    return gradients * _FLOAT64 + moved * sizes.itemsize


def cached(sizes: Sizes, tokens: int) -> int:
    """Bytes of a key/value cache; one layer of it is copied when a token is added."""
    return (sizes.layers + 1) * 2 * tokens * sizes.key_values_width * sizes.itemsize


def saved_by(activation: Callable[[Tensor], Tensor]) -> int:
    """How many tensors of its input's size live between a function's input and its output in a
    graph, both of these included."""
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor.numel()
        saved.append(tensor)  # or its place could be given to another
        return tensor

    saved: list[Tensor] = []
    probe = torch.linspace(-1, 1, 64).requires_grad_()
    with (
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
    ):
        output = activation(probe)
        note(probe.detach())
        note(output.detach())
    return sum(numel >= 64 for numel in found.values())


def _expert_numbers(layer: Layer) -> int:
    """What the experts of one token make: each its two branches, one of them activated, and their
    product."""
    if not layer.experts:
        return 0
    chosen = max(int(getattr(module, "top_k", 1)) for module in layer.mlp.modules())
    widest = max(max(each.shape[-2:]) for each in layer.mlp.parameters() if each.dim() > 1)
    return 2 * chosen * widest
