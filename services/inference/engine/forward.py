"""The forward pass: rows of a right-padded batch, each with its own edits, captured at every site.

A pass holds what the hooks of `taps` captured, as tensors of one autograd graph whose only leaf is
the embedding output: parameters never require gradients. Right padding needs no mask: causality
keeps pads out of every real token.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from services.common.errors import FailedPrecondition
from services.inference.engine import references
from services.inference.engine.architecture import Architecture
from services.inference.engine.cancellation import CancelToken
from services.inference.engine.captured import Pass, Row
from services.inference.engine.harvesting.groups import Group
from services.inference.engine.harvesting.watching import Enough, Take, Watched
from services.inference.engine.interventions import Edit, SourceRun
from services.inference.engine.memory import Batch, Sizes, passed, recorded
from services.inference.engine.points import Point
from services.inference.engine.resuming import Recording, Resumed
from services.inference.engine.room import Room
from services.inference.engine.shelf import Shelf
from services.inference.engine.splice import Probe, Sites
from services.inference.engine.taps import Taps

_ALWAYS = (
    "block_inputs",
    "rotations",
    "attention",
    "attn_scale",
    "middles",
    "neurons",
    "mlp_scale",
)
_WITH_GRADIENTS = ("attn_in", "attn_write", "mlp_in", "mlp_write")
"""What a pass must hold once per layer."""


class Hooks:
    """A model that runs passes. Used by one thread; `current` is the pass that runs now."""

    def __init__(self, model: PreTrainedModel, architecture: Architecture) -> None:
        self._model = model
        self.architecture = architecture
        self._taps = Taps(architecture)
        self.shelf = Shelf(of=architecture)
        """The dictionaries that passes may read and edit."""
        self.room = Room(Sizes.of(architecture))
        """What passes may use of the device's memory."""

    @property
    def current(self) -> Pass | None:
        return self._taps.current

    def run(
        self,
        rows: Sequence[Row],
        positions: Sequence[int],
        *,
        gradients: bool,
        branches: bool = False,
        cancel: CancelToken | None = None,
        keep: frozenset[Point] = frozenset(),
        dictionaries: Sequence[str] = (),
        cache: DynamicCache | None = None,
    ) -> Pass:
        """Runs the model over the rows; logits at `positions` of every row, and at its own.

        `branches` keeps pre-activations of neurons without gradients too, `keep` names points to
        keep beyond what every pass captures, `dictionaries` the ids of those to be read; the ones
        that edits name are read besides. With a `cache` the rows go on from the tokens in it, which
        it then holds too; positions count from the rows' first.

        Raises FailedPrecondition (reason NON_FINITE) where a value is not finite, Cancelled and
        DeadlineExceeded from the token.
        """
        cancel = cancel or CancelToken()
        filled = self._fill([row.edits for row in rows], cancel)
        current = Pass(
            [replace(row, edits=edits) for row, edits in zip(rows, filled, strict=True)],
            tuple(positions),
            gradients,
            cancel,
            wanted=keep,
            branches=branches or gradients,
        )
        self._run(current, dictionaries, cache)
        return current

    def look(self, rows: Sequence[Row], probe: Probe, cancel: CancelToken) -> None:
        """Runs the model over rows without edits, showing `probe` the sites it wants."""
        self._run(Pass(rows, (0,), False, cancel, sites=probe))

    def watch(self, ids: Tensor, groups: Sequence[Group], take: Take, cancel: CancelToken) -> None:
        """Runs the model over ids [B, T] up to the last of the groups; `take` gets the activations
        of each while they are there.

        Raises Cancelled and DeadlineExceeded from the token, and what `take` raises.
        """
        rows = [Row(tuple(row)) for row in ids.tolist()]
        dictionaries = self.shelf.bind([each.dictionary for each in groups if each.dictionary])
        current = Watched(rows, cancel, self.architecture, groups, dictionaries, take)
        with self._running(current), torch.no_grad(), suppress(Enough):
            self._model.base_model(input_ids=ids, use_cache=False)
            raise RuntimeError("a pass ended before all groups were seen: a hook was bypassed")

    def record(
        self,
        row: Row,
        positions: Sequence[int],
        *,
        cancel: CancelToken,
        gradients: bool = False,
        dictionaries: Sequence[str] = (),
    ) -> Recording:
        """Like `run` of one row, remembering what `resume` starts from: held while it lives.

        Raises ResourceExhausted besides, where others hold too much.
        """
        latents = self.shelf.latents(dictionaries)
        held = recorded(self.room.sizes, len(row.token_ids), latents)
        self.room.check_holder(held)
        row = replace(row, edits=self.fill(row.edits, cancel))
        current = Recording([row], tuple(positions), gradients, cancel)
        self._run(current, dictionaries)
        self.room.hold(current, held)
        return current

    def batch(
        self, rows: int, tokens: int, edits: Sequence[Edit] = (), dictionaries: Sequence[str] = ()
    ) -> Batch:
        """A batch as its memory needs describe it; `edits` are those of all its rows."""
        edited = (each.target.dictionary for each in edits if each.target.dictionary)
        latents = self.shelf.latents((*dictionaries, *edited))
        return Batch(rows, tokens, dictionaries=latents, edits=tuple(edits))

    def fill(self, edits: Sequence[Edit], cancel: CancelToken) -> tuple[Edit, ...]:
        """The edits with what MEAN and PATCH take from other runs, which are run here.

        `run` and `record` do so by themselves; done beforehand, several passes share it.
        """
        return self._fill([edits], cancel)[0]

    def _fill(self, edits: Sequence[Sequence[Edit]], cancel: CancelToken) -> list[tuple[Edit, ...]]:
        """The same of several rows, whose sources share passes."""
        return references.fill(
            edits, lambda rows: self.run(rows, [0], gradients=False, cancel=cancel), self._fit
        )

    def _fit(self, sources: Sequence[SourceRun]) -> bool:
        """Whether a pass of these runs fits into memory."""
        longest = max(len(source.token_ids) for source in sources)
        edits = [edit for source in sources for edit in source.edits]
        batch = self.batch(len(sources), longest, edits)
        return passed(self.room.sizes, batch) <= self.room.of_chunk

    def resume(self, current: Resumed, dictionaries: Sequence[str] = ()) -> Tensor:
        """Runs what is left of a resumed pass; its logits [B, V] at its last token.

        `dictionaries` are read besides those that edits name.

        Raises Cancelled and DeadlineExceeded from its token.
        """
        self._attach(current, dictionaries)
        device = self.architecture.final_norm.gain.device
        ids = torch.tensor(current.token_ids, device=device).expand(len(current.rows), -1)
        last = torch.tensor([len(current.token_ids) - 1], device=device)
        with self._running(current), torch.set_grad_enabled(current.gradients):
            output = self._model(input_ids=ids, logits_to_keep=last, use_cache=False)
        current.logits = output.logits
        return current.logits[:, 0]

    def _attach(self, current: Pass, dictionaries: Sequence[str] = ()) -> None:
        """Puts the dictionaries named, and those that edits name, in a pass."""
        if isinstance(current.sites, Probe):
            return
        edited = [edit.target.dictionary for row in current.rows for edit in row.edits]
        named = dict.fromkeys(name for name in (*dictionaries, *edited) if name)
        current.sites = Sites(self.shelf.bind(list(named)))

    def _run(
        self,
        current: Pass,
        dictionaries: Sequence[str] = (),
        cache: DynamicCache | None = None,
    ) -> None:
        started = time.perf_counter()
        rows, gradients = current.rows, current.gradients
        self._attach(current, dictionaries)
        device = self.architecture.final_norm.gain.device
        longest = max(len(row.token_ids) for row in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        for index, row in enumerate(rows):
            ids[index, : len(row.token_ids)] = torch.tensor(row.token_ids)
        with self._running(current), torch.set_grad_enabled(gradients):
            output = self._model(
                input_ids=ids.to(device),
                logits_to_keep=torch.tensor(_logit_positions(current), device=device),
                use_cache=cache is not None,
                cache=cache,
            )
        current.logits = output.logits
        if current.logits.dim() != 3:
            raise FailedPrecondition(
                "this model cannot give logits at positions that differ between rows of a batch"
            )
        self._check_captured(current)
        current.forward_ms = (time.perf_counter() - started) * 1e3

    @contextmanager
    def _running(self, current: Pass) -> Iterator[None]:
        self._taps.current = current
        try:
            yield
        finally:
            self._taps.current = None

    def _check_captured(self, current: Pass) -> None:
        layers = len(self.architecture.layers)
        names = (*_ALWAYS, *_WITH_GRADIENTS) if current.gradients else _ALWAYS
        counts = {name: len(getattr(current, name)) for name in names}
        if any(count != layers for count in counts.values()):
            raise RuntimeError(f"captured {counts} sites of {layers} layers: a hook was bypassed")
        for index, row in enumerate(current.rows):
            current.receipts(index)
            length = len(row.token_ids)
            if torch.isfinite(current.final_input[index, :length]).all():
                continue
            where = self._first_non_finite(current, index, length)
            raise FailedPrecondition(
                f"the model's numbers overflow: {where} is not finite; look for an intervention "
                "that sets a very large value",
                reason="NON_FINITE",
            )
        if not torch.isfinite(current.logits).all():
            raise FailedPrecondition(
                "the model's numbers overflow: the logits are not finite", reason="NON_FINITE"
            )

    @staticmethod
    def _first_non_finite(current: Pass, row: int, length: int) -> str:
        for layer, (site, neurons) in enumerate(
            zip(current.attention, current.neurons, strict=True)
        ):
            if not torch.isfinite(site.used(row)[:, :length, :length]).all():
                return f"attn.{layer}"
            if not torch.isfinite(neurons[row, :length]).all():
                return f"mlp.{layer}"
        return f"resid_post.{len(current.neurons) - 1}"


def _logit_positions(current: Pass) -> list[int] | list[list[int]]:
    """Where logits are: [P] where it is the same in every row, else [B, P]."""
    wanted = [list(current.logits_at(row)) for row in range(len(current.rows))]
    if all(each == wanted[0] for each in wanted):
        return wanted[0]
    most = max(map(len, wanted))
    return [each + each[-1:] * (most - len(each)) for each in wanted]
