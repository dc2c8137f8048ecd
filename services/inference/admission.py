"""What a request takes of the device, known before it is queued; what never fits is refused here.

A request that needs more bytes than all passes together may use would fail however long it waited.
Its refusal says what it needs and what there is, and what would make it possible: the longest
prompt, or the most rows, that fit.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from services.common.errors import FailedPrecondition
from services.inference import (
    describe_component,
    generate,
    output_tokens,
    stream_activations,
    verify,
)
from services.inference.engine import needs
from services.inference.engine.attribution import ExplainedRun
from services.inference.engine.harvesting.harvest import WORKING_BYTES, AskedHarvest
from services.inference.engine.interventions import Edit
from services.inference.engine.model import Model
from services.inference.engine.needs import Rows
from services.inference.engine.objectives import OfLogits
from services.inference.requests import Attribution, Forward

MIB = 2**20


@dataclass(frozen=True)
class Cost:
    """What a request takes while its largest pass runs."""

    tokens: int
    """Rows times the longest of them."""
    bytes: int


def of_run(wanted: Forward, model: Model) -> Cost:
    """Raises FailedPrecondition (MEMORY)."""
    run, read = wanted.run, wanted.read
    everywhere = any(point.name == "logits" for point in read.activations)
    logits = len(run.token_ids) if everywhere else len(wanted.positions)
    rows = Rows((len(run.token_ids),), run.edits, logits, read.dictionaries)

    def needed(tokens: int) -> int:
        shorter = replace(rows, lengths=(tokens,))
        points = (*read.activations, *read.lens)
        return needs.forward(model.hooks, shorter, points, len(read.lens))

    _admit_sources(model, run.edits, "run")
    return _admit(model, needed, len(run.token_ids), "run.prompt", "this run")


def of_points(wanted: stream_activations.Wanted, model: Model) -> Cost:
    """Raises FailedPrecondition (MEMORY)."""
    run = wanted.run
    everywhere = any(point.name == "logits" for point in wanted.points)
    names = tuple(point.dictionary for point in wanted.points if point.dictionary)
    rows = Rows((len(run.token_ids),), run.edits, len(run.token_ids) if everywhere else 1, names)

    def needed(tokens: int) -> int:
        return needs.forward(model.hooks, replace(rows, lengths=(tokens,)), wanted.points)

    _admit_sources(model, run.edits, "run")
    return _admit(model, needed, len(run.token_ids), "run.prompt", "these activations")


def of_attribution(wanted: Attribution, model: Model) -> Cost:
    """Raises FailedPrecondition (MEMORY)."""
    lengths = [len(run.token_ids) for run in wanted.runs]
    longest = lengths.index(max(lengths))
    field = ("run", "compare")[longest]

    def needed(tokens: int, top_k: int = wanted.ranking.top_k) -> int:
        """Of the costliest run: two that do not fit together run one after the other."""
        listing = needs.listing(wanted.asked, top_k)
        each = [_rows(wanted, [run], tokens) for run in wanted.runs]
        table = max(needs.table(model.hooks, rows, listing) for rows in each)
        if not wanted.integrated_steps:
            return table  # which is more than a row with one node ablated
        starts = wanted.reference is not None
        return max(table, needs.integration(model.hooks, each[0], starts))

    for name, run in zip(("run", "compare"), wanted.runs, strict=False):
        _admit_sources(model, run.edits, name)
    tokens, top_k = max(lengths), wanted.ranking.top_k
    if needed(tokens) > model.room.budget >= needed(tokens, 1):
        _refuse_rows(model, lambda rows: needed(tokens, rows), top_k)
    cost = _admit(model, needed, tokens, f"{field}.prompt", "this table")
    together = needs.of_attributions(model.hooks, [wanted.asked])
    if together > model.room.budget:
        return cost
    return Cost(wanted.padded_tokens, max(cost.bytes, together))


def of_verification(wanted: verify.Wanted, model: Model) -> Cost:
    """Raises FailedPrecondition (MEMORY)."""
    table, run = wanted.table, wanted.table.runs[0]
    named = wanted.named

    def needed(tokens: int) -> int:
        rows = _rows(table, [run], tokens)
        if named is None:
            first = needs.table(model.hooks, rows, needs.listing(table.asked))
        else:
            first = needs.estimate(model.hooks, rows, [each.edit for each in named])
        resumed = isinstance(run.objective, OfLogits)
        return max(first, needs.verification(model.hooks, rows, from_recording=resumed))

    _admit_sources(model, run.edits, "table.run")
    return _admit(model, needed, len(run.token_ids), "table.run.prompt", "this verification")


def of_generation(wanted: generate.Wanted, model: Model) -> Cost:
    """Raises FailedPrecondition (MEMORY)."""
    prompt, new = len(wanted.run.token_ids), wanted.ending.max_new_tokens

    def needed(tokens: int) -> int:
        rows = Rows((min(prompt, tokens),), wanted.run.edits)
        return needs.generation(model.hooks, rows, tokens, 1 + wanted.twin)

    _admit_sources(model, wanted.run.edits, "run")
    field, which = "run.prompt", "a prompt"
    if needed(prompt) <= model.room.budget:
        field, which = "max_new_tokens", "a prompt and its continuation"
    cost = _admit(model, needed, prompt + new, field, "this continuation", which)
    return Cost(prompt, cost.bytes)


def of_description(wanted: describe_component.Wanted, model: Model) -> Cost:
    """Raises FailedPrecondition (MEMORY)."""
    needed = needs.description(model.hooks)
    if needed > model.room.budget:
        raise _refusal(model, needed, f"describing {wanted.component}", "component", "")
    return Cost(1, needed)


def of_output_tokens(wanted: output_tokens.Wanted, model: Model) -> Cost:
    """Raises FailedPrecondition (MEMORY)."""
    needed = needs.description(model.hooks)
    if needed > model.room.budget:
        raise _refusal(model, needed, f"reading out {wanted.group}", "group", "")
    return Cost(1, needed)


def of_harvest(asked: AskedHarvest, model: Model) -> Cost:
    """Raises FailedPrecondition (MEMORY)."""
    needed = asked.state_bytes + asked.row_bytes(model.hooks, asked.longest) + WORKING_BYTES
    if needed > model.room.budget:
        largest = max(map(asked.group_bytes, asked.groups))
        remedy = f"ask for fewer groups at a time (the largest holds {-(-largest // MIB):,} MiB)"
        raise _refusal(
            model, needed, "this harvest", "groups", f"{remedy}, keep less, or shorter sequences"
        )
    return Cost(asked.longest, needed)


def _rows(wanted: Attribution, runs: Sequence[ExplainedRun], tokens: int) -> Rows:
    """Runs of a table, cut to so many tokens."""
    return Rows(
        tuple(min(tokens, len(run.token_ids)) for run in runs),
        tuple(edit for run in runs for edit in run.edits),
        max(len(run.objective.logit_positions) for run in runs),
        (*wanted.dictionaries, *(name for run in runs for name in run.objective.dictionaries)),
    )


def _admit_sources(model: Model, edits: Iterable[Edit], field: str) -> None:
    needed = needs.borrowed(model.hooks, edits)
    if needed > model.room.budget:
        what = "a run that the interventions take values from"
        raise _refusal(model, needed, what, f"{field}.interventions", "a shorter one may fit")


def _admit(
    model: Model,
    needed: Callable[[int], int],
    tokens: int,
    field: str,
    what: str,
    which: str = "a prompt",
) -> Cost:
    """The cost where it fits; else the refusal that says how many tokens would."""
    found = needed(tokens)
    if found <= model.room.budget:
        return Cost(tokens, found)
    fitting = model.room.most(needed, tokens)
    remedy = f"{which} of at most {fitting} tokens fits" if fitting else "not even one token fits"
    raise _refusal(model, found, what, field, remedy, {"fitting_tokens": str(fitting)})


def _refuse_rows(model: Model, needed: Callable[[int], int], top_k: int) -> None:
    fitting = model.room.most(needed, top_k)
    remedy = f"a top_k of at most {fitting} fits"
    more = {"fitting_top_k": str(fitting)}
    raise _refusal(model, needed(top_k), "this table", "top_k", remedy, more)


def _refusal(
    model: Model,
    needed: int,
    what: str,
    field: str,
    remedy: str,
    more: dict[str, str] | None = None,
) -> FailedPrecondition:
    available = model.room.budget
    return FailedPrecondition(
        f"{what} needs up to {-(-needed // MIB):,} MiB of memory while it runs, and "
        f"{available // MIB:,} MiB are there for it on {model.device}"
        + (f": {remedy}" if remedy else "")
        + "; more is possible with a larger TDB_ACTIVATION_MIB, where the device has more memory",
        field=field,
        reason="MEMORY",
        metadata={
            "needed_bytes": str(needed),
            "available_bytes": str(available),
            **(more or {}),
        },
    )
