"""Objectives: the scalar J that is explained (SEMANTICS sections 3 and 4).

An objective says what J is as a function of a captured run, and what the node table must know about
it: the reference residual, the norms J looks through, the tokens it reads and the constants that
enter on the way. Objectives of logits and of a direction are here, a node's own value in `tracing`;
anything else with these members is an objective too.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol, Self

from torch import Tensor

from services.common.addresses import Address
from services.inference.engine.architecture import Architecture
from services.inference.engine.interventions import Edit
from services.inference.engine.norms import FINAL, NormPlace
from services.inference.engine.run_view import RunView, last_point


@dataclass(frozen=True)
class Constant:
    """A vector [w] that is added everywhere in `at`, [B, ..., w], between x_ref and J."""

    vector: Tensor
    at: Tensor


@dataclass(frozen=True)
class EditedVectors:
    """Vectors [T, dh] between x_ref and J that edits of the run have moved: `at[row, head]`."""

    edits: tuple[Edit, ...]
    at: Tensor
    """[B, H, T, dh], after the edits."""
    head: int


class Objective(Protocol):
    """A scalar J of a run."""

    @property
    def position(self) -> int:
        """The token whose logits are shown beside J."""

    @property
    def logit_positions(self) -> tuple[int, ...]:
        """Positions at which the pass must have logits for this objective."""

    @property
    def reads(self) -> tuple[int, ...]:
        """The only tokens at which g* may differ from 0, ascending."""

    @property
    def notices(self) -> tuple[str, ...]:
        """Sentences about this J that its reader must see."""

    @property
    def dictionaries(self) -> tuple[str, ...]:
        """Ids of the dictionaries that J reads."""

    @property
    def holds(self) -> bool:
        """Whether J holds anything constant, so that `hold` matters."""

    def point(self, architecture: Architecture) -> Address:
        """Where the reference residual x_ref is."""

    @property
    def itself(self) -> Address | None:
        """The pair or latent whose value, as it stands in the table, is J: its own gradient is 1,
        which no path through what it writes says."""

    @property
    def before_edits(self) -> bool:
        """Whether x_ref is the stream before the edits of its point, not after them."""

    def reference(self, run: RunView) -> Tensor:
        """[B, T, d]: x_ref of the whole batch, of the graph."""

    def reading_norms(self, architecture: Architecture) -> frozenset[NormPlace]:
        """The norms that lie between x_ref and J; their scale is constant unless all are live."""

    def hold(self, run: RunView) -> "Objective":
        """The same J with what it holds constant taken from this run, to be valued in others.

        Needs the gradients of the run's pass.
        """

    def value(self, run: RunView) -> Tensor:
        """J, a scalar of the run's graph. What it holds constant is the run's own before `hold`."""

    def constants(self, run: RunView) -> tuple[Constant, ...]:
        """What enters between x_ref and J besides x_ref: the row `bias.read`."""

    def edited(self, run: RunView) -> tuple[EditedVectors, ...]:
        """Where edits enter between x_ref and J."""


class Unconditional:
    """The members of an objective that is a function of its own run alone."""

    @property
    def holds(self) -> bool:
        return False

    @property
    def notices(self) -> tuple[str, ...]:
        return ()

    @property
    def dictionaries(self) -> tuple[str, ...]:
        return ()

    @property
    def itself(self) -> Address | None:
        return None

    @property
    def before_edits(self) -> bool:
        return False

    def reference(self: Objective, run: RunView) -> Tensor:
        return run.residual(self.point(run.architecture))

    def hold(self, run: RunView) -> Self:
        return self

    def edited(self, run: RunView) -> tuple[EditedVectors, ...]:
        return ()


class _AtOnePosition(Unconditional):
    """J reads the run at `position` alone."""

    position: int

    @property
    def logit_positions(self) -> tuple[int, ...]:
        return (self.position,)

    @property
    def reads(self) -> tuple[int, ...]:
        return (self.position,)


class OfLogits(_AtOnePosition, ABC):
    """J of the logits at `position`, through the final norm."""

    targets: tuple[int, ...]

    @abstractmethod
    def of_logits(self, logits: Tensor) -> Tensor:
        """[V] -> scalar."""

    def point(self, architecture: Architecture) -> Address:
        return last_point(len(architecture.layers))

    def reading_norms(self, architecture: Architecture) -> frozenset[NormPlace]:
        return frozenset({FINAL})

    def value(self, run: RunView) -> Tensor:
        return self.of_logits(run.logits(self.position))

    def constants(self, run: RunView) -> tuple[Constant, ...]:
        norm = Constant(run.architecture.final_norm.bias, run.captured.final_output)
        if run.architecture.unembed_bias is None:
            return (norm,)
        return norm, Constant(run.architecture.unembed_bias, run.captured.logits)


@dataclass(frozen=True)
class LogitDiff(OfLogits):
    """Mean target logit minus mean distractor logit at `position`, in logits."""

    targets: tuple[int, ...]
    distractors: tuple[int, ...]
    position: int

    def of_logits(self, logits: Tensor) -> Tensor:
        value = logits[list(self.targets)].mean()
        if self.distractors:
            value = value - logits[list(self.distractors)].mean()
        return value


@dataclass(frozen=True)
class LogitMinusMean(OfLogits):
    """Mean target logit minus the mean over the vocabulary, padded rows included, in logits."""

    targets: tuple[int, ...]
    position: int

    def of_logits(self, logits: Tensor) -> Tensor:
        return logits[list(self.targets)].mean() - logits.mean()


@dataclass(frozen=True)
class LogProb(OfLogits):
    """Log of the summed probability of the targets, in nats."""

    targets: tuple[int, ...]
    position: int

    def of_logits(self, logits: Tensor) -> Tensor:
        return logits.log_softmax(-1)[list(self.targets)].logsumexp(-1)


@dataclass(frozen=True)
class Prob(OfLogits):
    """Summed probability of the targets, in [0, 1]."""

    targets: tuple[int, ...]
    position: int

    def of_logits(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1)[list(self.targets)].sum()


@dataclass(frozen=True, eq=False)
class Along(_AtOnePosition):
    """Dot product of `direction` [d] with a residual point, or with the final norm's output."""

    at: Address | None
    """A point of the residual stream; None: the output of the final norm."""
    direction: Tensor
    position: int

    def point(self, architecture: Architecture) -> Address:
        return self.at or last_point(len(architecture.layers))

    def reading_norms(self, architecture: Architecture) -> frozenset[NormPlace]:
        return frozenset() if self.at else frozenset({FINAL})

    def value(self, run: RunView) -> Tensor:
        vectors = run.residual(self.at) if self.at else run.captured.final_output
        vector = vectors[run.row, self.position]
        return vector @ self.direction.to(vector)

    def constants(self, run: RunView) -> tuple[Constant, ...]:
        if self.at:
            return ()
        return (Constant(run.architecture.final_norm.bias, run.captured.final_output),)
