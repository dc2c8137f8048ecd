"""What makes a ComponentRecord whole: checked before it is written, so that readers need not.

A head's example of T tokens holds the lower triangle of its pairs row by row; with a width w, query
q has the keys max(0, q - w + 1)..q only.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from tdb.dataset.v1 import record_pb2

from services.common.addresses import Kind
from services.common.errors import InvalidArgument, inside
from services.dataset import groups
from services.dataset.groups import Group

MAX_RECORD_BYTES = 8 * 2**20
MAX_RECORD_TOKENS = 2**18


def check(record: record_pb2.ComponentRecord) -> tuple[Group, int]:
    """The group and index of a whole record. Raises InvalidArgument naming what is not."""
    with inside("component"):
        group, index = groups.parse_component(record.component)
        if group.component(index) != record.component:
            raise InvalidArgument(f"{record.component} is spelt {group.component(index)}")
    tokens = 0
    for name, number, example in _named_examples(record):
        with inside(f"{name}[{number}]"):
            tokens += _check_example(example, paired=group.kind is Kind.HEAD)
    _check_order(record)
    _check_statistics(record.statistics)
    for name in ("token_statistics", "key_token_statistics"):
        with inside(name):
            _check_token_statistics(getattr(record, name))
    if record.key_token_statistics and group.kind is not Kind.HEAD:
        raise InvalidArgument("only heads read keys", field="key_token_statistics")
    for name, scores in (("promoted", record.promoted), ("suppressed", record.suppressed)):
        if not all(math.isfinite(each.score) for each in scores):
            raise InvalidArgument("a score is not finite", field=name)
        if min((each.token_id for each in scores), default=0) < 0:
            raise InvalidArgument("token ids count from 0", field=name)
    if tokens > MAX_RECORD_TOKENS or record.ByteSize() > MAX_RECORD_BYTES:
        raise InvalidArgument(
            f"{record.component}: a record holds at most {MAX_RECORD_TOKENS} tokens and "
            f"{MAX_RECORD_BYTES} bytes, this one {tokens} and {record.ByteSize()}: keep fewer or "
            "shorter examples"
        )
    return group, index


def examples(record: record_pb2.ComponentRecord) -> Iterator[record_pb2.Example]:
    """All examples of a record: top, by quantile, random."""
    for _, _, example in _named_examples(record):
        yield example


def length(example: record_pb2.Example) -> int:
    """T, the tokens of an example."""
    return len(example.token_ids) or len(example.token_texts)


def values(example: record_pb2.Example) -> NDArray[np.float32]:
    """The activations [T], or of a head [pairs]."""
    return np.array(example.pair_activations or example.activations, dtype=np.float32)


def pair_count(tokens: int, width: int | None) -> int:
    """How many pairs `tokens` queries have when each reads at most `width` keys."""
    if width is None or width >= tokens:
        return tokens * (tokens + 1) // 2
    return width * (width + 1) // 2 + (tokens - width) * width


def pair_places(tokens: int, width: int | None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The query and the key of each pair, in the order in which pairs are stored."""
    query, key = np.tril_indices(tokens)
    if width is not None:
        visible = query - key < width
        query, key = query[visible], key[visible]
    return query, key


def peak(example: record_pb2.Example) -> float:
    """The largest activation."""
    return float(values(example).max())


def peak_positions(example: record_pb2.Example) -> tuple[int, ...]:
    """The token where the first largest activation is; of a head its query and its key."""
    place = int(values(example).argmax())
    if not example.pair_activations:
        return (place,)
    width = example.pair_width if example.HasField("pair_width") else None
    query, key = pair_places(length(example), width)
    return int(query[place]), int(key[place])


def _named_examples(
    record: record_pb2.ComponentRecord,
) -> Iterator[tuple[str, int, record_pb2.Example]]:
    for number, example in enumerate(record.top):
        yield "top", number, example
    for place, quantile in enumerate(record.quantiles):
        for number, example in enumerate(quantile.examples):
            yield f"quantiles[{place}].examples", number, example
    for number, example in enumerate(record.random):
        yield "random", number, example


def _check_example(example: record_pb2.Example, *, paired: bool) -> int:
    """The example's tokens. Raises InvalidArgument."""
    if bool(example.token_ids) == bool(example.token_texts):
        raise InvalidArgument("an example has token_ids or, where they are unknown, token_texts")
    tokens = length(example)
    if min(example.token_ids, default=0) < 0:
        raise InvalidArgument("token ids count from 0", field="token_ids")
    has_width = example.HasField("pair_width")
    if paired:
        if example.activations:
            raise InvalidArgument("a head has pair_activations", field="activations")
        if has_width and not 1 <= example.pair_width < tokens:
            raise InvalidArgument(f"must be in 1..{tokens - 1}, or absent", field="pair_width")
        wanted = pair_count(tokens, example.pair_width if has_width else None)
        _check_values(example.pair_activations, wanted, "pair_activations")
    elif example.pair_activations or has_width:
        raise InvalidArgument("only heads have pairs", field="pair_activations")
    else:
        _check_values(example.activations, tokens, "activations")
    if example.document_offset < 0:
        raise InvalidArgument("must not be negative", field="document_offset")
    return tokens


def _check_values(given: Sequence[float], wanted: int, field: str) -> None:
    if len(given) != wanted:
        raise InvalidArgument(f"has {len(given)} values where {wanted} belong", field=field)
    if not np.isfinite(np.array(given, dtype=np.float32)).all():
        raise InvalidArgument("has values that are not finite", field=field)


def _check_order(record: record_pb2.ComponentRecord) -> None:
    peaks = [peak(example) for example in record.top]
    if any(later > earlier for earlier, later in pairwise(peaks)):
        raise InvalidArgument("top examples come by their largest value, descending", field="top")


def _check_token_statistics(found: Sequence[record_pb2.TokenStatistic]) -> None:
    means = [each.mean for each in found]
    if not all(map(math.isfinite, means)) or any(b > a for a, b in pairwise(means)):
        raise InvalidArgument("means are finite and descend")
    if any(each.token_id < 0 or each.count < 1 for each in found):
        raise InvalidArgument("token ids count from 0, and each occurs")
    if len({each.token_id for each in found}) < len(found):
        raise InvalidArgument("names a token twice")
    if any(each.token_text for each in found):
        raise InvalidArgument("text is not stored where ids are known")


def _check_statistics(statistics: record_pb2.Statistics) -> None:
    with inside("statistics"):
        for field, value in statistics.ListFields():
            if isinstance(value, float) and not math.isfinite(value):
                raise InvalidArgument("is not finite: leave it out", field=field.name)
        if not 0 <= statistics.fraction_active <= 1:
            raise InvalidArgument("must be in 0..1", field="fraction_active")
        if statistics.variance < 0:
            raise InvalidArgument("must not be negative", field="variance")
        if statistics.HasField("scale") and statistics.scale <= 0:
            raise InvalidArgument("must be positive, or absent", field="scale")
        if statistics.HasField("histogram"):
            edges, counts = statistics.histogram.edges, statistics.histogram.counts
            ascending = all(a < b for a, b in pairwise(edges))
            if not (counts and len(edges) == len(counts) + 1 and ascending):
                raise InvalidArgument(
                    "needs ascending edges, one more than counts", field="histogram"
                )
            if min(counts) < 0 or not all(map(math.isfinite, edges)):
                raise InvalidArgument("needs finite edges and counts from 0", field="histogram")
