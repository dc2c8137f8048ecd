"""Work in parts that fit: fewer rows at a time, and half of them where memory runs out after all.

Where memory runs out is faked: passes of more rows, or edits, than the test allows raise what
torch's allocators raise.
"""

import gc
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from services.common.addresses import Address, Kind, parse
from services.common.errors import ResourceExhausted, TdbError
from services.inference.engine import (
    baselines,
    estimates,
    integrated,
    needs,
    verification,
    whole_verification,
)
from services.inference.engine.asked import AskedAttribution
from services.inference.engine.attribution import ExplainedRun, NormMode
from services.inference.engine.baselines import Reference
from services.inference.engine.batches import Batches
from services.inference.engine.cancellation import CancelToken
from services.inference.engine.columns import Column
from services.inference.engine.forward import Hooks
from services.inference.engine.interventions import Intervention, Zero
from services.inference.engine.objectives import Along, LogitDiff, Objective
from services.inference.engine.out_of_memory import in_halves
from services.inference.engine.tables import Ranking
from services.inference.engine.verification import Ablation
from tests.inference.helpers import HEADS, LAYERS, WIDTH, Engine, random_engine

IDS = (3, 17, 5, 29, 11, 8, 41)
NODES = tuple(Address(Kind.HEAD, layer, head) for layer in range(LAYERS) for head in range(HEADS))
OBJECTIVES: dict[str, Objective] = {
    "logits": LogitDiff((5,), (9, 11), len(IDS) - 1),
    "along": Along(parse("resid_post.1"), torch.linspace(-1, 1, WIDTH), len(IDS) - 1),
}
CANCEL = CancelToken()


@pytest.fixture
def engine() -> Engine:
    return random_engine("llama")


def ablations(engine: Engine) -> list[Ablation]:
    edits = engine.edits(*(Intervention(node, Zero()) for node in NODES), tokens=len(IDS))
    return [Ablation(node, edit) for node, edit in zip(NODES, edits, strict=True)]


def verified(engine: Engine, objective: Objective) -> tuple[int, dict[Address, float]]:
    """Chunks, and the effect of each node."""
    run = ExplainedRun(IDS, (), objective)
    begun: Any
    if isinstance(objective, LogitDiff):
        begun = verification.begin(engine.hooks, run, ablations(engine), CANCEL)
    else:
        mode = NormMode.FINAL_NORM_FROZEN
        begun = whole_verification.begin(engine.hooks, run, ablations(engine), mode, CANCEL)
    chunks = [begun.chunk(number, CANCEL) for number in range(len(begun.chunks))]
    return len(chunks), {each.node: each.effect for chunk in chunks for each in chunk}


def estimated(engine: Engine) -> tuple[int, list[float]]:
    run = ExplainedRun(IDS, (), OBJECTIVES["logits"])
    edits = [each.edit for each in ablations(engine)]
    parts = list(estimates.parts(engine.hooks, run, edits))
    mode = NormMode.LIVE
    found = [
        estimate
        for part in parts
        for estimate in estimates.estimate(engine.hooks, run, edits[part], mode, CANCEL)
    ]
    return len(parts), found


def integral(engine: Engine) -> tuple[int, list[float]]:
    run = ExplainedRun(IDS, (), OBJECTIVES["logits"])
    nodes = [parse(f"head.1.2~5-{key}") for key in range(6)]
    begun = integrated.begin(engine.hooks, run, nodes, 7, CANCEL)
    for number in range(len(begun.chunks)):
        begun.chunk(number, CANCEL)
    return len(begun.chunks), begun.effects(nodes)


def started(engine: Engine) -> dict[Any, torch.Tensor]:
    runs = tuple((tuple(reversed(IDS[: 3 + number])), ()) for number in range(4))
    reference = Reference(runs, (0, 1, 2))
    return baselines.starts(engine.hooks, reference, CANCEL)


@dataclass
class Failing:
    """Passes of more than `allowed` rows or edits raise; `rows` has those of all that were run."""

    allowed: int
    error: Exception
    rows: list[int]

    def check(self, rows: int) -> None:
        self.rows.append(rows)
        if rows > self.allowed:
            raise self.error


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Failing:
    found = Failing(1000, torch.OutOfMemoryError("CUDA out of memory"), [])
    resume, run = Hooks.resume, Hooks.run

    def resumed(self: Hooks, current: Any, dictionaries: Sequence[str] = ()) -> Any:
        found.check(len(current.rows))
        return resume(self, current, dictionaries)

    def ran(self: Hooks, rows: Any, *args: Any, **kwargs: Any) -> Any:
        found.check(max(len(rows), *(len(row.edits) for row in rows)))
        return run(self, rows, *args, **kwargs)

    monkeypatch.setattr(Hooks, "resume", resumed)
    monkeypatch.setattr(Hooks, "run", ran)
    return found


@pytest.mark.parametrize("name", OBJECTIVES)
def test_verification_in_chunks_that_fit(engine: Engine, failing: Failing, name: str) -> None:
    chunks, whole = verified(engine, OBJECTIVES[name])
    assert max(failing.rows) > 1
    failing.rows.clear()
    engine.hooks.room.budget = 1
    more, parts = verified(engine, OBJECTIVES[name])
    assert more > chunks
    assert max(failing.rows) == 1
    assert parts == pytest.approx(whole, rel=1e-4, abs=1e-4)


