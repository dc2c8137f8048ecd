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
from services.inference.engine import memory
from services.inference.engine.attribution import ExplainedRun, NormMode, held
from services.inference.engine.cancellation import CancelToken
from services.inference.engine.captured import Pass, Row
from services.inference.engine.dictionaries.sites import Point, Site
from services.inference.engine.forward import Hooks
from services.inference.engine.interventions import Edit
from services.inference.engine.numerics import precise
from services.inference.engine.objectives import Objective, OfLogits
from services.inference.engine.out_of_memory import in_halves
from services.inference.engine.resuming import Recording, Resumed, Stage, Start, start_of
from services.inference.engine.run_view import RunView, is_upstream
from services.inference.engine.sublayers import EMBEDDINGS, Sublayer

TOKENS_PER_CHUNK = {"cpu": 256, "cuda": 8192}
"""Rows times tokens of a batch: few enough that others do not wait long."""


class _Between(Resumed):
    """A resumed pass whose rows have the nodes of one sublayer at points between x0 and x."""

    def __init__(
        self,
        recording: Recording,
        sublayer: Sublayer,
        points: Tensor,
        edits: tuple[Edit, ...],
        cancel: CancelToken,
        start: Start,
        site: Site | None,
        keeps_layers: bool,
    ) -> None:
        """points: values of the nodes in each row, over the first tokens of the run; site: where
        latents write."""
        tokens = points.shape[2 if sublayer.kind is Kind.HEAD else 1]
        rows = [edits] * len(points)
        super().__init__(
            recording,
            start,
            (0, tokens - 1),
            rows,
            cancel,
            gradients=True,
            keeps_layers=keeps_layers,
        )
        self._sublayer = sublayer
        self._site = site
        self.points = points.requires_grad_()

    def _is(self, kind: Kind, layer: int | None) -> bool:
        return self._sublayer == Sublayer(kind, layer)

    def at_site(
        self, point: Point, layer: int, values: Tensor, *, before_post_norm: bool = False
    ) -> Tensor:
        values = super().at_site(point, layer, values, before_post_norm=before_post_norm)
        return self.points if self._site == Site(point, layer, before_post_norm) else values

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
    _objective: Objective
    """With what it holds constant taken from the run as it is."""
    _recording: Recording
    _wanted: tuple[Sublayer, ...]
    _starts: Mapping[Sublayer, Tensor]
    """x0 of each sublayer; 0 where there is none."""
    _steps: int
    _along_input: bool
    _sums: dict[Sublayer, Tensor] = field(default_factory=dict)
    """Of G over the points done so far, shaped like x over the tokens that J depends on."""
    _encoded: dict[str, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    def rows(self, number: int) -> int:
        """Rows of a chunk's batch."""
        return len(self.chunks[number][1])

    def chunk(self, number: int, cancel: CancelToken) -> None:
        """Runs one batch; in halves where it runs out of memory.

        Raises FailedPrecondition (NON_FINITE), Cancelled, DeadlineExceeded, ResourceExhausted.
        """
        moving, shares = self.chunks[number]
        totals = in_halves(lambda some: [self._gradients(moving, some, cancel)], shares)
        for each in totals:
            for sublayer, total in each.items():
                done = self._sums.get(sublayer)
                self._sums[sublayer] = total if done is None else done + total

    def _read(self, moving: Sublayer) -> tuple[Sublayer, ...]:
        """The sublayers whose gradients are read while one moves."""
        return self._wanted if self._along_input else (moving,)

    def _gradients(
        self, moving: Sublayer, shares: Sequence[float], cancel: CancelToken
    ) -> dict[Sublayer, Tensor]:
        """G summed over some points of the way, at the nodes of each sublayer that is read."""
        end = self._cut(moving, self._values(moving))
        start = self._cut(moving, self._start(moving))
        weights = torch.tensor(shares, dtype=end.dtype, device=end.device)
        points = start + weights.view(-1, *[1] * end.dim()) * (end - start)
        whole = self._along_input or not isinstance(self._objective, OfLogits)
        current = _Between(
            self._recording,
            moving,
            points,
            tuple(edit for edit in self._run.edits if not self._belongs(edit, moving)),
            cancel,
            Start(0, Stage.BLOCK) if whole else self._first_changed(moving),
            self._site(moving),
            whole,
        )
        read = self._read(moving)
        logits = self._hooks.resume(
            current, [*(each.dictionary for each in read), *self._objective.dictionaries]
        )
        values = (self._value(current, row, logits[row]) for row in range(len(points)))
        objective = torch.stack(list(values)).sum()
        sites = [
            current.points if sublayer == moving else sublayer.sites(current) for sublayer in read
        ]
        if objective.requires_grad:
            gradients = torch.autograd.grad(objective, sites, materialize_grads=True)
        else:  # where edits cut every path
            gradients = tuple(map(torch.zeros_like, sites))
        totals = {}
        for sublayer, gradient in zip(read, gradients, strict=True):
            if not torch.isfinite(gradient).all():
                raise FailedPrecondition(
                    f"a gradient on the path of {moving.kind.value} is not finite",
                    reason="NON_FINITE",
                )
            totals[sublayer] = precise(gradient).sum(0)
        return totals

    def _value(self, current: Pass, row: int, logits: Tensor) -> Tensor:
        if isinstance(self._objective, OfLogits):
            return self._objective.of_logits(logits)
        return self._objective.value(RunView(self._hooks.architecture, current, row))

    def effects(self, nodes: Sequence[Address]) -> list[float]:
        """The effect of each node, once all chunks have run; 0 of what is not upstream of J."""
        found: dict[Sublayer, Tensor] = {}
        for sublayer in self._wanted:
            if sublayer.dictionary:
                continue
            end, start = self._values(sublayer), self._start(sublayer)
            moved = precise(self._cut(sublayer, end - start))
            effects = moved * self._sums[sublayer] / self._steps
            vectors = sublayer.kind in (Kind.EMBED, Kind.MLP)
            found[sublayer] = effects.sum(-1) if vectors else effects

        def effect(node: Address) -> float:
            sublayer = Sublayer.of(node)
            if sublayer not in self._wanted or (node.position or 0) >= self.tokens:
                return 0.0
            if sublayer.dictionary:
                return self._of_latent(node)
            return float(found[sublayer][_index(node)])

        return [effect(node) for node in nodes]

    def _of_latent(self, node: Address) -> float:
        """f - f0 times the effective decoder, met by the mean gradient at the site."""
        assert node.position is not None
        assert node.index is not None
        moved, scale, decoder = self._latents(node.dictionary)
        unit = precise(decoder[node.index]) * precise(scale[node.position])
        met = unit @ self._sums[Sublayer.of(node)][node.position] / self._steps
        if self._objective.itself == node:
            met = met + 1  # besides what it writes, it is J itself
        return float(moved[node.position, node.index] * met)

    def _latents(self, dictionary: str) -> tuple[Tensor, Tensor, Tensor]:
        """f - f0 [T, N], the scale of norm_in [T, 1] and the decoder of a dictionary in the run."""
        if dictionary not in self._encoded:
            site, tokens = self._recording.sites.found[dictionary], len(self._run.token_ids)
            moved = site.values(0, site.clean(0, tokens))
            start = self._starts.get(Sublayer(Kind.LATENT, None, dictionary))
            self._encoded[dictionary] = (
                moved if start is None else moved - start,
                site.normalised(0, tokens).scale,
                site.bound.dictionary.w_dec,
            )
        return self._encoded[dictionary]

    def _site(self, sublayer: Sublayer) -> Site | None:
        return self._hooks.shelf.site_of(sublayer.dictionary) if sublayer.dictionary else None

    def _first_changed(self, sublayer: Sublayer) -> Start:
        """Where a pass goes on in which these nodes change."""
        return start_of(
            Address(sublayer.kind, sublayer.layer, dictionary=sublayer.dictionary),
            self._hooks.shelf.site_of,
        )

    def _belongs(self, edit: Edit, sublayer: Sublayer) -> bool:
        """Whether the edit makes values of these nodes what they are: it is part of x."""
        target = edit.target
        if sublayer.dictionary:
            edited = target.dictionary
            return bool(edited) and self._hooks.shelf.site_of(edited) == self._site(sublayer)
        if Sublayer.of(target) != sublayer:
            return False
        return sublayer.kind is not Kind.HEAD or target.key is not None

    @property
    def tokens(self) -> int:
        """How many tokens J depends on at most."""
        if isinstance(self._objective, OfLogits):
            return self._objective.position + 1
        return len(self._run.token_ids)

    def _values(self, sublayer: Sublayer) -> Tensor:
        return sublayer.values(self._recording, 0, len(self._run.token_ids))

    def _start(self, sublayer: Sublayer) -> Tensor:
        if sublayer.dictionary:
            moved, scale, decoder = self._latents(sublayer.dictionary)
            return self._values(sublayer) - moved @ decoder * scale
        if sublayer in self._starts:
            return self._starts[sublayer]
        return torch.zeros_like(self._values(sublayer))

    def _cut(self, sublayer: Sublayer, values: Tensor) -> Tensor:
        """Values over the tokens that J depends on."""
        tokens = self.tokens
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
    norm_mode: NormMode = NormMode.LIVE,
) -> Integration:
    """Runs the model as it is, and plans the batches for the sublayers that `nodes` belong to.

    `starts` has x0, shaped like x, of the sublayers where it is not 0; `along_input` says that only
    the embedding moves. All norms are live in the passes; `norm_mode` says how a gradient that J
    holds constant is made.
    Raises FailedPrecondition (NON_FINITE), Cancelled, DeadlineExceeded.
    """
    run = replace(run, edits=hooks.fill(run.edits, cancel))
    objective = held(hooks, run, norm_mode, cancel)
    recording = hooks.record(
        Row(run.token_ids, run.edits),
        [objective.position],
        cancel=cancel,
        dictionaries=list(dict.fromkeys(node.dictionary for node in nodes if node.dictionary)),
    )
    point = objective.point(hooks.architecture)
    reaching = [each for each in map(Sublayer.of, nodes) if _is_upstream(each, point)]
    wanted = tuple(dict.fromkeys(reaching))
    moving = (EMBEDDINGS,) if along_input else wanted
    integration = Integration(
        (), hooks, run, objective, recording, wanted, starts or {}, steps, along_input
    )
    budget = TOKENS_PER_CHUNK.get(recording.logits.device.type, 256)
    size = _rows_at_once(integration, hooks, run, max(1, budget // integration.tokens))
    shares = [(step - 0.5) / steps for step in range(1, steps + 1)]
    batches = [tuple(shares[first : first + size]) for first in range(0, steps, size)]
    chunks = tuple((sublayer, batch) for sublayer in moving for batch in batches)
    integration = replace(integration, chunks=chunks)
    latents = hooks.shelf.latents(each.dictionary for each in wanted if each.dictionary)
    summed = memory.summed(hooks.room.sizes, len(run.token_ids), latents)
    hooks.room.hold(integration, summed)
    return integration


def _rows_at_once(integration: Integration, hooks: Hooks, run: ExplainedRun, most: int) -> int:
    """How many rows fit into memory."""
    sizes, tokens = hooks.room.sizes, len(run.token_ids)
    names = [each.dictionary for each in integration._wanted if each.dictionary]
    batch = hooks.batch(1, integration.tokens, run.edits, (*names, *run.objective.dictionaries))
    held = memory.recorded(sizes, tokens) + memory.summed(sizes, tokens, batch.dictionaries)
    return hooks.room.rows(most, memory.integrated(sizes, batch), held)


def _is_upstream(sublayer: Sublayer, point: Address) -> bool:
    """Whether these nodes' writes are part of the residual that J reads."""
    if sublayer.layer is None:  # latents have no gradient where they are not
        return True
    written = Kind.ATTN if sublayer.kind is Kind.HEAD else Kind.MLP
    return is_upstream(written, sublayer.layer, point)


def _index(node: Address) -> tuple[int, ...]:
    places = {
        Kind.EMBED: (node.position,),
        Kind.HEAD: (node.index, node.position, node.key),
        Kind.NEURON: (node.position, node.index),
        Kind.MLP: (node.position,),
    }
    return tuple(each for each in places[node.kind] if each is not None)
