"""Every operation on every target: what a pass written by hand makes of it, sums, gradients."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from services.common.addresses import parse
from services.common.errors import InvalidArgument
from services.inference.engine.attribution import NormMode
from services.inference.engine.captured import Row
from services.inference.engine.columns import Column
from services.inference.engine.interventions import (
    Add,
    Intervention,
    Mask,
    Mean,
    Operation,
    Patch,
    ProjectOut,
    Scale,
    SetTo,
    Source,
    Zero,
)
from services.inference.engine.objectives import LogitDiff
from tests.inference import by_hand, plain
from tests.inference.helpers import (
    FAMILIES,
    HEAD_WIDTH,
    LAYERS,
    WIDTH,
    direct_sums,
    explained,
    in_float64,
    matrices,
    random_model,
    shared_engine,
)

__all__ = ["in_float64"]

IDS = (3, 17, 4, 4, 25, 60, 8, 1)
ALL = range(len(IDS))
TWO = FAMILIES[:2]

VECTORS = {
    width: torch.linspace(-1, 2, width, dtype=torch.float64) for width in (HEAD_WIDTH, WIDTH)
}
PROMPTS = (Source((5, 6, 7)), Source((40, 3, 3, 9, 12)))
EQUAL = tuple(Source(tuple(range(first, first + 9))) for first in (7, 20, 41))
SOURCE = Source(
    (9, 9, 2, 50, 31, 7, 7, 22, 19, 33),
    (
        Intervention(parse("neuron.0.3"), SetTo(2.0)),
        Intervention(parse("head.1.2~8-5"), Mask()),
        Intervention(parse("resid_post.0~4"), Scale(2.0)),
    ),
)
ALIGNMENT = tuple((position, position + 2) for position in ALL)

OPERATIONS: dict[str, Callable[[float | Tensor], Operation]] = {
    "zero": lambda _: Zero(),
    "set": SetTo,
    "scale": lambda _: Scale(-1.5),
    "add": Add,
    "add relative": lambda value: Add(value, relative=True),
    "mean": lambda _: Mean(PROMPTS),
    "mean per position": lambda _: Mean(EQUAL, per_position=True),
    "patch": lambda _: Patch(SOURCE, ALIGNMENT),
    "project_out": lambda value: ProjectOut(torch.as_tensor(value)),
    "mask": lambda _: Mask(),
}
SCALAR = ("zero", "set", "scale", "add", "mean", "mean per position", "patch")
PAIR = ("zero", "set", "scale", "add", "mean per position", "patch", "mask")
VECTOR = (*SCALAR, "add relative", "project_out")


@dataclass(frozen=True)
class Site:
    """A target and what fits it. `width` None: a number."""

    address: str
    width: int | None
    operations: tuple[str, ...]
    positions: tuple[int, ...] | None = None

    def operation(self, name: str) -> Operation:
        return OPERATIONS[name](0.75 if self.width is None else VECTORS[self.width])

    def intervention(self, name: str) -> Intervention:
        return Intervention(parse(self.address), self.operation(name), self.positions)

    def by_hand(self, name: str, model: Any) -> by_hand.Change:
        return by_hand.change(model, self.intervention(name), len(IDS))


def _neuron(address: str, positions: tuple[int, ...] | None = None) -> Site:
    return Site(address, None, SCALAR, positions)


def _head(address: str, positions: tuple[int, ...] | None = None) -> Site:
    return Site(address, HEAD_WIDTH, VECTOR, positions)


def _stream(address: str, positions: tuple[int, ...] | None = None) -> Site:
    return Site(address, WIDTH, VECTOR, positions)


SITES = {
    "neuron": _neuron("neuron.1.7~3"),
    "neuron at positions": _neuron("neuron.0.7", (2, 5)),
    "neuron everywhere": _neuron("neuron.2.9"),
    "pair": Site("head.1.2~6-3", None, PAIR),
    "pair read by J": Site("head.2.1~7-3", None, PAIR),
    "row": _head("head.1.0~4"),
    "row read by J": _head("head.2.0~7"),
    "head at positions": _head("head.2.1", (1, 7)),
    "head everywhere": _head("head.0.1"),
    "query": _head("head.1.3.q~6"),
    "key": _head("head.1.3.k~2"),
    "key of a shared head": _head("head.0.0.k", (1, 3, 5)),
    "value": _head("head.1.2.v~2"),
    "values everywhere": _head("head.2.2.v"),
    "embedding": _stream("embed~1"),
    "resid_pre": _stream("resid_pre.2~5"),
    "attention": _stream("attn.1~4"),
    "attention everywhere": _stream("attn.2"),
    "resid_mid": _stream("resid_mid.1", (2, 3, 7)),
    "mlp": _stream("mlp.0~0"),
    "mlp read by J": _stream("mlp.1~7"),
    "resid_post": _stream("resid_post.0"),
    "last resid_post": _stream(f"resid_post.{LAYERS - 1}~7"),
}


shared_model = cache(random_model)


@cache
def unedited(family: str) -> Tensor:
    return plain.forward(shared_model(family), IDS)


BIASES = {
    "attention's bias": Site("bias.attn.1~4", WIDTH, ("zero", "scale")),
    "MLP's bias": Site("bias.mlp.0", WIDTH, ("zero", "scale")),
    "bias read by J": Site("bias.attn.2", WIDTH, ("zero", "scale"), (3, 7)),
}


def close(left: Tensor, right: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((left - right).abs().max() <= tolerance * right.abs().max())


@pytest.mark.parametrize("name", SITES)
@pytest.mark.parametrize("family", TWO)
def test_every_operation_on_every_target_is_what_it_is_by_hand(family: str, name: str) -> None:
    """All operations on a target are rows of one batch."""
    site, engine, model = SITES[name], shared_engine(family), shared_model(family)
    rows = [
        Row(IDS, engine.edits(site.intervention(operation), tokens=len(IDS)))
        for operation in site.operations
    ]
    logits = engine.hooks.run(rows, ALL, gradients=False).logits
    for operation, ours in zip(site.operations, logits, strict=True):
        theirs = plain.forward(model, IDS, plain.edited(site.by_hand(operation, model)))
        assert close(ours, theirs), operation
        assert not close(ours, unedited(family)), operation  # the edit did something


@pytest.mark.parametrize("name", BIASES)
@pytest.mark.parametrize("family", ["gpt2", "llama-tied"])
def test_edits_of_biases_are_what_they_are_by_hand_and_sums_close(family: str, name: str) -> None:
    site, engine, model = BIASES[name], shared_engine(family), shared_model(family)
    for wanted in ("zero", "scale"):
        intervention = site.intervention(wanted)
        after = Intervention(parse(site.address), Scale(0.5), site.positions)
        edits = engine.edits(intervention, after, tokens=len(IDS))
        (explanation,) = engine.explain(explained(IDS, *edits))
        theirs = plain.forward(model, IDS, by_hand.edited(model, [intervention, after], len(IDS)))
        assert close(explanation.logits, theirs[7]), wanted
        assert not close(explanation.logits, unedited(family)[7]), wanted
        total, size = direct_sums(explanation)
        assert abs(total - explanation.value) <= 1e-5 * size
        assert abs(explanation.remainder["rest"]) <= 1e-5 * size
        receipt, _ = explanation.receipts
        assert receipt.delta_norm > 0


def test_zeroing_a_bias_takes_it_from_the_sum_where_it_is_zeroed() -> None:
    engine = shared_engine()
    rows = []
    for positions in ((3,), (7,), None):
        edits = engine.edits(Intervention(parse("bias.attn.2"), Zero(), positions), tokens=len(IDS))
        (explanation,) = engine.explain(explained(IDS, *edits))
        rows.append(explanation.remainder["bias.attn.2"])
    assert abs(rows[0]) > 1e-3  # J reads token 7 alone
    assert rows[1:] == [0, 0]


def test_a_bias_that_does_not_exist_or_an_operation_that_does_not_fit_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="adds no bias"):
        shared_engine("llama").edits(Intervention(parse("bias.mlp.1"), Zero()), tokens=8)
    for operation in (Mask(), Add(VECTORS[WIDTH]), SetTo(VECTORS[WIDTH]), Mean(EQUAL)):
        with pytest.raises(InvalidArgument, match="what fits: zero or scale"):
            shared_engine().edits(Intervention(parse("bias.mlp.1"), operation), tokens=8)


@pytest.mark.parametrize("name", SITES)
def test_what_does_not_fit_a_target_is_refused_naming_what_does(name: str) -> None:
    site, engine = SITES[name], shared_engine()
    for operation in {"mask", "project_out"} - set(site.operations):
        with pytest.raises(InvalidArgument, match="what fits: zero, set, scale, add") as refusal:
            engine.edits(site.intervention(operation), tokens=len(IDS))
        assert refusal.value.field == f"[0].{operation}"


@pytest.mark.parametrize("name", SITES)
@pytest.mark.parametrize("family", TWO)
def test_sums_close_under_every_operation_on_every_target(family: str, name: str) -> None:
    engine, site = shared_engine(family), SITES[name]
    edits = [
        engine.edits(site.intervention(operation), tokens=len(IDS)) for operation in site.operations
    ]
    explanations = engine.explain(*(explained(IDS, *each) for each in edits))
    for operation, explanation in zip(site.operations, explanations, strict=True):
        total, size = direct_sums(explanation)
        assert abs(total - explanation.value) <= 1e-5 * size, operation
        assert abs(explanation.remainder["rest"]) <= 1e-5 * size, operation


WITH_CONSTANTS = [
    (name, operation)
    for name in SITES
    for operation in ("set", "add", "add relative", "mean", "mean per position", "patch")
    if name in ("row read by J", "values everywhere", "attention everywhere", "mlp read by J")
    or (name != "resid_pre" and "resid" in name)
]


@pytest.mark.parametrize(("name", "operation"), WITH_CONSTANTS)
def test_what_an_edit_writes_is_a_row_without_which_the_sum_does_not_close(
    name: str, operation: str
) -> None:
    engine = shared_engine()
    edits = engine.edits(SITES[name].intervention(operation), tokens=len(IDS))
    (explanation,) = engine.explain(explained(IDS, *edits))
    total, size = direct_sums(explanation)
    rows = {node: value for node, value in explanation.remainder.items() if "edit." in node}
    assert rows
    assert abs(total - sum(rows.values()) - explanation.value) > 1e-4 * size


@pytest.mark.parametrize("name", ["row read by J", "attention everywhere", "last resid_post"])
def test_writes_are_projected_on_the_direct_path(name: str) -> None:
    """A head's direct effect is its write, less the part that the edit downstream removes."""
    engine = shared_engine()
    site = SITES[name]
    edits = engine.edits(site.intervention("project_out"), tokens=len(IDS))
    (explanation,) = engine.explain(explained(IDS, *edits))
    captured = explanation.captured.attention[2]
    head = 0
    pairs = captured.used(0)[head, 7, :, None] * captured.values_per_head(0)[head]
    written = pairs @ engine.architecture.layers[2].w_o[head]
    norm = engine.architecture.final_norm
    direction = torch.zeros_like(engine.architecture.w_u[0])
    direction += engine.architecture.w_u[5]
    direction -= engine.architecture.w_u[[9, 11]].mean(0)
    scale = norm.scale(explanation.captured.final_input[0, 7].detach())
    gradient = norm.frozen_gradient(direction, scale)
    removed = plain.apply(site.operation("project_out"), pairs if "row" in name else written)
    passed = removed @ engine.architecture.layers[2].w_o[head] if "row" in name else removed
    ours = matrices(explanation, Column.DIRECT_EFFECT)[3][head, 7]
    assert close(ours, passed @ gradient)
    assert not close(ours, written @ gradient, 1e-3)