def test_the_other_work_in_parts_that_fit(engine: Engine, failing: Failing) -> None:
    whole = estimated(engine), integral(engine), started(engine)
    assert len([rows for rows in failing.rows if rows > 1]) > 2
    failing.rows.clear()
    engine.hooks.room.budget = 1
    parts = estimated(engine), integral(engine), started(engine)
    assert set(failing.rows) == {1}
    for (few, found), (many, again) in zip(whole[:2], parts[:2], strict=True):
        assert few < many
        assert found == pytest.approx(again, rel=1e-4, abs=1e-4)
    for sublayer, values in whole[2].items():
        torch.testing.assert_close(values, parts[2][sublayer], atol=1e-5, rtol=0)


def test_a_budget_between_takes_some_rows_at_a_time(engine: Engine, failing: Failing) -> None:
    failing.rows.clear()
    engine.hooks.room.budget = 800_000
    verified(engine, OBJECTIVES["logits"])
    assert 1 < max(failing.rows) < len(NODES)


OUT_OF_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
)


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["cuda", "cpu"])
@pytest.mark.parametrize(
    "work",
    [
        lambda engine: verified(engine, OBJECTIVES["logits"]),
        lambda engine: verified(engine, OBJECTIVES["along"]),
        estimated,
        integral,
    ],
    ids=["verify", "verify whole", "estimate", "integrate"],
)
def test_out_of_memory_halves_once(
    engine: Engine, failing: Failing, work: Callable[[Engine], Any], error: Exception
) -> None:
    whole = work(engine)
    most = max(failing.rows)
    failing.error = error
    failing.allowed = (most + 1) // 2
    failing.rows.clear()
    again = work(engine)
    assert max(failing.rows) == most  # it was tried, and then in halves
    assert again[0] == whole[0]
    assert again[1] == pytest.approx(whole[1], rel=1e-4, abs=1e-4)
    failing.allowed = most // 4
    with pytest.raises(ResourceExhausted) as refused:
        work(engine)
    assert refused.value.reason == "OUT_OF_MEMORY"
    assert refused.value.retry_after_s


def test_other_errors_are_not_tried_again(engine: Engine, failing: Failing) -> None:
    failing.allowed, failing.error = 1, RuntimeError("device-side assert triggered")
    failing.rows.clear()
    with pytest.raises(RuntimeError, match="device-side"):
        verified(engine, OBJECTIVES["logits"])
    assert [rows for rows in failing.rows if rows > 1][1:] == []


def test_a_single_item_is_tried_once_more() -> None:
    tried: list[int] = []

    def work(items: Sequence[int]) -> list[int]:
        tried.append(len(items))
        if len(tried) == 1:
            raise OUT_OF_MEMORY[0]
        return list(items)

    assert in_halves(work, [4]) == [4]
    assert tried == [1, 1]


def test_what_failed_is_freed_before_the_halves_run() -> None:
    """A traceback that is kept would keep the tensors of the pass."""
    alive: list[Any] = []

    class Tensor:
        pass

    def work(items: Sequence[int]) -> list[int]:
        assert all(reference() is None for reference in alive)
        held = Tensor()
        alive.append(weakref.ref(held))
        if len(items) > 1:
            raise torch.OutOfMemoryError
        return list(items)

    assert in_halves(work, [1, 2]) == [1, 2]


def test_what_stays_between_passes_is_held_while_it_lives(engine: Engine) -> None:
    room, run = engine.hooks.room, ExplainedRun(IDS, (), OBJECTIVES["logits"])
    gc.disable()
    try:
        begun = verification.begin(engine.hooks, run, ablations(engine), CANCEL)
        recorded = room.held
        assert recorded > 0
        nodes = [parse("neuron.1.2~5")]
        other = integrated.begin(engine.hooks, run, nodes, 3, CANCEL)
        assert room.held > 2 * recorded
        begun.chunk(0, CANCEL)
        del begun
        assert room.held >= recorded
        other.chunk(0, CANCEL)
        del other
        assert room.held == 0
    finally:
        gc.enable()


def test_others_wait_for_what_is_held(engine: Engine) -> None:
    """Holders get half of the budget together; a pass what they leave. Alone, each gets all."""
    room, run = engine.hooks.room, ExplainedRun(IDS, (), OBJECTIVES["logits"])
    begun = verification.begin(engine.hooks, run, ablations(engine), CANCEL)
    room.budget = 3 * room.held
    with pytest.raises(ResourceExhausted) as busy:
        integrated.begin(engine.hooks, run, [parse("neuron.1.2~5")], 3, CANCEL)
    assert busy.value.reason == "MEMORY_BUSY"
    assert busy.value.retry_after_s
    table = AskedAttribution((run,), NormMode.LIVE, Ranking(Column.TOTAL_EFFECT, 3))
    batches = Batches(engine.hooks, 61)
    room.budget = needs.of_attributions(engine.hooks, [table]) + room.held - 1
    (refused,) = batches.attribute([table], CANCEL)
    assert isinstance(refused, ResourceExhausted)
    begun.chunk(0, CANCEL)  # what goes on goes on
    del begun
    (answer,) = batches.attribute([table], CANCEL)
    assert not isinstance(answer, TdbError)
    integrated.begin(engine.hooks, run, [parse("neuron.1.2~5")], 3, CANCEL)
