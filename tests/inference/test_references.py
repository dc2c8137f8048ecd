"""MEAN and PATCH: which values of which other runs, in as few passes as possible, and refusals."""

from collections.abc import Sequence

import pytest
import torch

from services.common.addresses import Shape, parse
from services.common.errors import InvalidArgument
from services.inference.engine.cancellation import CancelToken
from services.inference.engine.captured import Pass, Row
from services.inference.engine.interventions import (
    Add,
    Borrow,
    Intervention,
    Mean,
    Operation,
    Patch,
    Scale,
    SetTo,
    Source,
    Zero,
)
from services.inference.engine.resolution import resolve
from services.inference.engine.targets import Widths
from tests.inference import by_hand, plain
from tests.inference.helpers import (
    FAMILIES,
    direct_sums,
    explained,
    random_engine,
    random_model,
    shared_engine,
)

IDS = (3, 17, 4, 4, 25, 60, 8, 1)
ALL = range(len(IDS))


def run(family: str, *wanted: Intervention) -> tuple[Pass, torch.Tensor]:
    """The engine's pass and the logits of the pass written by hand."""
    engine, model = shared_engine(family), random_model(family)
    row = Row(IDS, engine.edits(*wanted, tokens=len(IDS)))
    theirs = plain.forward(model, IDS, by_hand.edited(model, wanted, len(IDS)))
    return engine.hooks.run([row], ALL, gradients=False), theirs


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("family", FAMILIES[:2])
def test_a_patched_run_may_be_patched_itself(family: str) -> None:
    inner = Source((1, 2, 3, 4, 5), (Intervention(parse("neuron.0.3"), SetTo(4.0)),))
    middle = Source(
        (30, 31, 32),
        (
            Intervention(parse("resid_post.0~2"), Patch(inner, ((2, 4), (0, 1)))),
            Intervention(parse("mlp.1"), Mean((Source((9, 8)), Source((7,))))),
        ),
    )
    wanted = [
        Intervention(parse("attn.1~6"), Patch(middle, ((6, 2),))),
        Intervention(parse("head.2.1"), Patch(middle, ((3, 1), (7, 1))), (3, 7)),
        Intervention(parse("head.1.2~5-4"), Patch(middle, ((5, 2), (4, 0)))),
    ]
    current, theirs = run(family, *wanted)
    assert_close(current.logits[0], theirs)
    changed, other = run(family, *wanted[:2])
    assert_close(changed.logits[0], other)
    assert (changed.logits - current.logits).abs().max() > 1e-4


def test_the_mean_counts_every_token_of_every_prompt_once() -> None:
    """The prompts are of unequal length: a mean of the prompts' means would be another."""
    engine = shared_engine()
    prompts = (Source((5, 6, 7, 8)), Source((40,)))
    wanted = Intervention(parse("neuron.1.7~3"), Mean(prompts))
    row = Row(IDS, engine.edits(wanted, tokens=len(IDS)))
    (receipt,) = engine.hooks.run([row], [0], gradients=False).receipts(0)
    rows = [Row(each.token_ids) for each in prompts]
    neurons = engine.hooks.run(rows, [0], gradients=False).neurons[1][..., 7]
    mean = (neurons[0].sum() + neurons[1, 0]) / 5
    assert receipt.after == pytest.approx(float(mean), rel=1e-5)
    assert receipt.after != pytest.approx(float(neurons[0].mean() + neurons[1, 0]) / 2, rel=1e-3)


def test_a_pair_of_a_zeroed_row_is_patched_as_zero() -> None:
    zeroed = Source(IDS, (Intervention(parse("head.1.2~6"), Zero()),))
    current, _ = run("gpt2", Intervention(parse("head.1.2~6-3"), Patch(zeroed)))
    (receipt,) = current.receipts(0)
    assert receipt.before
    assert receipt.after == 0


