"""Rows: exactly the top k, ties by address, two runs matched by address, totals that close."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.addresses import Address, parse
from services.inference.engine import tables
from services.inference.engine.attribution import Explanation
from services.inference.engine.columns import COLUMNS, Column
from services.inference.engine.interventions import Intervention, Zero
from services.inference.engine.resolution import resolve
from services.inference.engine.tables import NodeValues, Ranking
from tests.inference.helpers import explained, random_engine

IDS = (3, 17, 4, 4, 25, 60, 8, 1)
NAMES = ("activation", "write_magnitude", "direct_effect", "total_effect")


@pytest.fixture(scope="module")
def pair() -> tuple[Explanation, ...]:
    engine = random_engine()
    ablated = resolve(
        [Intervention(parse("head.1.2"), Zero())],
        engine.architecture.shape,
        engine.architecture.widths,
        len(IDS),
    )
    return engine.explain(explained(IDS, *ablated), explained(IDS[:6]))


def every_node(explanation: Explanation) -> dict[Address, tuple[float, ...]]:
    """All nodes by brute force."""
    found = {}
    for group in explanation.groups:
        columns = torch.stack([group.column(column) for column in COLUMNS], 1).double()
        for index, values in enumerate(columns.tolist()):
            found[group.address(index)] = tuple(values)
    return found


def key(address: Address) -> tuple[object, ...]:
    numbers = (address.layer, address.index, address.position, address.key)
    return (address.kind.value, *(-1 if number is None else number for number in numbers))


def best(nodes: dict[Address, tuple[float, ...]], column: Column, k: int) -> list[Address]:
    place = COLUMNS.index(column)
    return sorted(nodes, key=lambda node: (-abs(nodes[node][place]), key(node)))[:k]


@pytest.mark.parametrize("column", Column)
@pytest.mark.parametrize("k", [1, 7, 50, 10_000])
def test_rows_are_the_brute_force_top_k(
    column: Column, k: int, pair: tuple[Explanation, ...]
) -> None:
    nodes = every_node(pair[0])
    table = tables.build(pair[:1], Ranking(column, k))
    assert [row.node for row in table.rows] == best(nodes, column, k)
    assert len(table.rows) == min(k, len(nodes))
    for row in table.rows:
        assert row.values is not None
        values = tuple(getattr(row.values, name) for name in NAMES)
        assert values == pytest.approx(nodes[row.node], rel=1e-5, abs=1e-9)
        assert row.compare is None


def test_all_nodes_that_exist_are_counted(pair: tuple[Explanation, ...]) -> None:
    tokens, heads, neurons, layers = 8, 4, 64, 3
    pairs = tokens * (tokens + 1) // 2
    table = tables.build(pair[:1], Ranking(Column.TOTAL_EFFECT, 100_000))
    assert len(table.rows) == tokens + layers * (heads * pairs + neurons * tokens)
    assert all(
        row.node.key is None or row.node.key <= (row.node.position or 0) for row in table.rows
    )


def test_per_kind_gives_k_of_each_kind(pair: tuple[Explanation, ...]) -> None:
    table = tables.build(pair[:1], Ranking(Column.TOTAL_EFFECT, 3, per_kind=True))
    kinds = [row.node.kind.value for row in table.rows]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {"embed": 3, "head": 3, "neuron": 3}


def test_each_is_the_union_of_every_columns_top(pair: tuple[Explanation, ...]) -> None:
    nodes = every_node(pair[0])
    table = tables.build(pair[:1], Ranking(None, 5))
    assert {row.node for row in table.rows} == {
        node for column in Column for node in best(nodes, column, 5)
    }


def test_two_runs_list_the_union_with_both_values(pair: tuple[Explanation, ...]) -> None:
    first, second = every_node(pair[0]), every_node(pair[1])
    table = tables.build(pair, Ranking(Column.TOTAL_EFFECT, 20))
    wanted = {*best(first, Column.TOTAL_EFFECT, 20), *best(second, Column.TOTAL_EFFECT, 20)}
    assert {row.node for row in table.rows} == wanted
    for row in table.rows:
        for values, nodes in ((row.values, first), (row.compare, second)):
            if row.node not in nodes:
                assert values is None
            else:
                assert isinstance(values, NodeValues)
                assert values.total_effect == pytest.approx(nodes[row.node][3], rel=1e-4, abs=1e-7)
    assert any(row.compare is None for row in table.rows)  # tokens the shorter prompt lacks


@pytest.mark.parametrize("k", [1, 25, 10_000])
def test_totals_close_whatever_is_listed(k: int, pair: tuple[Explanation, ...]) -> None:
    table = tables.build(pair, Ranking(Column.DIRECT_EFFECT, k))
    for totals, explanation in zip(table.totals, pair, strict=True):
        total = totals.listed + totals.unlisted + totals.remainder
        assert total == pytest.approx(explanation.value, abs=1e-4)
    if k == 10_000:
        assert table.totals[0].unlisted == pytest.approx(0, abs=1e-4)


def test_token_effects_are_sums_over_nodes(pair: tuple[Explanation, ...]) -> None:
    nodes = every_node(pair[0])
    table = tables.build(pair[:1], Ranking(Column.TOTAL_EFFECT, 1))
    effects = {each.kind: each for each in table.token_effects[0]}
    assert list(effects) == ["embed", "attn_reading", "attn_source", "mlp"]
    for kind, node_kind, part in (
        ("embed", "embed", "position"),
        ("mlp", "neuron", "position"),
        ("attn_reading", "head", "position"),
        ("attn_source", "head", "key"),
    ):
        for token in range(len(IDS)):
            wanted = [
                values
                for node, values in nodes.items()
                if node.kind.value == node_kind and getattr(node, part) == token
            ]
            direct, total = (sum(values[place] for values in wanted) for place in (2, 3))
            assert effects[kind].direct_effect[token] == pytest.approx(direct, abs=1e-4)
            assert effects[kind].total_effect[token] == pytest.approx(total, abs=1e-4)


class _Fixed:
    """A group of given values whose address order is the reverse of its flat order."""

    def order(self, indices: torch.Tensor) -> torch.Tensor:
        return -indices


@settings(max_examples=200)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.integers(1, 50))
def test_ties_are_broken_by_address(values: Sequence[int], k: int) -> None:
    from services.inference.engine.ranking import top_indices

    found = top_indices(torch.tensor(values, dtype=torch.float32), k, _Fixed())  # type: ignore[arg-type]
    wanted = sorted(range(len(values)), key=lambda index: (-abs(values[index]), -index))[:k]
    assert set(found.tolist()) == set(wanted)
    assert len(found) == min(k, len(values))
