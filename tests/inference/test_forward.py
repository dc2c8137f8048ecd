"""The hooked forward pass is Hugging Face's own, and edits do what a pass written by hand does."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from services.common.addresses import Kind, parse
from services.common.errors import Cancelled, DeadlineExceeded, FailedPrecondition
from services.inference.engine.cancellation import CancelToken
from services.inference.engine.captured import Row
from services.inference.engine.interventions import (
    Add,
    Intervention,
    Operation,
    Scale,
    SetTo,
    Zero,
)
from tests.inference import plain
from tests.inference.helpers import (
    FAMILIES,
    HEAD_WIDTH,
    LAYERS,
    WIDTH,
    random_engine,
    random_model,
)

IDS = (3, 17, 4, 4, 25, 60, 8, 1)
ALL = range(len(IDS))


def close(left: Tensor, right: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((left - right).abs().max() <= tolerance * right.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("gradients", [False, True])
def test_logits_equal_hugging_face_with_all_hooks_in_place(family: str, gradients: bool) -> None:
    row = Row(IDS, final_norm_frozen=gradients, block_norms_frozen=gradients)
    ours = random_engine(family).hooks.run([row], ALL, gradients=gradients).logits
    theirs = random_model(family)(torch.tensor([IDS])).logits
    assert close(ours, theirs)
    assert not close(ours.roll(1, dims=1), theirs)  # the comparison can fail


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pass_written_by_hand_is_hugging_faces(family: str) -> None:
    model = random_model(family)
    assert close(plain.forward(model, IDS), model(torch.tensor([IDS])).logits[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_captured_probabilities_are_causal_and_those_the_values_are_summed_with(
    family: str,
) -> None:
    seen: dict[str, Tensor] = {}

    def remember(kind: str, layer: int | None, values: Tensor) -> Tensor:
        if layer == 1:
            seen[kind] = values
        return values

    plain.forward(random_model(family), IDS, remember)
    site = random_engine(family).hooks.run([Row(IDS)], [0], gradients=False).attention[1]
    assert site.used(0).triu(1).abs().max() == 0
    assert close(site.used(0), seen["probabilities"])
    assert close(site.used(0) @ site.values_per_head(0), seen["z"].transpose(0, 1))


VECTOR = torch.linspace(-1, 2, WIDTH, dtype=torch.float64)
HEAD_VECTOR = torch.linspace(1, -2, HEAD_WIDTH, dtype=torch.float64)

# Every kind of target: address, positions, and the same place in the pass written by hand.
SCALARS: dict[str, tuple[str, tuple[int, ...] | None, tuple[str, int, Any]]] = {
    "neuron": ("neuron.1.7~3", None, ("neurons", 1, (3, 7))),
    "neuron at positions": ("neuron.0.7", (2, 5), ("neurons", 0, ([2, 5], 7))),
    "neuron everywhere": ("neuron.2.9", None, ("neurons", 2, (slice(None), 9))),
    "pair": ("head.1.2~6-3", None, ("probabilities", 1, (2, 6, 3))),
}
VECTORS: dict[str, tuple[str, tuple[int, ...] | None, tuple[str, int | None, Any]]] = {
    "row": ("head.1.0~4", None, ("z", 1, (4, 0))),
    "head at positions": ("head.2.1", (1, 7), ("z", 2, ([1, 7], 1))),
    "head everywhere": ("head.0.1", None, ("z", 0, (slice(None), 1))),
    "query": ("head.1.3.q~6", None, ("q", 1, (3, 6))),
    "key": ("head.1.3.k~2", None, ("k", 1, (3, 2))),
    "key of a shared head": ("head.0.0.k", (1, 3, 5), ("k", 0, (0, [1, 3, 5]))),
    "value": ("head.1.2.v~2", None, ("v", 1, (2, 2))),
    "embedding": ("embed~1", None, ("embed", None, (1,))),
    "resid_pre": ("resid_pre.2~5", None, ("resid_post", 1, (5,))),
    "attention sublayer": ("attn.1~4", None, ("attn", 1, (4,))),
    "resid_mid": ("resid_mid.1", (2, 3), ("resid_mid", 1, ([2, 3],))),
    "mlp sublayer": ("mlp.0~0", None, ("mlp", 0, (0,))),
    "resid_post": ("resid_post.0", None, ("resid_post", 0, slice(None))),
    "last resid_post": (f"resid_post.{LAYERS - 1}~7", None, ("resid_post", LAYERS - 1, (7,))),
}


def operation_named(name: str, width: int | None) -> Operation:
    """An operation on a scalar (None) or on a vector."""
    vector = VECTOR if width == WIDTH else HEAD_VECTOR
    constant: float | Tensor = 0.75 if width is None else vector
    operations: dict[str, Operation] = {
        "zero": Zero(),
        "set": SetTo(constant),
        "scale": Scale(-1.5),
        "add": Add(constant),
    }
    return operations[name]


@pytest.mark.parametrize("operation", ["zero", "set", "scale", "add"])
@pytest.mark.parametrize("name", [*SCALARS, *VECTORS])
@pytest.mark.parametrize("family", FAMILIES[:2])
def test_every_operation_on_every_target_is_what_it_is_by_hand(
    family: str, name: str, operation: str
) -> None:
    address, positions, (kind, layer, index) = {**SCALARS, **VECTORS}[name]
    engine, model = random_engine(family), random_model(family)
    target = parse(address)
    width = None if name in SCALARS else engine.architecture.widths.of(target)
    wanted = operation_named(operation, width)
    change = partial(plain.apply, wanted)
    row = Row(IDS, engine.edits(Intervention(target, wanted, positions), tokens=len(IDS)))
    ours = engine.hooks.run([row], ALL, gradients=False).logits[0]
    theirs = plain.forward(model, IDS, plain.edited((kind, layer, index, change)))
    assert close(ours, theirs)
    assert not close(ours, plain.forward(model, IDS))  # the edit did something


@pytest.mark.parametrize("family", FAMILIES[:2])
def test_edits_of_one_pass_compose_in_request_order(family: str) -> None:
    engine, model = random_engine(family), random_model(family)
    wanted = [
        (Intervention(parse("resid_mid.1~3"), Add(VECTOR)), "resid_mid", 1, (3,)),
        (Intervention(parse("resid_mid.1"), Scale(2.0)), "resid_mid", 1, slice(None)),
        (Intervention(parse("head.1.2~6"), Scale(3.0)), "z", 1, (6, 2)),
        (Intervention(parse("head.1.2~6-3"), Add(0.4)), "probabilities", 1, (2, 6, 3)),
        (Intervention(parse("head.1.2~6"), Add(HEAD_VECTOR)), "z", 1, (6, 2)),
        (Intervention(parse("head.0.1.v~2"), SetTo(HEAD_VECTOR)), "v", 0, (1, 2)),
        (Intervention(parse("neuron.2.9~7"), Add(1.0)), "neurons", 2, (7, 9)),
        (Intervention(parse("neuron.2.9"), Scale(-2.0)), "neurons", 2, (slice(None), 9)),
    ]
    changes = [
        (kind, layer, index, partial(plain.apply, intervention.operation))
        for intervention, kind, layer, index in wanted
    ]
    row = Row(IDS, engine.edits(*(each[0] for each in wanted), tokens=len(IDS)))
    ours = engine.hooks.run([row], ALL, gradients=False).logits[0]
    assert close(ours, plain.forward(model, IDS, plain.edited(*changes)))
    swapped = [changes[1], changes[0], *changes[2:]]
    assert not close(ours, plain.forward(model, IDS, plain.edited(*swapped)))


@pytest.mark.parametrize("family", FAMILIES[:2])
def test_rows_of_a_padded_batch_do_not_touch_each_other(family: str) -> None:
    engine = random_engine(family)

    def row(ids: tuple[int, ...], *wanted: Intervention) -> Row:
        return Row(ids, engine.edits(*wanted, tokens=len(ids)))

    rows = [
        row(IDS, Intervention(parse("head.1.2~6-3"), SetTo(0.7))),
        row(IDS[:3], Intervention(parse("neuron.1.7"), SetTo(3.0))),
        row(IDS[2:]),
        row(IDS[:5], Intervention(parse("head.1.0.k"), Scale(2.0))),
        row(IDS[1:], Intervention(parse("resid_mid.1~2"), Add(VECTOR))),
        row((9,), Intervention(parse("head.0.0~0"), Zero())),
    ]
    batch = engine.hooks.run(rows, ALL, gradients=False).logits
    for number, each in enumerate(rows):
        alone = engine.hooks.run([each], range(len(each.token_ids)), gradients=False).logits
        assert close(batch[number, : len(each.token_ids)], alone[0])


def test_receipts_say_what_was_changed() -> None:
    engine = random_engine()
    clean = engine.hooks.run([Row(IDS)], [0], gradients=False)
    wanted = [
        Intervention(parse("neuron.1.7~3"), SetTo(2.5)),
        Intervention(parse("neuron.0.2"), Zero(), (1, 4)),
        Intervention(parse("head.0.3~5"), Zero()),
        Intervention(parse("head.0.1~5-2"), SetTo(0.5)),
        Intervention(parse("resid_post.2"), Add(VECTOR), (0, 1, 2)),
    ]
    row = Row(IDS, engine.edits(*wanted, tokens=len(IDS)))
    scalar, two, whole_row, pair, steered = engine.hooks.run([row], [0], gradients=False).receipts(
        0
    )
    assert scalar.after == 2.5
    assert scalar.delta_norm == pytest.approx(abs(2.5 - (scalar.before or 0)), rel=1e-5)
    before = clean.neurons[0][0, [1, 4], 2]
    assert (two.sites, two.positions, two.applied, two.before) == (2, (1, 4), 2, None)
    assert two.delta_norm == pytest.approx(float(before.norm()), rel=1e-5)
    z = clean.attention[0].used(0)[3, 5] @ clean.attention[0].values_per_head(0)[3]
    assert whole_row.delta_norm == pytest.approx(float(z.norm()), rel=1e-5)
    assert pair.before == pytest.approx(float(clean.attention[0].used(0)[1, 5, 2]), rel=1e-5)
    assert pair.after == 0.5
    assert steered.delta_norm == pytest.approx(float(VECTOR.norm()) * 3**0.5, rel=1e-5)
    assert steered.target.kind is Kind.RESID_POST


def test_a_huge_value_is_refused_with_the_first_place_that_overflowed() -> None:
    engine = random_engine()
    edits = engine.edits(Intervention(parse("neuron.1.7~3"), SetTo(1e38)), tokens=len(IDS))
    with pytest.raises(FailedPrecondition, match=r"attn\.2|mlp\.2|resid_post") as refusal:
        engine.hooks.run([Row(IDS, edits)], [0], gradients=False)
    assert refusal.value.reason == "NON_FINITE"


def test_cancel_and_deadline_stop_between_layers() -> None:
    engine = random_engine()
    token = CancelToken()
    engine.architecture.layers[1].attention.register_forward_hook(lambda *_: token.cancel())
    reached: list[int] = []
    engine.architecture.layers[2].attention.register_forward_hook(lambda *_: reached.append(2))
    with pytest.raises(Cancelled):
        engine.hooks.run([Row(IDS)], [0], gradients=False, cancel=token)
    assert not reached
    assert engine.hooks.current is None
    with pytest.raises(DeadlineExceeded):
        engine.hooks.run([Row(IDS)], [0], gradients=False, cancel=CancelToken(deadline=0.0))
