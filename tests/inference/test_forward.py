"""The hooked forward pass is Hugging Face's own, and edits do what a pass written by hand does."""

from functools import partial

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
    Scale,
    SetTo,
    Zero,
)
from tests.inference import plain
from tests.inference.helpers import (
    FAMILIES,
    HEAD_WIDTH,
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