def test_what_comes_after_in_the_source_run_is_not_in_its_value() -> None:
    """A row that is scaled in the source is patched scaled; its sublayer's edit comes later."""
    source = Source(
        IDS,
        (
            Intervention(parse("attn.1~6"), Zero()),
            Intervention(parse("head.1.2~6"), Scale(3.0)),
        ),
    )
    engine = shared_engine()
    plain_source = Source(IDS, (Intervention(parse("head.1.2~6"), Scale(3.0)),))
    logits = [
        engine.hooks.run(
            [
                Row(
                    IDS,
                    engine.edits(Intervention(parse("head.1.2~6"), Patch(each)), tokens=len(IDS)),
                )
            ],
            [7],
            gradients=False,
        ).logits
        for each in (source, plain_source)
    ]
    assert torch.equal(*logits)


def test_one_run_is_read_once_for_all_that_is_taken_from_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = random_engine()
    batches: list[int] = []
    run = engine.hooks.run

    def counted(rows: Sequence[Row], *args: object, **kwargs: object) -> Pass:
        batches.append(len(rows))
        return run(rows, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(engine.hooks, "run", counted)
    prompts = tuple(Source((number, number + 1)) for number in range(5))
    source = Source(IDS, (Intervention(parse("embed"), Scale(2.0)),))
    wanted = [Intervention(parse(f"head.1.{head}"), Mean(prompts)) for head in range(3)]
    wanted += [Intervention(parse(f"mlp.{layer}"), Patch(source)) for layer in range(3)]
    edits = engine.edits(*wanted, tokens=len(IDS))
    filled = engine.hooks.fill(edits, CancelToken())
    assert batches == [6]
    assert not any(isinstance(edit.operation, Borrow) for edit in filled)
    assert engine.hooks.fill(filled, CancelToken()) == filled
    assert batches == [6]


def test_long_reference_sets_are_read_in_several_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.inference.engine.references.TOKENS_PER_BATCH", 8)
    prompts = tuple(Source(tuple(range(length))) for length in (5, 1, 9, 3, 2, 4))
    current, theirs = run("llama", Intervention(parse("resid_mid.1~3"), Mean(prompts)))
    assert_close(current.logits[0], theirs)


def test_borrowed_constants_are_rows_and_hold_in_the_backward_pass() -> None:
    engine = shared_engine()
    source = Source(tuple(reversed(IDS)))
    wanted = [
        Intervention(parse("resid_mid.2~7"), Patch(source)),
        Intervention(parse("head.2.0.v"), Mean((source,))),
    ]
    (explanation,) = engine.explain(explained(IDS, *engine.edits(*wanted, tokens=len(IDS))))
    total, size = direct_sums(explanation)
    assert abs(total - explanation.value) <= 1e-5 * size
    assert "edit.resid_mid.2~7" in explanation.remainder
    assert abs(explanation.remainder["edit.resid_mid.2~7"]) > 1e-3 * size


SOURCE = Source(tuple(range(5)))
REFUSED: dict[str, tuple[str, Operation, tuple[int, ...] | None, str, str]] = {
    "no prompts": ("neuron.0.1", Mean(()), None, "mean.prompts", "at least one reference prompt"),
    "mean of a pair": (
        "head.0.1~3-2",
        Mean((SOURCE,)),
        None,
        "mean.per_position",
        "at its own positions only",
    ),
    "unequal prompts": (
        "neuron.0.1",
        Mean((SOURCE, Source((1, 2))), per_position=True),
        None,
        "mean.prompts",
        "these have 2, 5",
    ),
    "no mean at a position": (
        "neuron.0.1",
        Mean((SOURCE,), per_position=True),
        (1, 6),
        "mean.prompts",
        "position 6 is edited, but the reference prompts have 5 tokens",
    ),
    "unequal lengths": (
        "neuron.0.1~2",
        Patch(SOURCE),
        None,
        "patch.alignment",
        "this prompt has 8 tokens and the source 5",
    ),
    "an edited position that is not aligned": (
        "neuron.0.1",
        Patch(SOURCE, ((0, 0), (1, 1))),
        (1, 4),
        "patch.alignment",
        "position 4 stands for no token of the source",
    ),
    "a key that is not aligned": (
        "head.0.1~3-2",
        Patch(SOURCE, ((3, 3),)),
        None,
        "patch.alignment",
        "position 2 stands for no token",
    ),
    "a pair that is masked in the source": (
        "head.0.1~3-2",
        Patch(SOURCE, ((3, 1), (2, 4))),
        None,
        "patch.alignment",
        "query 1 and key 4 of the source, a masked pair",
    ),
    "to out of range": (
        "neuron.0.1~2",
        Patch(SOURCE, ((2, 2), (8, 1))),
        None,
        "patch.alignment[1].to",
        "position 8 does not exist; valid is 0..7",
    ),
    "source out of range": (
        "neuron.0.1~2",
        Patch(SOURCE, ((2, 5),)),
        None,
        "patch.alignment[0].source",
        "position 5 does not exist; valid is 0..4",
    ),
    "aligned twice": (
        "neuron.0.1~2",
        Patch(SOURCE, ((2, 2), (2, 3))),
        None,
        "patch.alignment[1].to",
        "position 2 is aligned twice",
    ),
    "a bad edit in the source": (
        "neuron.0.1~2",
        Patch(Source(IDS, (Intervention(parse("neuron.9.1"), Zero()),))),
        None,
        "patch.source.interventions[0].target",
        "layer 9 does not exist",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_field_and_what_is_wrong(name: str) -> None:
    address, operation, positions, field, sentence = REFUSED[name]
    with pytest.raises(InvalidArgument, match=sentence.split("[")[0]) as refusal:
        shared_engine().edits(Intervention(parse(address), operation, positions), tokens=len(IDS))
    assert refusal.value.field == f"[0].{field}"
    assert sentence in refusal.value.message


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("neuron.1.2~3", "neuron.1.2"),
        ("head.1.2", "head.1.2~5-1"),
        ("head.1.2~5-1", "head.1.2~5-1"),
        ("head.1.2.k", "head.1.2.k~0"),
        ("resid_pre.1~2", "resid_post.0"),
    ],
)
def test_two_operations_that_set_one_scalar_refuse_each_other(first: str, second: str) -> None:
    engine = shared_engine()

    def wanted(address: str, operation: Operation) -> Intervention:
        return Intervention(parse(address), operation)

    source = Source(IDS)
    setting: list[Operation] = [Zero(), Patch(source), Mean((source,), per_position=True)]
    for left in setting:
        for right in setting:
            with pytest.raises(InvalidArgument, match=r"already set by interventions\[0\]"):
                engine.edits(wanted(first, left), wanted(second, right), tokens=len(IDS))
        for other in (Scale(2.0), Scale(0.5)):
            engine.edits(wanted(first, left), wanted(second, other), tokens=len(IDS))
    engine.edits(wanted("neuron.0.1", Add(1.0)), wanted("neuron.0.1", Add(1.0)), tokens=len(IDS))


def test_masks_and_patches_of_pairs_know_the_sliding_window() -> None:
    shape = Shape(layers=1, heads=1, neurons=1, windows=(3,))
    source = Source(IDS)

    def edits(address: str, operation: Operation) -> None:
        resolve([Intervention(parse(address), operation)], shape, Widths(4, 4), len(IDS))

    edits("head.0.0~5-3", Patch(source))
    with pytest.raises(InvalidArgument, match="sliding window"):
        edits("head.0.0~5-2", Patch(source))
    with pytest.raises(InvalidArgument, match="sliding window") as refusal:
        edits("head.0.0~5-3", Patch(source, ((5, 6), (3, 1))))
    assert refusal.value.field == "[0].patch.alignment"
