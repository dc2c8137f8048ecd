"""The hooked forward pass is Hugging Face's own, and edits do what hooks written by hand do."""

import pytest
import torch

from services.common.addresses import parse
from services.common.errors import Cancelled, DeadlineExceeded, FailedPrecondition
from services.inference.engine.cancellation import CancelToken
from services.inference.engine.forward import Row
from services.inference.engine.interventions import Edit, Intervention, SetValue, Zero, resolve
from tests.inference.helpers import plain_edits, random_engine, random_model

IDS = (3, 17, 4, 4, 25, 60, 8, 1)


def edits(*wanted: Intervention, tokens: int = len(IDS)) -> tuple[Edit, ...]:
    return resolve(wanted, random_engine().architecture.shape, tokens)


def close(left: torch.Tensor, right: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return bool((left - right).abs().max() <= tolerance * right.abs().max())


@pytest.mark.parametrize("gradients", [False, True])
def test_logits_equal_hugging_face_with_all_hooks_in_place(gradients: bool) -> None:
    engine = random_engine()
    row = Row(IDS, final_norm_frozen=gradients, block_norms_frozen=gradients)
    ours = engine.hooks.run([row], range(len(IDS)), gradients=gradients).logits
    theirs = random_model()(torch.tensor([IDS])).logits
    assert close(ours, theirs)
    assert not close(ours.roll(1, dims=1), theirs)  # the comparison can fail


def test_attention_is_causal() -> None:
    site = random_engine().hooks.run([Row(IDS)], [0], gradients=False).attention[0]
    assert site.probabilities.triu(1).abs().max() == 0
    assert torch.allclose(site.probabilities.sum(-1), torch.ones(1, 4, len(IDS)))


def test_probabilities_captured_are_those_the_values_are_summed_with() -> None:
    model = random_model()
    z: list[torch.Tensor] = []
    model.transformer.h[1].attn.c_proj.register_forward_pre_hook(
        lambda module, args: z.append(args[0])
    )
    model(torch.tensor([IDS]))
    site = random_engine().hooks.run([Row(IDS)], [0], gradients=False).attention[1]
    summed = (site.used(0) @ site.values[0]).transpose(0, 1).reshape(1, len(IDS), -1)
    assert close(summed, z[0])


CASES = {
    "neuron": (
        Intervention(parse("neuron.1.7~3"), SetValue(2.5)),
        {"neurons": {1: lambda a: _put(a, (0, 3, 7), 2.5)}},
    ),
    "neuron at positions": (
        Intervention(parse("neuron.0.7"), Zero(), (2, 5)),
        {"neurons": {0: lambda a: _put(a, (0, [2, 5], 7), 0.0)}},
    ),
    "neuron everywhere": (
        Intervention(parse("neuron.2.9"), Zero()),
        {"neurons": {2: lambda a: _put(a, (0, slice(None), 9), 0.0)}},
    ),
    "pair": (
        Intervention(parse("head.1.2~6-3"), Zero()),
        {"probabilities": {1: lambda p: _put(p, (0, 2, 6, 3), 0.0)}},
    ),
    "pair set": (
        Intervention(parse("head.0.3~7-0"), SetValue(0.9)),
        {"probabilities": {0: lambda p: _put(p, (0, 3, 7, 0), 0.9)}},
    ),
    "row": (
        Intervention(parse("head.1.0~4"), Zero()),
        {"probabilities": {1: lambda p: _put(p, (0, 0, 4), 0.0)}},
    ),
    "head at positions": (
        Intervention(parse("head.2.1"), Zero(), (1, 7)),
        {"probabilities": {2: lambda p: _put(p, (0, 1, [1, 7]), 0.0)}},
    ),
    "head everywhere": (
        Intervention(parse("head.0.1"), Zero()),
        {"probabilities": {0: lambda p: _put(p, (0, 1), 0.0)}},
    ),
}


def _put(values: torch.Tensor, where: tuple[object, ...], value: float) -> torch.Tensor:
    changed = values.clone()
    changed[where] = value  # type: ignore[index]
    return changed


@pytest.mark.parametrize("name", CASES)
def test_an_edit_does_what_a_plain_hook_does(name: str) -> None:
    intervention, by_hand = CASES[name]
    engine, plain = random_engine(), random_model()
    row = Row(IDS, edits(intervention))
    ours = engine.hooks.run([row], range(len(IDS)), gradients=False).logits
    with plain_edits(plain, **by_hand):  # type: ignore[arg-type]
        theirs = plain(torch.tensor([IDS])).logits
    assert close(ours, theirs)
    assert not close(ours, plain(torch.tensor([IDS])).logits)  # the edit did something


def test_edits_of_one_pass_compose() -> None:
    wanted = [intervention for intervention, _ in CASES.values()]
    plain = random_model()
    ours = random_engine().hooks.run([Row(IDS, edits(*wanted))], [7], gradients=False).logits
    neurons = {
        0: lambda a: _put(a, (0, [2, 5], 7), 0.0),
        1: lambda a: _put(a, (0, 3, 7), 2.5),
        2: lambda a: _put(a, (0, slice(None), 9), 0.0),
    }
    probabilities = {
        0: lambda p: _put(_put(p, (0, 3, 7, 0), 0.9), (0, 1), 0.0),
        1: lambda p: _put(_put(p, (0, 2, 6, 3), 0.0), (0, 0, 4), 0.0),
        2: lambda p: _put(p, (0, 1, [1, 7]), 0.0),
    }
    with plain_edits(plain, neurons=neurons, probabilities=probabilities):
        theirs = plain(torch.tensor([IDS])).logits[:, 7:]
    assert close(ours, theirs)


def test_rows_of_a_padded_batch_do_not_touch_each_other() -> None:
    engine = random_engine()
    rows = [
        Row(IDS, edits(Intervention(parse("head.1.2~6-3"), SetValue(0.7)))),
        Row(IDS[:3], edits(Intervention(parse("neuron.1.7"), SetValue(3.0)), tokens=3)),
        Row(IDS[2:]),
        Row((9,), edits(Intervention(parse("head.0.0~0"), Zero()), tokens=1)),
    ]
    batch = engine.hooks.run(rows, range(len(IDS)), gradients=False).logits
    for number, row in enumerate(rows):
        alone = engine.hooks.run([row], range(len(row.token_ids)), gradients=False).logits
        assert close(batch[number, : len(row.token_ids)], alone[0])


def test_receipts_say_what_was_changed() -> None:
    engine = random_engine()
    clean = engine.hooks.run([Row(IDS)], [0], gradients=False)
    row = Row(
        IDS,
        edits(
            Intervention(parse("neuron.1.7~3"), SetValue(2.5)),
            Intervention(parse("neuron.0.2"), Zero(), (1, 4)),
            Intervention(parse("head.0.3~5"), Zero()),
            Intervention(parse("head.0.1~5-2"), SetValue(0.5)),
        ),
    )
    current = engine.hooks.run([row], [0], gradients=False)
    scalar, two, whole_row, pair = current.receipts(0)
    assert scalar.after == 2.5
    assert scalar.delta_norm == pytest.approx(abs(2.5 - (scalar.before or 0)))
    before = clean.neurons[0][0, [1, 4], 2]
    assert (two.sites, two.positions, two.applied, two.before) == (2, (1, 4), 2, None)
    assert two.delta_norm == pytest.approx(float(before.norm()), rel=1e-5)
    z = clean.attention[0].used(0)[3, 5] @ clean.attention[0].values[0, 3]
    assert whole_row.delta_norm == pytest.approx(float(z.norm()), rel=1e-5)
    assert pair.before == pytest.approx(float(clean.attention[0].used(0)[1, 5, 2]), rel=1e-5)
    assert pair.after == 0.5


def test_a_huge_value_is_refused_with_the_first_place_that_overflowed() -> None:
    row = Row(IDS, edits(Intervention(parse("neuron.1.7~3"), SetValue(1e38))))
    with pytest.raises(FailedPrecondition, match=r"mlp\.1|resid|attn\.2|mlp\.2") as refusal:
        random_engine().hooks.run([row], [0], gradients=False)
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
