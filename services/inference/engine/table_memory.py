"""How many bytes a node table needs besides its pass: places of pairs, columns, read-outs, x0."""

from dataclasses import dataclass, replace

from services.inference.engine.columns import Column
from services.inference.engine.memory import INT64, Batch, Sizes, passed, running

_ROWS = 8192
"""Decoder rows mapped or gathered at a time (`bound`, `latents`)."""
_SCORED, _READ = 128, 64
"""Nodes scored at a time, and read: pairs with their head's weights, latents with their sublayer
run again (`readouts`, `own_token`)."""


@dataclass(frozen=True)
class Listing:
    """What is made of a pass for a node table."""

    top_k: int
    columns: int = 1
    """Columns it is ranked by."""
    read_out_rows: int = 0
    """Nodes whose tokens are read out."""
    references: int = 0
    """Rows of a batch of reference runs; 0: effects are measured from 0."""
    reference_tokens: int = 0


def table(sizes: Sizes, batch: Batch, listing: Listing) -> int:
    """Bytes of a batch with gradients and of the tables of its rows."""
    rows, tokens, size = batch.rows, batch.tokens, sizes.itemsize
    pairs = sizes.heads * tokens * tokens
    places = rows * tokens
    visible = rows * sizes.layers * tokens * tokens * INT64
    values = sizes.layers * places * (sizes.heads_width + 2 * sizes.width) * size
    groups = 1 + 2 * sizes.layers + len(batch.dictionaries)
    largest = max(pairs, tokens * sizes.neurons)
    column = 4 * max(pairs, tokens * sizes.neurons) * sizes.floats
    picked = listing.columns * groups * min(listing.top_k, largest) * 4 * INT64
    latents = sum(each.listed(tokens, size) for each in batch.dictionaries) * rows
    encoded = max(
        (
            each.encoded(tokens, size)
            + 2 * tokens * each.active * len(Column) * size
            + 3 * min(_ROWS, max(each.count, tokens * each.active)) * each.width * size
            for each in batch.dictionaries
        ),
        default=0,
    )
    batch = replace(batch, gradients=True)
    layer = running(sizes, batch)  # over by the time of the table
    kept = passed(sizes, batch) - layer
    return (kept + visible + values + picked + latents) + max(
        layer,
        column,
        encoded,
        _read_out(sizes, batch, listing),
        _references(sizes, batch, listing),
    )


def _read_out(sizes: Sizes, batch: Batch, listing: Listing) -> int:
    nodes = min(listing.read_out_rows, batch.tokens**2 * sizes.heads * sizes.layers)
    if not nodes:
        return 0
    size = sizes.itemsize
    directions = nodes * sizes.width * 6 * size
    weights = 3 * min(nodes, _READ) * sizes.head_width * sizes.width * size
    scores = 3 * min(nodes, _SCORED) * sizes.vocabulary * size
    once = batch.tokens * sizes.heads_width * 3 * size
    again = 0
    if batch.dictionaries:
        again = _READ * (8 * sizes.heads * batch.tokens * sizes.floats + sizes.graph)
    return directions + max(weights + once, scores, again)


def _references(sizes: Sizes, batch: Batch, listing: Listing) -> int:
    if not listing.references:
        return 0
    runs = Batch(listing.references, listing.reference_tokens, dictionaries=batch.dictionaries)
    return passed(sizes, runs) + starts(sizes, batch)


def starts(sizes: Sizes, batch: Batch) -> int:
    """Bytes of x0 of all nodes of a run, held as long as its table is being made."""
    tokens, size = batch.tokens, sizes.itemsize
    pattern = sizes.heads * tokens * tokens
    layers = sizes.layers * (pattern + tokens * max(sizes.neurons, sizes.width))
    latents = sum(tokens * each.count for each in batch.dictionaries)
    temporary = 3 * max(pattern, tokens * sizes.neurons)
    dense = max((each.encoded(tokens, size) for each in batch.dictionaries), default=0)
    return (layers + latents + temporary + tokens * sizes.width) * size + dense