STEP = 1e-5


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize(
    ("name", "operation"),
    [
        ("resid_mid", "project_out"),
        ("head everywhere", "project_out"),
        ("values everywhere", "project_out"),
        ("attention everywhere", "add relative"),
        ("query", "add relative"),
        ("pair", "mask"),
        ("pair read by J", "mask"),
        ("key of a shared head", "scale"),
        ("resid_post", "set"),
        ("resid_mid", "mean"),
        ("head at positions", "mean per position"),
        ("pair", "patch"),
    ],
)
@pytest.mark.parametrize("family", TWO)
def test_gradients_under_edits_are_finite_differences(
    family: str, name: str, operation: str
) -> None:
    """Of the real model; the length that relative steering goes by is held where it was."""
    model, site = shared_model(family, torch.float64), SITES[name]
    engine = shared_engine(family, torch.float64)
    edits = engine.edits(site.intervention(operation), tokens=len(IDS))
    objective = LogitDiff((5,), (9, 11), 7)
    (explanation,) = engine.explain(
        explained(IDS, *edits, objective=objective), norm_mode=NormMode.LIVE
    )
    (applied,) = explanation.captured.applied(0)
    change = site.by_hand(operation, model)
    if operation == "add relative":
        change = (*change[:3], applied.apply)

    def slope(kind: str, layer: int, index: Any) -> float:
        found = []
        for step in (STEP, -STEP):
            nudge = (kind, layer, index, partial(torch.add, torch.tensor(step).double()))
            logits = plain.forward(model, IDS, plain.edited(change, nudge))
            found.append(float(objective.of_logits(logits[7])))
        return (found[0] - found[1]) / (2 * STEP)

    activation = matrices(explanation, Column.ACTIVATION)
    total = matrices(explanation, Column.TOTAL_EFFECT)
    for layer, t, n in ((0, 2, 5), (1, 7, 40), (0, 7, 1)):
        value = float(activation[1 + LAYERS + layer][t, n])
        ours = float(total[1 + LAYERS + layer][t, n])
        expected = value * slope("neurons", layer, (t, n))
        assert ours == pytest.approx(expected, rel=1e-4, abs=1e-8)
    for layer, head, q, k in ((0, 3, 7, 2), (1, 1, 5, 5), (2, 0, 7, 4)):
        value = float(activation[1 + layer][head, q, k])
        ours = float(total[1 + layer][head, q, k])
        expected = value * slope("probabilities", layer, (head, q, k))
        assert ours == pytest.approx(expected, rel=1e-4, abs=1e-8)


