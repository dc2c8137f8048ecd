"""Sharing: which requests may be answered from one padded pass, and how many of them fit in it.

Requests of any users do whose `batch_key`s are equal, as long as the pass stays within the model's
token budget, padding counted, and within its memory. A request that asks to be repeatable runs
alone, and so does one whose baseline takes passes of its own.
"""

from collections.abc import Sequence
from functools import partial

from services.inference.engine import needs
from services.inference.engine.asked import AskedAttribution, AskedRun
from services.inference.engine.columns import COLUMNS
from services.inference.engine.model import Model
from services.inference.engine.needs import Rows
from services.inference.engine.table_memory import Listing
from services.inference.requests import Attribution, Forward
from services.inference.task import Batch, Task


def of_run(wanted: Forward, model: Model) -> Task:
    """The work of a Run."""
    asked = wanted.asked
    batch = Batch(
        (model.identity.id, asked.batch_key),
        asked,
        partial(_runs_fit, model),
        _padded_runs,
        model.run_many,
    )
    return Task("Run", len(asked.token_ids), batch=batch)


def of_attribution(wanted: Attribution, model: Model) -> Task:
    """The work of an Attribute, verified and integrated columns left out."""
    asked = wanted.asked
    if wanted.deterministic or asked.reference is not None:
        return Task("Attribute", wanted.padded_tokens)
    batch = Batch(
        (model.identity.id, asked.batch_key),
        asked,
        partial(_tables_fit, model),
        _padded_tables,
        model.attribute_many,
    )
    return Task("Attribute", wanted.padded_tokens, batch=batch)


def _padded_runs(members: Sequence[AskedRun]) -> int:
    return len(members) * max(len(each.token_ids) for each in members)


def _padded_tables(members: Sequence[AskedAttribution]) -> int:
    lengths = [len(run.token_ids) for each in members for run in each.runs]
    return len(lengths) * max(lengths)


def _runs_fit(model: Model, members: Sequence[AskedRun]) -> bool:
    if _padded_runs(members) > model.batch_tokens:
        return False
    rows = Rows(
        tuple(len(each.token_ids) for each in members),
        tuple(edit for each in members for edit in each.edits),
        max(len(each.logits_at) for each in members),
        tuple(name for each in members for name in each.read.dictionaries),
    )
    points = {point for each in members for point in each.read.all}
    lens = max(len(each.read.lens) for each in members)
    return needs.forward(model.hooks, rows, tuple(points), lens) <= model.room.budget


def _tables_fit(model: Model, members: Sequence[AskedAttribution]) -> bool:
    if _padded_tables(members) > model.batch_tokens:
        return False
    runs = [run for each in members for run in each.runs]
    rows = Rows(
        tuple(len(run.token_ids) for run in runs),
        tuple(edit for run in runs for edit in run.edits),
        max(len(run.objective.logit_positions) for run in runs),
        (
            *members[0].dictionaries,
            *(name for run in runs for name in run.objective.dictionaries),
        ),
    )
    columns = max(1 if each.ranking.column else len(COLUMNS) for each in members)
    listed = max(
        each.ranking.top_k * columns * (3 if each.ranking.per_kind else 1) * len(each.runs)
        for each in members
    )
    reads_out = any(each.read_out_tokens for each in members)
    listing = Listing(
        max(each.ranking.top_k for each in members), columns, listed if reads_out else 0
    )
    return needs.table(model.hooks, rows, listing) <= model.room.budget
