"""Two compared runs that do not fit into memory together: pass by pass, with the same answer."""

import gc
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from services.common.addresses import parse
from services.common.errors import TdbError
from services.inference.engine import attribution, needs
from services.inference.engine.asked import AskedAttribution, AttributeResult
from services.inference.engine.attribution import ExplainedRun, NormMode
from services.inference.engine.batches import Batches
from services.inference.engine.cancellation import CancelToken
from services.inference.engine.captured import Pass
from services.inference.engine.columns import Column
from services.inference.engine.dictionaries.sites import Point
from services.inference.engine.forward import Hooks
from services.inference.engine.interventions import Intervention, Scale, Zero
from services.inference.engine.objectives import LogitDiff
from services.inference.engine.tables import NodeValues, Ranking
from tests.inference.helpers import LAYERS, VOCABULARY, Engine, random_engine
from tests.inference.planted import random_dictionary

LONG, SHORT = (3, 17, 5, 29, 11, 8, 41, 2, 60), (3, 17, 6, 29, 12)
NAMES = tuple(f"mlp-{layer}" for layer in range(LAYERS))


@pytest.fixture(params=["gpt2", "llama"])
def engine(request: pytest.FixtureRequest) -> Engine:
    dictionaries = [
        random_dictionary(name, Point.MLP_OUT, layer) for layer, name in enumerate(NAMES)
    ]
    return random_engine(request.param, dictionaries=dictionaries)


def pair(
    engine: Engine,
    tokens: Sequence[tuple[int, ...]],
    ranking: Ranking,
    dictionaries: tuple[str, ...] = (),
) -> AskedAttribution:
    edits = [
        engine.edits(Intervention(parse("head.1.2"), Zero()), tokens=len(tokens[0])),
        engine.edits(Intervention(parse("neuron.0.7~2"), Scale(3.0)), tokens=len(tokens[1])),
    ]
    runs = tuple(
        ExplainedRun(ids, own, LogitDiff((5,), (9, 11), len(ids) - 1))
        for ids, own in zip(tokens, edits, strict=True)
    )
    return AskedAttribution(
        runs, NormMode.FINAL_NORM_FROZEN, ranking, 4, dictionaries=dictionaries, sources=2
    )


def answer(engine: Engine, asked: AskedAttribution) -> AttributeResult:
    (found,) = Batches(engine.hooks, VOCABULARY).attribute([asked], CancelToken())
    assert not isinstance(found, TdbError), found
    return found


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Rows of each pass; no pass may live when another one begins."""
    rows: list[int] = []
    alive: list[weakref.ref[Pass]] = []
    run = Hooks.run

    def ran(self: Hooks, batch: Any, *args: Any, **kwargs: Any) -> Pass:
        assert all(each() is None for each in alive)
        current = run(self, batch, *args, **kwargs)
        rows.append(len(batch))
        alive.append(weakref.ref(current))
        return current

    monkeypatch.setattr(Hooks, "run", ran)
    gc.disable()  # what only the collector would free is not free
    yield rows
    gc.enable()
    assert all(each() is None for each in alive)


def numbers(values: NodeValues | None) -> list[float] | None:
    if values is None:
        return None
    return [values.activation, values.write_magnitude, values.direct_effect, values.total_effect]


RANKINGS = {
    "one column": Ranking(Column.TOTAL_EFFECT, 40),
    "each, per kind": Ranking(None, 5, per_kind=True),
}


@pytest.mark.parametrize("name", RANKINGS)
@pytest.mark.parametrize("tokens", [(LONG, SHORT), (SHORT, LONG), (LONG, LONG[::-1])])
@pytest.mark.parametrize("dictionaries", [(), NAMES[:2]])
def test_one_after_the_other_gives_the_same_table(
    engine: Engine,
    passes: list[int],
    tokens: Sequence[tuple[int, ...]],
    name: str,
    dictionaries: tuple[str, ...],
) -> None:
    asked = pair(engine, tokens, RANKINGS[name], dictionaries)
    together = answer(engine, asked)
    assert passes == [2]
    engine.hooks.room.budget = needs.of_attributions(engine.hooks, [asked]) - 1
    apart = answer(engine, asked)
    assert passes == [2, 1, 1, 1]
    ours, theirs = ({row.node: row for row in each.table.rows} for each in (apart, together))
    assert ours.keys() == theirs.keys()
    assert any(row.values is None for row in ours.values()) == (tokens[0] is SHORT)
    for node, row in theirs.items():
        for side in ("values", "compare"):
            expected = numbers(getattr(row, side))
            found = numbers(getattr(ours[node], side))
            assert (found is None) == (expected is None)
            if expected is not None:
                assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)
    for left, right in zip(apart.table.totals, together.table.totals, strict=True):
        assert [left.listed, left.unlisted, left.remainder] == pytest.approx(
            [right.listed, right.unlisted, right.remainder], rel=1e-3, abs=1e-3
        )
    for mine, other in zip(apart.outcomes, together.outcomes, strict=True):
        assert mine.value == pytest.approx(other.value, rel=1e-4, abs=1e-4)
        assert mine.remainder == pytest.approx(other.remainder, rel=1e-3, abs=1e-3)
        assert [each.target for each in mine.receipts] == [each.target for each in other.receipts]
    assert apart.read_outs.keys() == together.read_outs.keys() == theirs.keys()
    for node, read_out in together.read_outs.items():
        scores = [score for _, score in apart.read_outs[node].output]
        assert scores == pytest.approx([score for _, score in read_out.output], rel=1e-3, abs=1e-3)
    for effects, expected_effects in zip(
        apart.table.token_effects, together.table.token_effects, strict=True
    ):
        for sums, expected_sums in zip(effects, expected_effects, strict=True):
            assert sums.kind == expected_sums.kind
            assert sums.total_effect == pytest.approx(
                expected_sums.total_effect, rel=1e-3, abs=1e-3
            )
    for top, expected_top in zip(apart.top_tokens, together.top_tokens, strict=True):
        assert [token for token, _ in top] == [token for token, _ in expected_top]


def test_one_run_is_never_split(engine: Engine, passes: list[int]) -> None:
    asked = pair(engine, (LONG, SHORT), RANKINGS["one column"])
    alone = AskedAttribution(asked.runs[:1], asked.norm_mode, asked.ranking)
    engine.hooks.room.budget = 1
    answer(engine, alone)
    assert passes == [1]


def test_a_pass_is_gone_once_its_answer_is_there(engine: Engine, passes: list[int]) -> None:
    asked = pair(engine, (LONG, SHORT), RANKINGS["one column"])
    kept = [answer(engine, asked) for _ in range(2)]
    assert attribution.Outcome is type(kept[0].outcomes[0])
    assert passes == [2, 2]
