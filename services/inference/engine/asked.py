"""What is asked of a model in one call, and what comes back.

Calls that could be members of one batch say so by an equal key: everything that a batch must have
in common, which is the dictionaries that it reads, and a length that does not make the shorter
prompts pay much for the longest. All else (objective, edits, norm mode, ranking, read-outs) is each
member's own.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from services.common.addresses import Address
from services.inference.engine.attribution import ExplainedRun, NormMode, Outcome, StageTimes
from services.inference.engine.baselines import Reference
from services.inference.engine.interventions import Edit, Receipt
from services.inference.engine.points import Point
from services.inference.engine.predictions import NextTokens
from services.inference.engine.readouts import ReadOut
from services.inference.engine.sublayers import Sublayer
from services.inference.engine.tables import Ranking, Table

SHORTEST, STEP = 16, 64
"""Tokens: shorter prompts are padded to the first, and lengths above the second to its multiples;
those between to powers of two."""


@dataclass(frozen=True)
class ReadPoints:
    """Points read in a run: through the logit lens, and whole."""

    lens: tuple[Point, ...] = ()
    activations: tuple[Point, ...] = ()

    @property
    def all(self) -> frozenset[Point]:
        return frozenset(self.lens + self.activations)

    @property
    def dictionaries(self) -> tuple[str, ...]:
        return tuple(each.dictionary for each in self.activations if each.dictionary)


@dataclass(frozen=True)
class AskedRun:
    """A forward pass with interventions, and what is predicted at `positions`, ascending."""

    token_ids: tuple[int, ...]
    edits: tuple[Edit, ...]
    positions: tuple[int, ...]
    top_k: int
    named: tuple[int, ...] = ()
    read: ReadPoints = ReadPoints()

    @property
    def logits_at(self) -> tuple[int, ...]:
        """Positions at which the pass must have logits."""
        everywhere = Point("logits") in self.read.activations
        return tuple(range(len(self.token_ids))) if everywhere else self.positions

    @property
    def padded_tokens(self) -> int:
        """How many of a batch's tokens it takes up, at most."""
        return length_bucket(len(self.token_ids))

    @property
    def batch_key(self) -> Hashable:
        """Runs with equal keys may share a batch."""
        logits = 1 << (len(self.logits_at) - 1).bit_length()  # the row with most sets their number
        touched = _touched(self.edits, self.read.dictionaries)
        return "run", self.read.all, touched, self.padded_tokens, logits


@dataclass(frozen=True)
class RunResult:
    next_tokens: tuple[NextTokens, ...]
    receipts: tuple[Receipt, ...]
    lens: tuple[tuple[NextTokens, ...], ...]
    """Per point of the lens, in the order asked for: what it predicts at each position."""
    activations: tuple[Tensor, ...]
    """Per point, in the order asked for, on the CPU; see `points` for the axes."""
    forward_ms: float
    """Of the batch that it was run in."""


@dataclass(frozen=True)
class AskedAttribution:
    """The node table of one run, or of a run and the one it is compared with.

    `read_out_tokens` tokens are read out of every listed node; 0: none. The estimates of a single
    run are measured from `reference`; None: from 0. `dictionaries` names those whose latents stand
    in the table; with read-outs, `sources` source tokens are listed of those behind attention.
    """

    runs: tuple[ExplainedRun, ...]
    norm_mode: NormMode
    ranking: Ranking
    read_out_tokens: int = 0
    reference: Reference | None = None
    dictionaries: tuple[str, ...] = ()
    sources: int = 0

    @property
    def padded_tokens(self) -> int:
        """How many of a batch's tokens it takes up, at most."""
        return len(self.runs) * length_bucket(max(len(run.token_ids) for run in self.runs))

    @property
    def batch_key(self) -> Hashable:
        """Attributions with equal keys may share a batch."""
        read = frozenset().union(
            *(_touched(run.edits, run.objective.dictionaries) for run in self.runs)
        )
        bucket = self.padded_tokens // len(self.runs)
        return "attribute", frozenset(self.dictionaries), read, bucket


@dataclass(frozen=True)
class AttributeResult:
    """`outcomes` has one entry per run; `top_tokens` too, as (token id, logit)."""

    outcomes: tuple[Outcome, ...]
    table: Table
    top_tokens: tuple[tuple[tuple[int, float], ...], ...]
    read_outs: dict[Address, ReadOut]
    """Of the listed nodes in the first run (in the other one where a node is only there)."""
    times: StageTimes
    """Of the batch that it was computed in; of several passes where its runs do not fit in one."""
    starts: Mapping[Sublayer, Tensor]
    """x0 of all nodes; empty: 0."""
    own_ms: float = 0.0
    """What its own part took: table and read-outs."""


def length_bucket(tokens: int) -> int:
    """The length that a prompt is padded to in a batch at most."""
    if tokens > STEP:
        return -(-tokens // STEP) * STEP
    return max(SHORTEST, 1 << (tokens - 1).bit_length())


def _touched(edits: Sequence[Edit], read: Iterable[str]) -> frozenset[str]:
    """The dictionaries that a run needs."""
    return frozenset(read) | {edit.target.dictionary for edit in edits if edit.target.dictionary}
