"""No document is on both sides, whatever the examples are called and however they come."""

import random

import pytest

from services.common.errors import FailedPrecondition, InvalidArgument
from services.explainer.engine.components import Component, Example, HeadExample
from services.explainer.engine.splits import Half, split_pairs, split_tokens


def example(text: str, peak: float, document: str, *, length: int = 6) -> Example:
    texts = tuple(f" {text}{number}" for number in range(length))
    values = [0.0] * length
    values[length // 2] = peak
    return Example(token_texts=texts, activations=tuple(values), document_id=document)


def component(*examples: Example) -> Component:
    return Component(address="neuron.0.1", examples=examples)


def plain(seed: int = 0, count: int = 24) -> list[Example]:
    """Two examples of each document, of which half activate the component."""
    return [
        example(f"w{number}x", 10.0 + number if number % 4 < 2 else 0.0, f"d{number // 2}")
        for number in range(count)
    ]


def texts(half: Half[Example]) -> set[tuple[str, ...]]:
    return {each.token_texts for each in (*half.active, *half.quiet)}


@pytest.mark.parametrize("seed", range(20))
def test_halves_share_no_document_and_lose_none(seed: int) -> None:
    split = split_tokens(component(*plain()), seed=seed)
    assert not split.explaining.documents & split.scoring.documents
    assert split.explaining.documents | split.scoring.documents == {f"d{n}" for n in range(12)}
    assert not texts(split.explaining) & texts(split.scoring)
    for half in (split.explaining, split.scoring):
        assert {each.document_id for each in (*half.active, *half.quiet)} <= half.documents
        assert len(half.active) == len(half.quiet) == 6
        peaks = [each.peak for each in half.active]
        assert peaks == sorted(peaks, reverse=True)


def test_what_was_shown_before_is_not_scored() -> None:
    known = component(*plain())
    before = split_tokens(known, seed=1)
    shown = frozenset(sorted(before.scoring.documents)[::3])
    split = split_tokens(known, seed=1, shown=shown)
    assert split.scoring.documents == before.scoring.documents - shown
    assert split.explaining.documents == before.explaining.documents | shown
    # What the same split has shown changes nothing.
    assert split_tokens(known, seed=1, shown=before.explaining.documents) == before
    with pytest.raises(FailedPrecondition, match="that were not shown"):
        split_tokens(known, seed=1, shown=before.scoring.documents)


def test_the_order_of_a_record_decides_nothing_and_the_seed_does() -> None:
    examples = plain()
    shuffled = list(examples)
    random.Random(1).shuffle(shuffled)
    split = split_tokens(component(*examples), seed=5)
    assert split == split_tokens(component(*shuffled), seed=5)
    others = [split_tokens(component(*examples), seed=seed) for seed in range(1, 5)]
    assert any(other.scoring.documents != split.scoring.documents for other in others)
    assert split.seed == 5


def test_no_global_random_state_is_touched() -> None:
    random.seed(3)
    before = random.getstate()
    split_tokens(component(*plain()), seed=5)
    assert random.getstate() == before


@pytest.mark.parametrize("seed", range(10))
def test_the_same_text_is_one_document_under_any_name(seed: int) -> None:
    copies = [example("same", 5.0, f"copy{number}") for number in range(4)]
    split = split_tokens(component(*plain(), *copies), seed=seed)
    sides = [
        any(each.token_texts == copies[0].token_texts for each in half.active)
        for half in (split.explaining, split.scoring)
    ]
    assert sorted(sides) == [False, True]
    names = {f"copy{number}" for number in range(4)}
    side = split.explaining if sides[0] else split.scoring
    assert names <= side.documents


@pytest.mark.parametrize("seed", range(10))
def test_windows_of_an_unnamed_document_stay_together(seed: int) -> None:
    long = tuple(f" t{number}" for number in range(40))
    windows = [
        Example(token_texts=long[at : at + 16], activations=(3.0, *[0.0] * 15))
        for at in (0, 8, 16, 24)
    ]
    split = split_tokens(component(*plain(), *windows), seed=seed)
    explaining = sum(each.token_texts in texts(split.explaining) for each in windows)
    assert explaining in (0, 4), "each overlaps the next"


def test_long_examples_are_cut_around_their_peak() -> None:
    values = [0.0] * 100
    values[70] = 4.0
    long = [
        Example(
            token_texts=tuple(f"{name}{number}" for number in range(100)),
            activations=tuple(values),
            document_id=name,
            document_offset=50,
        )
        for name in "abcd"
    ]
    split = split_tokens(component(*long), seed=0, window=16)
    for half in (split.explaining, split.scoring):
        for each in half.active:
            assert len(each.token_texts) == 16
            assert each.peak_position == 8
            assert each.document_offset == 50 + 62
        assert all(each.peak == 0 and len(each.token_texts) == 16 for each in half.quiet)
        assert {each.document_id for each in half.quiet} <= half.documents


@pytest.mark.parametrize("count", [1, 2, 5, 100])
def test_spread_takes_from_all_strengths(count: int) -> None:
    half = split_tokens(component(*plain()), seed=1).scoring
    spread = half.spread(count)
    assert len(spread) == min(count, 6)
    assert spread[0] == half.active[0]
    if count > 1:
        assert spread[-1] == half.active[-1]


@pytest.mark.parametrize(
    "examples",
    [
        [],
        [example("a", 1.0, "a"), example("b", 0.0, "b"), example("c", 0.0, "c")],
        [example("a", 1.0, "a"), example("b", 1.0, "b"), example("c", 0.0, "c")],
        [example("a", 0.0, "a"), example("b", 0.0, "b"), example("c", -1.0, "c")],
    ],
)
def test_too_few_documents_are_refused(examples: list[Example]) -> None:
    with pytest.raises(FailedPrecondition, match="too few") as refused:
        split_tokens(component(*examples), seed=0)
    assert refused.value.reason == "TOO_FEW_DOCUMENTS"


def test_heads_are_split_whole() -> None:
    examples = tuple(
        HeadExample(
            token_texts=(f"a{number}", "b"),
            pair_activations=(0.0, float(number % 2), 0.0),
            document_id=f"d{number}",
        )
        for number in range(8)
    )
    head = Component(address="head.1.2", examples=examples)
    split = split_pairs(head, seed=0)
    assert not split.explaining.documents & split.scoring.documents
    assert len(split.explaining.active) == len(split.scoring.active) == 2
    with pytest.raises(InvalidArgument):
        split_tokens(head, seed=0)
    with pytest.raises(InvalidArgument):
        split_pairs(component(*plain()), seed=0)


def test_pairs_stand_in_the_records_order() -> None:
    whole = HeadExample(token_texts=("a", "b", "c"), pair_activations=(0, 10, 11, 20, 21, 22))
    assert [(pair.query, pair.key, pair.value) for pair in whole.pairs(range(6))] == [
        (0, 0, 0), (1, 0, 10), (1, 1, 11), (2, 0, 20), (2, 1, 21), (2, 2, 22),
    ]  # fmt: skip
    assert (whole.strongest.query, whole.strongest.key) == (2, 2)
    narrow = HeadExample(
        token_texts=("a", "b", "c"), pair_activations=(0, 10, 11, 21, 22), pair_width=2
    )
    assert [(pair.query, pair.key) for pair in narrow.pairs(range(5))] == [
        (0, 0), (1, 0), (1, 1), (2, 1), (2, 2),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("token_texts", {"token_texts": (), "activations": ()}),
        ("activations", {"activations": (1.0,)}),
        ("activations", {"activations": (1.0, float("nan"))}),
        ("token_ids", {"token_ids": (1,)}),
    ],
)
def test_examples_that_are_not_whole(field: str, change: dict[str, tuple[float, ...]]) -> None:
    given = {"token_texts": ("a", "b"), "activations": (0.0, 1.0), **change}
    with pytest.raises(InvalidArgument) as refused:
        Example(**given)  # type: ignore[arg-type]
    assert refused.value.field == field


@pytest.mark.parametrize("address", ["mlp.0", "neuron.0.1~3", "nonsense"])
def test_only_components_are_explained(address: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        Component(address=address, examples=())
    assert refused.value.field == "address"
