"""What whole requests need of the device's memory, in bytes: the most that any of their passes do.

Work that can be cut into chunks counts with its smallest: one row, one node.
"""

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, replace

from services.inference.engine import activations, memory, table_memory
from services.inference.engine.asked import AskedAttribution, AskedRun
from services.inference.engine.columns import COLUMNS
from services.inference.engine.forward import Hooks
from services.inference.engine.interventions import Borrow, Edit
from services.inference.engine.memory import Batch, Sizes
from services.inference.engine.points import Point
from services.inference.engine.predictions import AT_ONCE
from services.inference.engine.table_memory import Listing

_DIRECTIONS = 128
"""Directions scored at a time against the vocabulary (`readouts`)."""
_LATENTS = 8192
"""Latents whose writes are compared at a time (`components`)."""


@dataclass(frozen=True)
class Rows:
    """The runs of a pass: how long each is, and what is done and read in them."""

    lengths: tuple[int, ...]
    edits: tuple[Edit, ...] = ()
    """Of all of them."""
    logits: int = 1
    """Positions that the run with most wants."""
    dictionaries: tuple[str, ...] = ()
    """Ids of those that are read, besides the edited ones."""

    def of(self, hooks: Hooks) -> Batch:
        tokens = max(self.lengths)
        batch = hooks.batch(len(self.lengths), tokens, self.edits, self.dictionaries)
        return replace(batch, logits=min(self.logits, tokens))


def forward(hooks: Hooks, rows: Rows, points: Sequence[Point] = (), lens: int = 0) -> int:
    """A pass, predictions at its positions, and points that are read, some through the lens."""
    sizes, batch = hooks.room.sizes, rows.of(hooks)
    whole = [activations.size(point, hooks.architecture, batch.tokens) for point in points]
    batch = replace(batch, kept=batch.rows * sum(whole))
    encoded = [each.encoded(batch.tokens, sizes.itemsize) for each in batch.dictionaries]
    predicted = positions_at_once(hooks, min(batch.logits, AT_ONCE)) * _predicted(sizes)
    answers = batch.rows * sum(whole)
    read_out = max(3 * max(whole, default=0), max(encoded, default=0), predicted * (1 + (lens > 0)))
    running = memory.running(sizes, batch)
    passed = memory.passed(sizes, batch) - running + max(running, read_out + answers)
    return max(passed, borrowed(hooks, rows.edits))


def captured(hooks: Hooks, rows: Rows, points: Sequence[Point]) -> int:
    """What is left of a pass from which points are read one after another."""
    batch = rows.of(hooks)
    whole = [activations.size(point, hooks.architecture, batch.tokens) for point in points]
    batch = replace(batch, kept=sum(whole))
    sizes = hooks.room.sizes
    return memory.passed(sizes, batch) - memory.running(sizes, batch)


def of_runs(hooks: Hooks, asked: Sequence[AskedRun]) -> int:
    """Runs that share a pass."""
    rows = Rows(
        tuple(len(each.token_ids) for each in asked),
        tuple(edit for each in asked for edit in each.edits),
        max(len(each.logits_at) for each in asked),
        tuple(name for each in asked for name in each.read.dictionaries),
    )
    points = dict.fromkeys(point for each in asked for point in each.read.all)
    return forward(hooks, rows, tuple(points), max(len(each.read.lens) for each in asked))


def of_attributions(hooks: Hooks, asked: Sequence[AskedAttribution]) -> int:
    """Node tables that share a pass."""
    runs = [run for each in asked for run in each.runs]
    rows = Rows(
        tuple(len(run.token_ids) for run in runs),
        tuple(edit for run in runs for edit in run.edits),
        max(len(run.objective.logit_positions) for run in runs),
        (*asked[0].dictionaries, *(name for run in runs for name in run.objective.dictionaries)),
    )
    listings = [listing(each) for each in asked]
    read_out = sum(each.read_out_rows for each in listings)  # which are scored together
    return table(hooks, rows, replace(_largest(listings), read_out_rows=read_out))


