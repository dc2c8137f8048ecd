"""Answers of a batch against the same calls made alone."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from services.common.addresses import Address
from services.inference.engine.asked import AskedAttribution, AttributeResult, RunResult
from services.inference.engine.attribution import Explanation
from services.inference.engine.batches import Batches, Unread
from services.inference.engine.columns import COLUMNS, Column
from services.inference.engine.interventions import Receipt
from services.inference.engine.predictions import NextTokens
from services.inference.engine.tables import NodeValues, Ranking, Table

Explanations = tuple[Explanation, ...]


class RememberingBatches(Batches):
    """Batches whose answers can be compared whole: explanations of the last ones live on."""

    remembered: ClassVar[dict[int, tuple[Table, Explanations]]] = {}
    """By the table."""

    def _attributed(
        self, asked: AskedAttribution, explanations: Explanations, *others: Any
    ) -> Unread:
        unread = super()._attributed(asked, explanations, *others)
        table = unread.result.table
        self.remembered[id(table)] = table, explanations
        if len(self.remembered) > REMEMBERED:
            del self.remembered[next(iter(self.remembered))]
        return unread

    @classmethod
    def explanations_of(cls, result: AttributeResult) -> Explanations:
        same, explanations = cls.remembered[id(result.table)]
        assert same is result.table
        return explanations


REMEMBERED = 64
TOLERANCE = 1e-5
"""Of the largest of the numbers that belong together."""


def near(
    ours: Sequence[float] | Tensor, theirs: Sequence[float] | Tensor, size: float = 0.0
) -> None:
    """Raises AssertionError unless they are equal within the tolerance, of `size` for sums."""
    ours, theirs = (torch.as_tensor(each).double() for each in (ours, theirs))
    assert ours.shape == theirs.shape
    largest = float(theirs.abs().max()) if theirs.numel() else 0.0
    assert torch.allclose(ours, theirs, rtol=0, atol=TOLERANCE * max(largest, size) + 1e-9)


def same_attribution(ours: AttributeResult, theirs: AttributeResult, ranking: Ranking) -> None:
    explanations, expected_explanations = map(RememberingBatches.explanations_of, (ours, theirs))
    for mine, other in zip(explanations, expected_explanations, strict=True):
        same_explanation(mine, other)
    same_rows(ours, theirs, ranking)
    direct, total = (
        max(size_of(each, column) for each in expected_explanations)
        for column in (Column.DIRECT_EFFECT, Column.TOTAL_EFFECT)
    )
    for sums, expected in zip(ours.table.totals, theirs.table.totals, strict=True):
        near([sums.remainder], [expected.remainder], direct)
        near([sums.listed + sums.unlisted], [expected.listed + expected.unlisted], direct)
        if {row.node for row in ours.table.rows} == {row.node for row in theirs.table.rows}:
            near([sums.listed], [expected.listed], direct)
    for run, expected_run in zip(ours.table.token_effects, theirs.table.token_effects, strict=True):
        for effects, of_kind in zip(run, expected_run, strict=True):
            assert effects.kind == of_kind.kind
            near(effects.direct_effect, of_kind.direct_effect, direct)
            near(effects.total_effect, of_kind.total_effect, total)
    for scores, expected_scores in zip(ours.top_tokens, theirs.top_tokens, strict=True):
        same_scores(scores, expected_scores)
    for part in ("output", "input", "key_input", "sources"):
        read, right = (
            {node: getattr(read_out, part) for node, read_out in each.read_outs.items()}
            for each in (ours, theirs)
        )
        largest = max((abs(score) for each in right.values() for _, score in each), default=0.0)
        for node in read.keys() & right.keys():
            same_scores(read[node], right[node], largest)
    assert bool(ours.read_outs) == bool(theirs.read_outs)
    assert ours.starts.keys() == theirs.starts.keys()
    for sublayer, start in ours.starts.items():
        near(start, theirs.starts[sublayer])


def size_of(explanation: Explanation, column: Column) -> float:
    """Sum of the absolute values of a column, remainder rows included."""
    nodes = sum(float(group.column(column).abs().sum()) for group in explanation.groups)
    return nodes + sum(map(abs, explanation.remainder.values()))


def same_explanation(ours: Explanation, theirs: Explanation) -> None:
    near([ours.value], [theirs.value], float(theirs.logits.abs().max()))
    assert ours.notices == theirs.notices
    near(ours.logits, theirs.logits)
    same_receipts(ours.receipts, theirs.receipts)
    assert ours.remainder.keys() == theirs.remainder.keys()
    size = size_of(theirs, Column.DIRECT_EFFECT)
    for name, value in ours.remainder.items():
        near([value], [theirs.remainder[name]], size)
    for mine, other in zip(ours.views, theirs.views, strict=True):
        assert mine.dictionary == other.dictionary
        near(
            [mine.latents, mine.bias, mine.error, mine.site],
            [other.latents, other.bias, other.error, other.site],
        )
    for group, expected in zip(ours.groups, theirs.groups, strict=True):
        assert group.size == expected.size
        assert group.address(0) == expected.address(0)
    for column in COLUMNS:
        nodes, expected_nodes = (
            torch.cat([group.column(column) for group in each.groups]) for each in (ours, theirs)
        )
        near(nodes, expected_nodes)


def same_rows(ours: AttributeResult, theirs: AttributeResult, ranking: Ranking) -> None:
    """The same nodes but for ties, each with the values that it has in the other's run."""
    explanations = RememberingBatches.explanations_of(theirs)
    sides = ("values", "compare")[: len(explanations)]
    for side, explanation in zip(sides, explanations, strict=True):
        largest = [
            max(float(group.column(column).abs().max()) for group in explanation.groups)
            for column in COLUMNS
        ]
        for row in ours.table.rows:
            found, expected = getattr(row, side), values_of(explanation, row.node)
            assert (found is None) == (expected is None)
            if expected is not None:
                for value, right, size in zip(numbers(found), expected, largest, strict=True):
                    near([value], [right], size)
    if ranking.column is not None and not ranking.per_kind and len(sides) == 1:
        place = COLUMNS.index(ranking.column)
        mine, others = (
            [abs(numbers(row.values)[place]) for row in each.table.rows] for each in (ours, theirs)
        )
        near(mine, others)