def run_edited(family: str, *wanted: Intervention) -> Tensor:
    engine = shared_engine(family)
    row = Row(IDS, engine.edits(*wanted, tokens=len(IDS)))
    return engine.hooks.run([row], ALL, gradients=False).logits[0]


@pytest.mark.parametrize("family", TWO)
def test_masks_of_one_row_add_up_and_edits_of_probabilities_come_after_them(family: str) -> None:
    masks = [Intervention(parse(f"head.1.2~3-{key}"), Mask()) for key in (0, 2, 3)]
    added = Intervention(parse("head.1.2~3-0"), Add(0.5))
    engine = shared_engine(family)
    row = Row(IDS, engine.edits(added, *masks, tokens=len(IDS)))
    current = engine.hooks.run([row], ALL, gradients=False)
    assert current.attention[1].used(0)[2, 3, :4].tolist() == [0.5, 1, 0, 0]
    model = shared_model(family)
    theirs = by_hand.edited(model, [added, *masks], len(IDS))
    assert close(current.logits[0], plain.forward(model, IDS, theirs))


def test_zeroing_a_pair_is_not_masking_it() -> None:
    pair = parse("head.1.2~6-3")
    zeroed = run_edited("gpt2", Intervention(pair, Zero()))
    assert not close(zeroed, run_edited("gpt2", Intervention(pair, Mask())), 1e-3)


