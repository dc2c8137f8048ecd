"""A served model: what a request can ask of it, as plain Python in and out.

Everything here runs on the one torch thread (`services.inference.scheduler`), except the vocabulary
and the facts, which touch no device.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from services.common.addresses import Address, Kind, Shape
from services.common.errors import FailedPrecondition, TdbError
from services.common.settings import DictionarySource
from services.inference.engine import (
    activations,
    batch_budget,
    budget,
    estimates,
    integrated,
    loading,
    needs,
    tables,
    verification,
    whole_verification,
)
from services.inference.engine.architecture import Architecture, resolve
from services.inference.engine.asked import (
    AskedAttribution,
    AskedRun,
    AttributeResult,
    ReadPoints,
    RunResult,
)
from services.inference.engine.attribution import ExplainedRun, NormMode
from services.inference.engine.batches import Answer, Batches
from services.inference.engine.cancellation import CancelToken
from services.inference.engine.captured import Pass, Row
from services.inference.engine.columns import Column
from services.inference.engine.components import Describer, Description, Extremes
from services.inference.engine.forward import Hooks
from services.inference.engine.generation import Continuation, Ending
from services.inference.engine.harvesting.groups import Group
from services.inference.engine.harvesting.harvest import AskedHarvest, Harvest
from services.inference.engine.integrated import Integration
from services.inference.engine.interventions import Edit, Receipt
from services.inference.engine.needs import Rows
from services.inference.engine.numerics import precise
from services.inference.engine.objectives import LogitDiff, OfLogits
from services.inference.engine.points import Point
from services.inference.engine.room import Room
from services.inference.engine.sampling import Sampling
from services.inference.engine.shelf import Shelf
from services.inference.engine.shelving import fill_shelf
from services.inference.engine.sublayers import Sublayer
from services.inference.engine.text import Vocabulary
from services.inference.engine.verification import Ablation, Verification
from services.inference.engine.whole_verification import WholeVerification


@dataclass(frozen=True)
class Captured:
    """A pass of one prompt whose points can be read one after another."""

    current: Pass
    architecture: Architecture

    @property
    def receipts(self) -> tuple[Receipt, ...]:
        return self.current.receipts(0)

    @property
    def forward_ms(self) -> float:
        return self.current.forward_ms

    def read(self, point: Point) -> Tensor:
        """On the CPU, of the shape of `points.shape`. Raises FailedPrecondition (NON_FINITE)."""
        return activations.read(point, self.architecture, self.current, 0)


@dataclass(frozen=True)
class Example:
    """A prompt that shows a behaviour, and how often the model is right on others of its kind."""

    title: str
    prompt: str
    target: str
    distractor: str
    accuracy: float | None


_NOTHING = ReadPoints()


class Model:
    """One model on one device."""

    def __init__(self, loaded: loading.Loaded) -> None:
        self.identity = loaded.identity
        self.vocabulary: Vocabulary = loaded.vocabulary
        self.architecture: Architecture = resolve(loaded.model)
        self.examples = _examples(loaded.folder)
        parameter = next(loaded.model.parameters())
        self.device: torch.device = parameter.device
        self.dtype: torch.dtype = parameter.dtype
        self.hooks = Hooks(loaded.model, self.architecture)
        self.batch_tokens = batch_budget.LEAST
        """How many tokens a shared pass may have, padding counted; set by `measure_batches`."""
        self._module = loaded.model

    @property
    def shelf(self) -> Shelf:
        """The dictionaries served with it."""
        return self.hooks.shelf

    @property
    def shape(self) -> Shape:
        """What addresses may name."""
        return replace(self.architecture.shape, dictionaries=self.shelf.shapes)

    def open_dictionaries(self, sources: Sequence[DictionarySource], most: int) -> None:
        """Serves dictionaries, `most` bytes of weights at a time.

        Raises FailedPrecondition for one that cannot be read or does not fit the model.
        """
        self.hooks.shelf = fill_shelf(
            sources,
            self.hooks,
            self.architecture,
            self.vocabulary,
            self._own_sequences,
            most,
            CancelToken(),
        )

    @property
    def room(self) -> Room:
        """What its passes may use of the device's memory."""
        return self.hooks.room

    def make_room(self, activation_bytes: int | None) -> None:
        """Sets how many bytes its passes may use; None: most of what the device has now."""
        self.room.budget = activation_bytes or budget.automatic(self.device, self.shelf.awaited)

    def measure_batches(self) -> None:
        """Measures how large shared passes should be on this device."""
        self.batch_tokens = batch_budget.measure(self.hooks, self.architecture.context)

    def _own_sequences(self, rows: int, tokens: int) -> tuple[tuple[int, ...], ...]:
        """Sequences sampled from the model, each from another first token."""
        generator = torch.Generator().manual_seed(0)
        first = torch.randint(self.architecture.vocabulary, (rows, 1), generator=generator)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            ids = self._module.generate(
                first.to(self.device),
                do_sample=True,
                max_new_tokens=tokens - 1,
                min_new_tokens=tokens - 1,
                top_k=0,
                pad_token_id=0,
            )
        return tuple(tuple(row) for row in ids.tolist())

    def warm_up(self) -> None:
        """Touches the device with a whole attribution, never longer than the context."""
        ids = (0,) * min(8, self.architecture.context)
        run = ExplainedRun(ids, (), LogitDiff((0,), (), len(ids) - 1))
        ranking = tables.Ranking(Column.TOTAL_EFFECT, 1)
        asked = AskedAttribution((run,), NormMode.FINAL_NORM_FROZEN, ranking)
        self.attribute(asked, CancelToken())

    def run(self, asked: AskedRun, cancel: CancelToken) -> RunResult:
        """Forward with interventions, and predictions.

        Raises FailedPrecondition (reason NON_FINITE), Cancelled, DeadlineExceeded.
        """
        return _only(self.run_many([asked], cancel))

    def run_many(
        self, asked: Sequence[AskedRun], cancel: CancelToken
    ) -> list[RunResult | TdbError]:
        """Several runs with equal batch keys in one padded pass: the answer or refusal of each."""
        return self._batches.run(asked, cancel)

    def capture(
        self,
        token_ids: Sequence[int],
        edits: tuple[Edit, ...],
        wanted: Sequence[Point],
        cancel: CancelToken,
    ) -> Captured:
        """Forward with interventions, for reading the wanted points: held while it lives.

        Raises FailedPrecondition (NON_FINITE), Cancelled, DeadlineExceeded, and ResourceExhausted
        where others hold too much memory.
        """
        row = Row(tuple(token_ids), edits)
        everywhere = Point("logits") in wanted
        positions = range(len(token_ids)) if everywhere else [len(token_ids) - 1]
        read = ReadPoints(activations=tuple(wanted))
        rows = Rows((len(token_ids),), edits, len(positions), read.dictionaries)
        held = needs.captured(self.hooks, rows, wanted)
        self.room.check_holder(held)
        current = self.hooks.run(
            [row],
            positions,
            gradients=False,
            cancel=cancel,
            keep=read.all,
            dictionaries=read.dictionaries,
        )
        captured = Captured(current, self.architecture)
        self.room.hold(captured, held)
        return captured

    def generate(
        self,
        prompt: Sequence[int],
        edits: tuple[Edit, ...],
        sampling: Sampling,
        ending: Ending,
        top: int = 0,
    ) -> Continuation:
        """A continuation to be taken step by step; nothing runs yet."""
        return Continuation(self.hooks, self.vocabulary, prompt, edits, sampling, ending, top)

    def describe(
        self, component: Address, tokens: int, circuits: int, similar: int, cancel: CancelToken
    ) -> Description:
        """What a component writes and reads, without a prompt; see `components`.

        Of a latent without similar ones: `similar_latents` finds them, dictionary by dictionary.
        """
        if component.kind is not Kind.LATENT:
            return self._describer.describe(component, tokens, circuits, similar, cancel)
        assert component.index is not None
        (bound,) = self.shelf.bind([component.dictionary])
        directions = self._describer.describe_latent(bound, component.index, tokens)
        return Description(directions, ())

    def latent_write(self, latent: Address) -> Tensor:
        """[d]: what one unit of a latent adds to the residual stream, scales left out."""
        (bound,) = self.shelf.bind([latent.dictionary])
        return bound.unit_writes(torch.tensor([latent.index], device=self.device))[0]

    def similar_latents(
        self, latent: Address, write: Tensor, among: str, count: int, cancel: CancelToken
    ) -> tuple[tuple[Address, float], ...]:
        """The latents of the dictionary `among` that write most like `latent`, whose own write is
        given, and the cosines."""
        (others,) = self.shelf.bind([among])
        own = latent.index if among == latent.dictionary else None
        return self._describer.similar_latents(others, write, count, own, cancel)

    def output_tokens(self, group: Group, first: int, stop: int, tokens: int) -> Extremes:
        """The tokens that neurons or latents `first` to `stop` of a group promote and suppress.

        Raises FailedPrecondition (NON_FINITE)."""
        if group.dictionary:
            (bound,) = self.shelf.bind([group.dictionary])
            which = torch.arange(first, stop, device=self.device)
            writes = bound.constant_scale * bound.unit_writes(which)
        else:
            assert group.layer is not None
            writes = self.architecture.layers[group.layer].w_out[first:stop]
        return self._describer.extreme_tokens(writes, tokens)

    @property
    def _describer(self) -> Describer:
        return Describer(self.architecture, self.vocabulary.listed)

    def attribute(self, asked: AskedAttribution, cancel: CancelToken) -> AttributeResult:
        """The node table of one run, or of a run and the one it is compared with.

        Raises FailedPrecondition (reason NON_FINITE), Cancelled, DeadlineExceeded.
        """
        return _only(self.attribute_many([asked], cancel))

    def attribute_many(
        self, asked: Sequence[AskedAttribution], cancel: CancelToken
    ) -> list[AttributeResult | TdbError]:
        """Several tables with equal batch keys from one padded pass: the answer or refusal of
        each."""
        return self._batches.attribute(asked, cancel)

    @property
    def _batches(self) -> Batches:
        return Batches(self.hooks, self.vocabulary.listed)

    def estimate(
        self,
        run: ExplainedRun,
        ablations: Sequence[Ablation],
        norm_mode: NormMode,
        cancel: CancelToken,
    ) -> list[float]:
        """Estimated total effect of each node or component, in the order given."""
        edits = [ablation.edit for ablation in ablations]
        return estimates.estimate(self.hooks, run, edits, norm_mode, cancel)

    def estimated_at_once(
        self, run: ExplainedRun, ablations: Sequence[Ablation]
    ) -> Iterator[slice]:
        """Which of them one call of `estimate` should be for."""
        return estimates.parts(self.hooks, run, [ablation.edit for ablation in ablations])

    def verify(
        self,
        run: ExplainedRun,
        ablations: Sequence[Ablation],
        norm_mode: NormMode,
        cancel: CancelToken,
    ) -> Verification | WholeVerification:
        """The run as it is, and the chunks in which its nodes can be verified."""
        if isinstance(run.objective, OfLogits):
            return verification.begin(self.hooks, run, ablations, cancel)
        return whole_verification.begin(self.hooks, run, ablations, norm_mode, cancel)

    def integrate(
        self,
        run: ExplainedRun,
        nodes: Sequence[Address],
        steps: int,
        starts: Mapping[Sublayer, Tensor],
        along_input: bool,
        norm_mode: NormMode,
        cancel: CancelToken,
    ) -> Integration:
        """The run as it is, and the chunks in which its nodes' effects can be integrated."""
        return integrated.begin(
            self.hooks, run, nodes, steps, cancel, starts, along_input, norm_mode
        )

    def harvest(self, asked: AskedHarvest) -> Harvest:
        """The batches in which components are harvested; nothing runs yet."""
        return Harvest(self.hooks, asked)

    def unembedding_direction(self, targets: Sequence[int], distractors: Sequence[int]) -> Tensor:
        """[d]: mean unembedding column of the targets minus that of the distractors."""
        columns = self.architecture.w_u
        direction = precise(columns[list(targets)]).mean(0)
        if distractors:
            direction = direction - precise(columns[list(distractors)]).mean(0)
        return direction

    def neuron_write(self, neuron: Address) -> Tensor:
        """[d]: what one unit of a neuron adds to the residual stream."""
        assert neuron.layer is not None
        return precise(self.architecture.layers[neuron.layer].w_out[neuron.index])


def _only(answers: list[Answer | TdbError]) -> Answer:
    """The answer of a batch of one. Raises its refusal."""
    (answer,) = answers
    if isinstance(answer, TdbError):
        raise answer
    return answer


def _examples(folder: Path) -> tuple[Example, ...]:
    """`behaviours.json` beside the weights: prompts with known answers, if the folder has any."""
    path = folder / "behaviours.json"
    if not path.is_file():
        return ()
    try:
        entries = json.loads(path.read_text())
        return tuple(
            Example(
                entry["title"],
                entry["prompt"],
                entry["target"],
                entry["distractor"],
                entry.get("accuracy"),
            )
            for entry in entries
        )
    except (ValueError, KeyError, TypeError) as error:
        raise FailedPrecondition(f"{path} is not a list of examples: {error}") from error