def values_of(explanation: Explanation, node: Address) -> list[float] | None:
    for group in explanation.groups:
        first = group.address(0)
        if (first.kind, first.layer, first.dictionary) == (node.kind, node.layer, node.dictionary):
            index = group.find(node)
            return None if index is None else group.gather(torch.tensor([index]))[0].tolist()
    raise LookupError(f"{node} is in no group")


def numbers(values: NodeValues | None) -> list[float]:
    assert values is not None
    return [values.activation, values.write_magnitude, values.direct_effect, values.total_effect]


def same_scores(
    ours: Sequence[tuple[int, float]], theirs: Sequence[tuple[int, float]], size: float = 0.0
) -> None:
    """The same scores in the same order; the same tokens but for ties."""
    near([abs(score) for _, score in ours], [abs(score) for _, score in theirs], size)
    expected = dict(theirs)
    shared = [(score, expected[token]) for token, score in ours if token in expected]
    near([score for score, _ in shared], [right for _, right in shared], size)
    least = min((abs(score) for _, score in theirs), default=0.0)
    tied = [abs(score) for token, score in ours if token not in expected]
    near(tied, [least] * len(tied), size)


def same_receipts(ours: Sequence[Receipt], theirs: Sequence[Receipt]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine.target, mine.sites, mine.positions) == (
            other.target,
            other.sites,
            other.positions,
        )
        # Small values and differences have the rounding of the stream, whose numbers are around 1.
        near(
            [mine.delta_norm, mine.before or 0.0, mine.after or 0.0],
            [other.delta_norm, other.before or 0.0, other.after or 0.0],
            1.0,
        )


def same_run(ours: RunResult, theirs: RunResult) -> None:
    same_predictions(ours.next_tokens, theirs.next_tokens)
    same_receipts(ours.receipts, theirs.receipts)
    for mine, other in zip(ours.lens, theirs.lens, strict=True):
        same_predictions(mine, other)
    for values, expected in zip(ours.activations, theirs.activations, strict=True):
        near(values, expected)


def same_predictions(ours: Sequence[NextTokens], theirs: Sequence[NextTokens]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.position == other.position
        for part in ("top", "named"):
            for value in ("logit", "probability"):
                same_scores(
                    [(each.token_id, getattr(each, value)) for each in getattr(mine, part)],
                    [(each.token_id, getattr(each, value)) for each in getattr(other, part)],
                )