def listing(asked: AskedAttribution, top_k: int | None = None) -> Listing:
    """What is made of its pass, or would be with another `top_k`."""
    ranking, reference = asked.ranking, asked.reference
    columns = 1 if ranking.column else len(COLUMNS)
    kinds = 3 if ranking.per_kind else 1
    lengths = [len(ids) for ids, _ in reference.runs] if reference else []
    rows = top_k or ranking.top_k
    return Listing(
        rows,
        columns,
        rows * columns * kinds * len(asked.runs) if asked.read_out_tokens else 0,
        references=min(1, len(lengths)),
        reference_tokens=max(lengths, default=0),
    )


def _largest(listings: Sequence[Listing]) -> Listing:
    """One that needs as much as any of them: they are made one after the other."""
    return Listing(*(max(values) for values in zip(*map(astuple, listings), strict=True)))


def positions_at_once(hooks: Hooks, most: int) -> int:
    """At how many positions predictions are read at a time: in an eighth of the room."""
    return hooks.room.rows(most, 8 * _predicted(hooks.room.sizes))


def _predicted(sizes: Sizes) -> int:
    """Bytes while one position's predictions are read."""
    return 4 * sizes.vocabulary * sizes.floats


def table(hooks: Hooks, rows: Rows, listing: Listing) -> int:
    """Node tables of runs that share a pass."""
    batch = replace(rows.of(hooks), gradients=True)
    needed = table_memory.table(hooks.room.sizes, batch, listing)
    return max(needed, borrowed(hooks, rows.edits))


def estimate(hooks: Hooks, rows: Rows, targets: Iterable[Edit]) -> int:
    """Estimates of targets, the costliest by itself."""
    each = [
        replace(rows.of(hooks), gradients=True, edits=(*rows.edits, edit))
        for edit in memory.unlike(targets)
    ]
    passed = [memory.passed(hooks.room.sizes, batch) for batch in each]
    return max([*passed, borrowed(hooks, rows.edits)])


def verification(hooks: Hooks, rows: Rows, *, from_recording: bool) -> int:
    """A run's nodes put at their baselines one at a time."""
    sizes, batch = hooks.room.sizes, rows.of(hooks)
    if not from_recording:
        return memory.passed(sizes, replace(batch, branches=True))
    recording = memory.recorded(sizes, batch.tokens) + memory.running(sizes, batch)
    row = memory.resumed(sizes, batch)
    return memory.recorded(sizes, batch.tokens) + max(row, recording)


def integration(hooks: Hooks, rows: Rows, starts: bool) -> int:
    """Gradients at one point of the way at a time."""
    sizes, batch = hooks.room.sizes, rows.of(hooks)
    held = memory.recorded(sizes, batch.tokens, batch.dictionaries)
    held += memory.summed(sizes, batch.tokens, batch.dictionaries)
    if starts:
        held += table_memory.starts(sizes, batch)
    return held + memory.integrated(sizes, batch)


def generation(hooks: Hooks, rows: Rows, total: int, branches: int) -> int:
    """A prompt, and continuations of it that come to `total` tokens each."""
    sizes, batch = hooks.room.sizes, rows.of(hooks)
    cached = branches * memory.cached(sizes, total)
    step = memory.resumed(sizes, replace(batch, tokens=total), first=total - 1)
    return cached + max(memory.passed(sizes, batch), step, borrowed(hooks, rows.edits))


def description(hooks: Hooks) -> int:
    """A component without a prompt: scores of all tokens, and the writes it is compared with."""
    sizes = hooks.room.sizes
    scores = 3 * _DIRECTIONS * sizes.vocabulary * sizes.floats
    compared = 4 * max(sizes.neurons, sizes.heads_width, _LATENTS) * sizes.width * sizes.floats
    return max(scores, compared)


def borrowed(hooks: Hooks, edits: Iterable[Edit]) -> int:
    """The longest run that MEAN and PATCH take from, those that it takes from itself included."""
    most = 0
    seen: set[int] = set()
    for edit in edits:
        if not isinstance(edit.operation, Borrow):
            continue
        for reading in edit.operation.readings:
            if id(reading.run) not in seen:
                seen.add(id(reading.run))
                batch = hooks.batch(1, len(reading.run.token_ids), reading.run.edits)
                own = memory.passed(hooks.room.sizes, batch)
                most = max(most, own, borrowed(hooks, reading.run.edits))
    return most
