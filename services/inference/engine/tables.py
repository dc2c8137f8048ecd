"""From explanations to the rows a user sees: selection, matching of two runs, totals."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from services.common.addresses import Address, Kind
from services.common.errors import FailedPrecondition
from services.inference.engine.attribution import Explanation
from services.inference.engine.columns import COLUMNS, Column, NodeGroup
from services.inference.engine.numerics import precise
from services.inference.engine.ranking import Selection, select


@dataclass(frozen=True)
class NodeValues:
    """The columns of one node in one run."""

    activation: float
    write_magnitude: float
    direct_effect: float
    total_effect: float


@dataclass(frozen=True)
class NodeRow:
    """A listed node; None where it does not exist in that run."""

    node: Address
    values: NodeValues | None
    compare: NodeValues | None


@dataclass(frozen=True)
class Totals:
    """Sums of the direct-effect column: listed + unlisted + remainder = J."""

    listed: float
    unlisted: float
    remainder: float


@dataclass(frozen=True)
class TokenEffects:
    """Effects per token, summed over all nodes of a kind."""

    kind: str
    direct_effect: tuple[float, ...]
    total_effect: tuple[float, ...]


@dataclass(frozen=True)
class Ranking:
    """How rows are picked: by one column, or by each (None); k in all, or k per kind of node."""

    column: Column | None
    top_k: int
    per_kind: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of one run or a pair, with the totals of each run."""

    rows: tuple[NodeRow, ...]
    totals: tuple[Totals, ...]
    token_effects: tuple[tuple[TokenEffects, ...], ...]


class Part:
    """What one run gives to a table, as numbers: its pass is needed while they are taken, and for
    no longer."""

    def __init__(self, explanation: Explanation, ranking: Ranking) -> None:
        found: dict[Address, None] = {}
        for selection in _selections(explanation.groups, ranking):
            for number, index in zip(selection.groups, selection.indices, strict=True):
                found[explanation.groups[number].address(int(index))] = None
        self.selected = tuple(found)
        """Its own top nodes."""
        self.values: dict[Address, NodeValues | None] = {}
        """Of the nodes gathered so far; None where one does not exist in this run."""
        self.token_effects = _token_effects(explanation.groups)
        self._direct = sum(group.direct_total() for group in explanation.groups)
        self._remainder = sum(explanation.remainder.values())
        self._outside = {view.dictionary for view in explanation.views}

    def gather(self, explanation: Explanation, nodes: Sequence[Address]) -> None:
        """Takes the columns of some nodes from the run's explanation."""
        self.values |= zip(nodes, _gather(explanation, nodes), strict=True)

    @property
    def totals(self) -> Totals:
        listed = sum(
            each.direct_effect
            for node, each in self.values.items()
            if each is not None and node.dictionary not in self._outside
        )
        return Totals(listed, self._direct - listed, self._remainder)


def build(explanations: Sequence[Explanation], ranking: Ranking) -> Table:
    """Lists the union of each run's top nodes, largest first in either run, ties by address.

    `explanations` is one run, or a run and the one it is compared with.
    """
    parts = [Part(explanation, ranking) for explanation in explanations]
    nodes = union(parts)
    for part, explanation in zip(parts, explanations, strict=True):
        part.gather(explanation, nodes)
    return joined(parts, ranking)


def union(parts: Sequence[Part]) -> list[Address]:
    """The nodes that any of the runs has selected."""
    return list(dict.fromkeys(node for part in parts for node in part.selected))


def joined(parts: Sequence[Part], ranking: Ranking) -> Table:
    """The table of one run or two that have gathered all nodes of their union."""
    nodes = union(parts)
    values = [[part.values[node] for node in nodes] for part in parts]
    rows = [
        NodeRow(node, values[0][row], values[1][row] if len(values) > 1 else None)
        for row, node in enumerate(nodes)
    ]
    rows.sort(key=lambda row: _place(row, ranking.column))
    return Table(
        rows=tuple(rows),
        totals=tuple(part.totals for part in parts),
        token_effects=tuple(part.token_effects for part in parts),
    )


_ATTRIBUTE = {
    Column.ACTIVATION: "activation",
    Column.WRITE_MAGNITUDE: "write_magnitude",
    Column.DIRECT_EFFECT: "direct_effect",
    Column.TOTAL_EFFECT: "total_effect",
}


def _place(row: NodeRow, column: Column | None) -> tuple[float, str, str, int, int, int, int]:
    name = _ATTRIBUTE[column or Column.TOTAL_EFFECT]
    present = [values for values in (row.values, row.compare) if values is not None]
    node = row.node
    numbers = (node.layer, node.index, node.position, node.key)
    layer, index, position, key = (-1 if number is None else number for number in numbers)
    magnitude = max(abs(getattr(values, name)) for values in present)
    return -magnitude, node.kind.value, node.dictionary, layer, index, position, key


def _selections(groups: Sequence[NodeGroup], ranking: Ranking) -> list[Selection]:
    columns = COLUMNS if ranking.column is None else (ranking.column,)
    kinds: list[list[int]] = [list(range(len(groups)))]
    if ranking.per_kind:
        by_kind: dict[Kind, list[int]] = {}
        for number, group in enumerate(groups):
            by_kind.setdefault(group.address(0).kind, []).append(number)
        kinds = list(by_kind.values())
    selections = []
    for numbers in kinds:
        for column in columns:
            picked = select([groups[number] for number in numbers], column, ranking.top_k)
            selections.append(Selection(np.array(numbers)[picked.groups], picked.indices))
    return selections


def _gather(explanation: Explanation, nodes: Sequence[Address]) -> list[NodeValues | None]:
    """The columns of each node, None where it does not exist in this run."""
    by_group: dict[tuple[Kind, int | None, str], int] = {}
    for number, group in enumerate(explanation.groups):
        example = group.address(0)
        by_group[example.kind, example.layer, example.dictionary] = number
    wanted: dict[int, list[tuple[int, int]]] = {}
    for row, node in enumerate(nodes):
        number = by_group[node.kind, node.layer, node.dictionary]
        index = explanation.groups[number].find(node)
        if index is not None:
            wanted.setdefault(number, []).append((row, index))
    found: list[NodeValues | None] = [None] * len(nodes)
    for number, places in wanted.items():
        group = explanation.groups[number]
        indices = torch.tensor([index for _, index in places], device=group.device)
        columns = precise(group.gather(indices)).cpu()
        if not torch.isfinite(columns).all():
            raise FailedPrecondition(
                f"values of {group.address(places[0][1]).component} are not finite",
                reason="NON_FINITE",
            )
        for (row, _), numbers in zip(places, columns.tolist(), strict=True):
            found[row] = NodeValues(*numbers)
    return found


def _token_effects(groups: Sequence[NodeGroup]) -> tuple[TokenEffects, ...]:
    sums: dict[str, list[torch.Tensor]] = {}
    for group in groups:
        for kind, (direct, total) in group.token_effects().items():
            if kind in sums:
                sums[kind][0] = sums[kind][0] + direct
                sums[kind][1] = sums[kind][1] + total
            else:
                sums[kind] = [direct, total]
    return tuple(
        TokenEffects(kind, tuple(direct.tolist()), tuple(total.tolist()))
        for kind, (direct, total) in sums.items()
    )
