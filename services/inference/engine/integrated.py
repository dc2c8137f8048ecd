"""Integrated-gradients effects: (x - x0) . mean of G over midpoints between x0 and x (SEMANTICS 5).

Along the sublayer path all nodes of one sublayer and kind move together from x0 to x and everything
else stays live, all norms too. The rows of the sublayer then add up to J(run) - J(run with all of
them at x0), the better the more midpoints there are. Along the input path the embedding moves from
another run's, and all nodes are read off the same passes.

Passes are rows of batches that go on from a recording of the run. `begin` makes the recording;
`Integration.chunk` runs one batch, so that a caller can let others in between two of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from services.common.addresses import Address, Kind
from services.common.errors import FailedPrecondition
from services.inference.engine.attribution import ExplainedRun
from services.inference.engine.cancellation import CancelToken
from services.inference.engine.captured import Row
from services.inference.engine.forward import Hooks
from services.inference.engine.interventions import Edit
from services.inference.engine.objectives import OfLogits
from services.inference.engine.resuming import Recording, Resumed, Stage, Start
from services.inference.engine.sublayers import EMBEDDINGS, Sublayer

TOKENS_PER_CHUNK = {"cpu": 256, "cuda": 8192}
"""Rows times tokens of a batch: few enough that others do not wait long."""


def _start(sublayer: Sublayer) -> Start:
    """Where a pass goes on in which these nodes change."""
    if sublayer.layer is None:
        return Start(0, Stage.BLOCK)
    stages = {Kind.HEAD: Stage.HEADS, Kind.NEURON: Stage.NEURONS, Kind.MLP: Stage.MLP}
    return Start(sublayer.layer, stages[sublayer.kind])


class _Between(Resumed):
    """A resumed pass whose rows have the nodes of one sublayer at points between x0 and x."""

    def __init__(
        self,
        recording: Recording,
        sublayer: Sublayer,
        points: Tensor,
        edits: tuple[Edit, ...],
        cancel: CancelToken,
    ) -> None:
        """points: values of the nodes in each row, over the first tokens of the run."""
        tokens = points.shape[2 if sublayer.kind is Kind.HEAD else 1]
        rows = [edits] * len(points)
        super().__init__(
            recording,
            _start(sublayer),
            (0, tokens - 1),
            rows,
            cancel,
            gradients=True,
            keeps_layers=sublayer == EMBEDDINGS,
        )
        self._sublayer = sublayer
        self.points = points.requires_grad_()

    def _is(self, kind: Kind, layer: int | None) -> bool:
        return self._sublayer == Sublayer(kind, layer)

    def edit_residual(self, kind: Kind, layer: int | None, values: Tensor) -> Tensor:
        values = super().edit_residual(kind, layer, values)
        return self.points if self._is(kind, layer) else values

    def edit_neurons(self, layer: int, activations: Tensor) -> Tensor:
        activations = super().edit_neurons(layer, activations)
        return self.points if self._is(Kind.NEURON, layer) else activations

    def edit_attention_outputs(
        self,
        layer: int,
        values: Tensor,
        output: Tensor,
        probabilities: Tensor,
        unmasked: Tensor | None = None,
    ) -> Tensor:
        if self._is(Kind.HEAD, layer):
            probabilities = self.points
            groups = probabilities.shape[1] // values.shape[1]
            output = (probabilities @ values.repeat_interleave(groups, dim=1)).transpose(1, 2)
        return super().edit_attention_outputs(layer, values, output, probabilities, unmasked)


@dataclass
class Integration:
    """Integrated effects of some sublayers of one run, in the making."""

    chunks: tuple[tuple[Sublayer, tuple[float, ...]], ...]
    """What moves, and at which shares of the way from x0 to x."""
    _hooks: Hooks
    _run: ExplainedRun
    _objective: OfLogits
    _recording: Recording
    _wanted: tuple[Sublayer, ...]
    _starts: Mapping[Sublayer, Tensor]
    """x0 of each sublayer; 0 where there is none."""
    _steps: int
    _along_input: bool
    _sums: dict[Sublayer, Tensor] = field(default_factory=dict)
    """Of G over the points done so far, shaped like x over the tokens up to J's."""

    def chunk(self, number: int, cancel: CancelToken) -> None:
        """Runs one batch.

        Raises FailedPrecondition (NON_FINITE), Cancelled, DeadlineExceeded.
        """
        moving, shares = self.chunks[number]
        end = self._cut(moving, self._values(moving))
        start = self._cut(moving, self._start(moving))
        weights = torch.tensor(shares, dtype=end.dtype, device=end.device)
        points = start + weights.view(-1, *[1] * end.dim()) * (end - start)
        edits = tuple(edit for edit in self._run.edits if not _belongs(edit, moving))
        current = _Between(self._recording, moving, points, edits, cancel)
        logits = self._hooks.resume(current)
        objective = torch.stack([self._objective.of_logits(row) for row in logits]).sum()
        read = self._wanted if self._along_input else (moving,)
        sites = [
            current.points if sublayer == moving else sublayer.sites(current) for sublayer in read
        ]
        gradients = torch.autograd.grad(objective, sites, materialize_grads=True)
        for sublayer, gradient in zip(read, gradients, strict=True):
            if not torch.isfinite(gradient).all():
                raise FailedPrecondition(
                    f"a gradient on the path of {moving.kind.value} is not finite",
                    reason="NON_FINITE",
                )
            total = gradient.double().sum(0)
            done = self._sums.get(sublayer)
            self._sums[sublayer] = total if done is None else done + total

    def effects(self, nodes: Sequence[Address]) -> list[float]:
        """The effect of each node, once all chunks have run."""
        found: dict[Sublayer, Tensor] = {}
        for sublayer in self._wanted:
            end, start = self._values(sublayer), self._start(sublayer)
            moved = self._cut(sublayer, end - start).double()
            effects = moved * self._sums[sublayer] / self._steps
            vectors = sublayer.kind in (Kind.EMBED, Kind.MLP)
            found[sublayer] = effects.sum(-1) if vectors else effects
        last = self._objective.position
        return [
            0.0 if (node.position or 0) > last else float(found[Sublayer.of(node)][_index(node)])
            for node in nodes
        ]

    def _values(self, sublayer: Sublayer) -> Tensor:
        return sublayer.values(self._recording, 0, len(self._run.token_ids))

    def _start(self, sublayer: Sublayer) -> Tensor:
        if sublayer in self._starts:
            return self._starts[sublayer]
        return torch.zeros_like(self._values(sublayer))

    def _cut(self, sublayer: Sublayer, values: Tensor) -> Tensor:
        """Values over the tokens up to J's."""
        tokens = self._objective.position + 1
        if sublayer.kind is Kind.HEAD:
            return values[:, :tokens, :tokens]
        return values[:tokens]


