"""Sharing: which requests may be answered from one padded pass, and how many of them fit in it.

Requests of any users do whose `batch_key`s are equal, as long as the pass stays within the model's
token budget, padding counted, and within its memory. A request that asks to be repeatable runs
alone, and so does one whose baseline takes passes of its own.
"""

from collections.abc import Sequence
from functools import partial

from services.inference.engine import needs
from services.inference.engine.asked import AskedAttribution, AskedRun
from services.inference.engine.model import Model
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
    return needs.of_runs(model.hooks, members) <= model.room.free


def _tables_fit(model: Model, members: Sequence[AskedAttribution]) -> bool:
    if _padded_tables(members) > model.batch_tokens:
        return False
    return needs.of_attributions(model.hooks, members) <= model.room.free
