"""Token patterns: their text form, what they hold for, and finding them in examples."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.errors import InvalidArgument
from services.explainer.engine.components import Component, Example, TextScore
from services.explainer.engine.explainers import token_pattern
from services.explainer.engine.explanations import MAX_CHARACTERS, Method
from services.explainer.engine.offline_simulator import OfflineSimulator
from services.explainer.engine.scorers import detection, head_pairs, simulation
from services.explainer.engine.scores import Measure
from services.explainer.engine.splits import split_pairs, split_tokens
from services.explainer.engine.token_patterns import (
    Condition,
    Relation,
    Rule,
    TokenPattern,
    token_conditions,
)
from tests.explainer import synthetic

WITHOUT_TEXT = [Relation.ANY, Relation.FIRST, Relation.REPEATED, Relation.SELF, Relation.NUMBER]
conditions = st.one_of(
    st.builds(Condition, st.sampled_from(WITHOUT_TEXT)),
    st.builds(
        Condition,
        st.sampled_from([Relation.TOKEN, Relation.PREVIOUS, Relation.TO, Relation.NEAR]),
        st.text(),
    ),
)
rules = st.builds(
    Rule,
    st.lists(conditions, min_size=1, max_size=3).map(tuple),
    st.integers(0, 100).map(lambda tenths: tenths / 10),
)
patterns = st.builds(
    TokenPattern, st.lists(rules, max_size=4).map(tuple), st.lists(st.text(), max_size=3).map(tuple)
)


@settings(max_examples=50, deadline=None)
@given(patterns)
def test_text_form_is_read_back(pattern: TokenPattern) -> None:
    assert TokenPattern.parse(str(pattern)) == pattern


@pytest.mark.parametrize(
    "text",
    [
        "",
        "names",
        "Fires on nothing found",
        "Fires on .",
        'Fires on the token "a" (11).',
        'Fires on the token "a" (-1).',
        'Fires on the token "a".',
        "Fires on the token a (1).",
        'Fires on the token "a (1).',
        'Fires on the token "a" (1), .',
        'Fires on the token "a" (1). And more.',
        'Fires on the token "a" (1). Promotes .',
        "Fires on the token 5 (1).",
        'Fires on sometimes the token "a" (1).',
    ],
)
def test_what_is_no_pattern_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match="not a token pattern") as refused:
        TokenPattern.parse(text)
    assert refused.value.field == "text"


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ('the token " Mary"', [0, 0, 1, 0, 0, 0, 1]),
        ('any form of "mary"', [0, 0, 1, 0, 1, 0, 1]),
        ('after " and"', [0, 0, 1, 0, 0, 0, 0]),
        ('the token " Mary" after " and"', [0, 0, 1, 0, 0, 0, 0]),
        ('the token " Mary" shortly after "Tom"', [0, 0, 1, 0, 0, 0, 1]),
        ("a number", [0, 0, 0, 1, 0, 0, 0]),
        ("a capitalised word", [1, 0, 1, 0, 0, 0, 1]),
        ("punctuation", [0, 0, 0, 0, 0, 1, 0]),
        ("the first token", [1, 0, 0, 0, 0, 0, 0]),
        ("a token that occurred before", [0, 0, 0, 0, 0, 0, 1]),
        ('a word ending in "ry"', [0, 0, 1, 0, 1, 0, 1]),
        ("any token", [1, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_where_conditions_hold(rule: str, expected: list[int]) -> None:
    texts = ("Tom", " and", " Mary", " 17", " mary", ".", " Mary")
    assert TokenPattern.parse(f"Fires on {rule} (1).").on_tokens(texts) == expected


def test_conditions_look_back_only() -> None:
    """A causal model cannot know what comes."""
    whole = list(token_conditions((" a", " b", " a", " c")))
    assert whole[:2] == list(token_conditions((" a", " b")))


@pytest.mark.parametrize(
    ("rule", "pairs"),
    [
        ("to itself", {(0, 0), (1, 1), (2, 2), (3, 3)}),
        ("to the token before", {(1, 0), (2, 1), (3, 2)}),
        ("to the first token", {(0, 0), (1, 0), (2, 0), (3, 0)}),
        ("to an earlier copy of itself", {(2, 0)}),
        ("to the token after an earlier copy of itself", {(2, 1)}),
        ('from " a" to " b"', {(2, 1)}),
        ('to " b"', {(1, 1), (2, 1), (3, 1)}),
    ],
)
def test_where_pair_conditions_hold(rule: str, pairs: set[tuple[int, int]]) -> None:
    texts = (" a", " b", " a", " c")
    pattern = TokenPattern.parse(f"Fires on {rule} (1).")
    found = {(q, k) for q in range(4) for k in range(q + 1) if pattern.on_pair(texts, q, k)}
    assert found == pairs


def test_the_first_rule_that_holds_decides() -> None:
    pattern = TokenPattern.parse('Fires on the token "a" after "b" (2), the token "a" (9).')
    assert pattern.on_tokens(("a", "b", "a")) == [9, 0, 2]


PLANTED = [
    (
        'Fires on the token " Mary" (10), the token " John" after " and" (5).',
        (" Mary", " and| John", " John"),
    ),
    ('Fires on any form of "mary" (10).', (" Mary", " mary", "Mary", "MARY")),
    ('Fires on after " Mr" (10).', (" Mr| Smith", " Mr| Jones", " Mr| Box", " Mr| Hill")),
    ("Fires on a number (10).", tuple(f" {number}" for number in range(40))),
    (
        'Fires on a word ending in "ing" (10).',
        (" running", " eating", " singing", " walking", " boring"),
    ),
    (
        'Fires on the token " store" shortly after " Mary" (10).',
        (" Mary| to| the| store", " store"),
    ),
]


@pytest.mark.parametrize(("hidden", "extra"), PLANTED)
async def test_planted_behaviour_is_found(hidden: str, extra: tuple[str, ...]) -> None:
    component = synthetic.component(hidden, extra=extra)
    split = split_tokens(component, seed=1)
    made = token_pattern(component, split)
    assert made.method is Method.TOKEN_PATTERN
    assert made.provenance.documents == split.explaining.documents
    judge = OfflineSimulator()
    scores = [
        *await detection(made, split, judge, seed=2),
        *await simulation(made, split, judge, seed=2),
    ]
    found = {score.measure: score.value or 0.0 for score in scores}
    assert found[Measure.AUC] > 0.9, made.text
    assert found[Measure.PEARSON] > 0.8, made.text


async def test_what_is_learnt_from_noise_is_at_chance() -> None:
    """Activations that have nothing to do with the text: whatever is found is worth nothing."""
    draw = random.Random(1)
    examples = []
    for number in range(120):
        activations = [0.0] * 24
        activations[draw.randrange(24)] = float(number % 2)
        examples.append(
            Example(
                token_texts=synthetic.texts(number),
                activations=tuple(activations),
                document_id=f"doc-{number}",
            )
        )
    component = Component(address="neuron.0.0", examples=tuple(examples))
    split = split_tokens(component, seed=1)
    made = token_pattern(component, split)
    scores = await detection(made, split, OfflineSimulator(), seed=2)
    assert all(0.25 < (score.value or 0) < 0.75 for score in scores)


async def test_a_heads_behaviour_is_found() -> None:
    head = synthetic.head()
    split = split_pairs(head, seed=1)
    made = token_pattern(head, split)
    for score in await head_pairs(made, split, OfflineSimulator(), seed=2):
        assert (score.value or 0) > 0.9, made.text
    induction = synthetic.head("Looks to the token after an earlier copy of itself (10).")
    assert "after an earlier copy" in token_pattern(induction, split_pairs(induction, seed=1)).text


def test_the_text_depends_on_seed_and_examples_only() -> None:
    component = synthetic.component()
    turned = Component(
        address=component.address,
        examples=tuple(reversed(component.examples)),  # type: ignore[arg-type]
        max_activation=component.max_activation,
    )
    split = split_tokens(component, seed=1)
    made = token_pattern(component, split)
    assert made == token_pattern(turned, split_tokens(turned, seed=1))


def test_what_is_promoted_is_said_and_long_tokens_fit() -> None:
    examples = synthetic.component().examples
    promoted = (TextScore(" store", 2.0), TextScore("x" * 3000, 1.0), TextScore(" not", -1.0))
    component = Component(address="neuron.1.7", examples=examples, promoted=promoted[::2])
    split = split_tokens(component, seed=1)
    assert TokenPattern.parse(token_pattern(component, split).text).promoted == (" store",)
    component = Component(address="neuron.1.7", examples=examples, promoted=promoted)
    made = token_pattern(component, split)
    assert len(made.text) <= MAX_CHARACTERS
    assert TokenPattern.parse(made.text).rules