def begin(
    hooks: Hooks,
    run: ExplainedRun,
    nodes: Sequence[Address],
    steps: int,
    cancel: CancelToken,
    starts: Mapping[Sublayer, Tensor] | None = None,
    along_input: bool = False,
) -> Integration:
    """Runs the model as it is, and plans the batches for the sublayers that `nodes` belong to.

    `starts` has x0, shaped like x, of the sublayers where it is not 0; `along_input` says that only
    the embedding moves.
    Raises FailedPrecondition (NON_FINITE), Cancelled, DeadlineExceeded.
    """
    run = replace(run, edits=hooks.fill(run.edits, cancel))
    objective = run.objective
    assert isinstance(objective, OfLogits)
    position = objective.position
    recording = hooks.record(Row(run.token_ids, run.edits), [position], cancel=cancel)
    budget = TOKENS_PER_CHUNK.get(recording.logits.device.type, 256)
    size = max(1, budget // (position + 1))
    shares = [(step - 0.5) / steps for step in range(1, steps + 1)]
    batches = [tuple(shares[first : first + size]) for first in range(0, steps, size)]
    wanted = tuple(dict.fromkeys(map(Sublayer.of, nodes)))
    moving = (EMBEDDINGS,) if along_input else wanted
    chunks = tuple((sublayer, batch) for sublayer in moving for batch in batches)
    return Integration(
        chunks, hooks, run, objective, recording, wanted, starts or {}, steps, along_input
    )


def _belongs(edit: Edit, sublayer: Sublayer) -> bool:
    """Whether the edit makes values of these nodes what they are: it is part of x."""
    target = edit.target
    if Sublayer.of(target) != sublayer:
        return False
    return sublayer.kind is not Kind.HEAD or target.key is not None


def _index(node: Address) -> tuple[int, ...]:
    places = {
        Kind.EMBED: (node.position,),
        Kind.HEAD: (node.index, node.position, node.key),
        Kind.NEURON: (node.position, node.index),
        Kind.MLP: (node.position,),
    }
    return tuple(each for each in places[node.kind] if each is not None)