def test_a_row_keeps_something_to_attend_to() -> None:
    engine = shared_engine()

    def masks(*pairs: str) -> Sequence[Intervention]:
        return [Intervention(parse(pair), Mask()) for pair in pairs]

    engine.edits(*masks("head.1.2~2-0", "head.1.2~2-2", "head.1.3~2-1"), tokens=3)
    with pytest.raises(InvalidArgument, match="nothing to attend to") as refusal:
        engine.edits(*masks("head.1.2~2-0", "head.1.2~2-2", "head.1.2~2-1"), tokens=3)
    assert refusal.value.field == "[2].target"
    with pytest.raises(InvalidArgument, match="nothing to attend to"):
        engine.edits(*masks("head.0.0~0-0"), tokens=3)
    with pytest.raises(InvalidArgument, match=r"already masked by interventions\[0\]"):
        engine.edits(*masks("head.0.0~2-0", "head.0.0~2-0"), tokens=3)


def test_under_grouped_queries_one_head_alone_is_edited() -> None:
    """Heads 0 and 1 of the llama share keys and values."""
    engine = shared_engine("llama")
    for target in ("head.1.0.k", "head.1.0.v", "head.1.0~5-2"):
        masks = target.endswith("-2")
        wanted = Intervention(parse(target), Mask() if masks else Scale(2.0))
        row = Row(IDS, engine.edits(wanted, tokens=len(IDS)))
        site = engine.hooks.run([row], ALL, gradients=False).attention[1]
        clean = engine.hooks.run([Row(IDS)], ALL, gradients=False).attention[1]
        z, untouched = (each.used(0) @ each.values_per_head(0) for each in (site, clean))
        assert not close(z[0], untouched[0], 1e-3)
        assert close(z[1:], untouched[1:])


def test_receipts_of_masks_projections_and_relative_steering() -> None:
    engine = shared_engine()
    clean = engine.hooks.run([Row(IDS)], [0], gradients=False)
    direction = VECTORS[WIDTH]
    wanted = [
        Intervention(parse("head.0.2~6-3"), Mask()),
        Intervention(parse("embed~2"), ProjectOut(direction)),
        Intervention(parse("embed~4"), Add(2 * direction / direction.norm(), relative=True)),
    ]
    row = Row(IDS, engine.edits(wanted[0], tokens=len(IDS)))
    (mask,) = engine.hooks.run([row], [0], gradients=False).receipts(0)
    before = float(clean.attention[0].used(0)[2, 6, 3])
    assert mask.before == pytest.approx(before, rel=1e-5)
    assert (mask.after, mask.sites, mask.positions) == (0, 1, (6,))
    assert mask.delta_norm == pytest.approx(before, rel=1e-5)
    row = Row(IDS, engine.edits(*wanted[1:], tokens=len(IDS)))
    projected, steered = engine.hooks.run([row], [0], gradients=False).receipts(0)
    embed = clean.embed[0].double()
    assert projected.delta_norm == pytest.approx(
        float((embed[2] @ direction).abs() / direction.norm()), rel=1e-5
    )
    assert steered.delta_norm == pytest.approx(2 * float(embed[4].norm()), rel=1e-5)
    assert steered.before is None
