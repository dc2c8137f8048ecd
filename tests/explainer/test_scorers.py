"""Scores of explanations whose worth is known, by the offline simulator and by a model."""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from services.common.errors import FailedPrecondition, InvalidArgument
from services.explainer.engine.budget import Budget, BudgetExceeded, Ledger
from services.explainer.engine.components import Component, Example, HeadExample
from services.explainer.engine.explainers import token_pattern
from services.explainer.engine.explanations import Explanation
from services.explainer.engine.intervention import intervention
from services.explainer.engine.judges import Judge
from services.explainer.engine.offline_simulator import OfflineSimulator
from services.explainer.engine.provider import Reply, TokenLogprobs
from services.explainer.engine.provider_judge import ProviderJudge, expected_numbers
from services.explainer.engine.replies import FailureKind
from services.explainer.engine.scorers import detection, fuzzing, head_pairs, simulation
from services.explainer.engine.scores import Measure, Score
from services.explainer.engine.splits import Half, Split, split_pairs, split_tokens
from tests.explainer import synthetic
from tests.explainer.openai_server import Fault, OpenAIServer, Said
from tests.explainer.test_provider import provider

NEURON = synthetic.component()
HEAD = synthetic.head()
RIGHT, WRONG = synthetic.explanation(synthetic.NAMES), synthetic.explanation(synthetic.COLOURS)
BOTH = (detection, fuzzing)


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with OpenAIServer(synthetic.follower()) as running:
        yield running


def by_measure(scores: Sequence[Score]) -> dict[Measure, Score]:
    return {score.measure: score for score in scores}


def interval(score: Score) -> tuple[float, float, float]:
    assert score.low is not None
    assert score.value is not None
    assert score.high is not None
    return score.low, score.value, score.high


def near_chance(score: Score) -> bool:
    assert score.value is not None
    return abs(score.value - score.measure.chance) < 0.15


@pytest.mark.parametrize("score", BOTH)
async def test_a_perfect_explanation_scores_one_and_another_ones_chance(score: Any) -> None:
    split = split_tokens(NEURON, seed=1)
    right = await score(RIGHT, split, OfflineSimulator(), seed=2)
    wrong = await score(WRONG, split, OfflineSimulator(), seed=2)
    for each in right:
        assert (each.value, each.low, each.high, each.failed) == (1.0, 1.0, 1.0, 0)
        assert each.n >= 20
        assert (each.judge, each.seed) == ("offline", 2)
    assert all(near_chance(each) for each in wrong)
    for each in wrong:
        low, _, high = interval(each)
        assert high - low > 0.02


async def test_simulation_of_a_perfect_and_of_anothers_explanation() -> None:
    split = split_tokens(NEURON, seed=1)
    right = by_measure(await simulation(RIGHT, split, OfflineSimulator(), seed=2))
    wrong = by_measure(await simulation(WRONG, split, OfflineSimulator(), seed=2))
    assert right[Measure.PEARSON].value == pytest.approx(1.0)
    assert right[Measure.EXPLAINED_VARIANCE].value == pytest.approx(1.0)
    assert near_chance(wrong[Measure.PEARSON])
    assert interval(wrong[Measure.EXPLAINED_VARIANCE])[1] < 0.1
    assert right[Measure.PEARSON].n == 40


async def test_a_half_right_explanation_lies_between() -> None:
    half = synthetic.explanation('Fires on the token " Mary" (10).')
    split = split_tokens(NEURON, seed=1)
    for score, measure in ((detection, Measure.AUC), (simulation, Measure.PEARSON)):
        found = by_measure(await score(half, split, OfflineSimulator(), seed=2))[measure]
        low, value, high = interval(found)
        assert measure.chance + 0.1 < value < 0.999
        assert low < value < high


async def test_heads_by_pairs() -> None:
    split = split_pairs(HEAD, seed=1)
    right = synthetic.explanation(synthetic.HEAD, component=HEAD.address)
    wrong = synthetic.explanation('Looks from " tree" to " tree" (10).', component=HEAD.address)
    for each in await head_pairs(right, split, OfflineSimulator(), seed=2):
        assert each.value == 1.0
        assert each.n >= 20
    assert all(
        near_chance(each) for each in await head_pairs(wrong, split, OfflineSimulator(), seed=2)
    )


async def test_a_model_that_understands_scores_like_the_offline_simulator(
    server: OpenAIServer,
) -> None:
    neuron, head = split_tokens(NEURON, seed=1), split_pairs(HEAD, seed=1)
    of_head = synthetic.explanation(synthetic.HEAD, component=HEAD.address)
    ledger = Ledger()
    async with provider(server) as asked:
        judge = ProviderJudge(asked, ledger)
        found = [
            *await detection(RIGHT, neuron, judge, seed=2),
            *await fuzzing(RIGHT, neuron, judge, seed=2),
            *await simulation(RIGHT, neuron, judge, seed=2, count=5),
            *await head_pairs(of_head, head, judge, seed=2),
        ]
        wrong = [
            *await detection(WRONG, neuron, judge, seed=2),
            *await fuzzing(WRONG, neuron, judge, seed=2),
        ]
    assert [each.value for each in found] == pytest.approx([1.0] * 8)
    assert all(each.failed == 0 and each.judge == "test-model" for each in found)
    assert all(near_chance(each) for each in wrong)
    assert ledger.calls == len(server.requests) > 20


async def test_the_last_batch_need_not_be_full(server: OpenAIServer) -> None:
    split = split_tokens(NEURON, seed=1)
    async with provider(server) as asked:
        (score, _) = await detection(
            RIGHT, split, ProviderJudge(asked, Ledger(), batch=6), seed=2, count=4
        )
    assert [len(synthetic.enclosed(body, "data")) for body in server.requests] in ([6, 2], [2, 6])
    assert (score.n, score.failed, score.value) == (8, 0, 1.0)


async def test_failures_are_counted_whatever_they_are(server: OpenAIServer) -> None:
    follow = synthetic.follower()
    said = iter(
        [
            Said(refusal="no"),
            Said('{"answers": [', finish="length"),
            Said('{"answers": []}'),
            Said('{"answers": [{"id": 1, "grade": 11}]}'),
        ]
    )
    server.model = lambda body: next(said, None) or follow(body)
    split = split_tokens(NEURON, seed=1)
    async with provider(server) as asked:
        judge = ProviderJudge(asked, Ledger())
        (score, _) = await detection(RIGHT, split, judge, seed=2)
    assert score.failures == {
        FailureKind.REFUSED: 5,
        FailureKind.TRUNCATED: 5,
        FailureKind.MALFORMED: 10,
    }
    assert (score.n, score.failed, score.value) == (20, 20, 1.0)


async def test_answers_to_other_questions_are_no_answers(server: OpenAIServer) -> None:
    """A number too few, one twice, one that was not asked: positions would shift silently."""
    for said in ("[1, 2]", "[1, 2, 2]", "[1, 2, 4]", "[0, 1, 2]"):
        ids = [int(each) for each in said.strip("[]").split(",")]
        body = json.dumps({"answers": [{"id": each, "grade": 9} for each in ids]})
        server.faults.append(Fault(reply=body))
        async with provider(server) as asked:
            judge = ProviderJudge(asked, Ledger())
            found = await judge.detect(RIGHT, [("a",), ("b",), ("c",)], seed=0)
        assert found == [FailureKind.MALFORMED] * 3


async def test_answers_in_another_order_are_put_right(server: OpenAIServer) -> None:
    server.model = lambda _: '{"answers": [{"id": 2, "grade": 9}, {"id": 1, "grade": 1}]}'
    async with provider(server) as asked:
        found = await ProviderJudge(asked, Ledger()).detect(RIGHT, [("a",), ("b",)], seed=0)
    assert found == [0.1, 0.9]


async def test_logprobs_make_grades_finer(server: OpenAIServer) -> None:
    server.model = synthetic.follower(spread=True)
    texts = [(" Mary",), (" cat",)]
    async with provider(server) as asked:
        found = await ProviderJudge(asked, Ledger()).detect(RIGHT, texts, seed=0)
        simulated = await ProviderJudge(asked, Ledger()).simulate(RIGHT, (" a", " Mary"), seed=0)
    assert found == pytest.approx([0.75 * 1.0 + 0.25 * 0.9, 0.25 * 0.1])
    assert simulated == pytest.approx([0.25, 9.75])
    server.unsupported = {"logprobs"}
    async with provider(server) as asked:
        found = await ProviderJudge(asked, Ledger()).detect(RIGHT, texts, seed=0)
    assert found == [1.0, 0.0]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (['{"grade":', "7", "}"], [0.5 * 7 + 0.5 * 2]),
        (['{"grade":', " 7", "}"], [0.5 * 7 + 0.5 * 2]),
        (['{"grade":7', "}"], [7.0]),
        (['{"grade":', "1", "0", "}"], [10.0]),
        (['{"gra', 'de" : ', "7", "}"], [0.5 * 7 + 0.5 * 2]),
    ],
)
def test_expected_numbers(tokens: list[str], expected: list[float]) -> None:
    half = float(np.log(0.4))
    said = tuple(
        TokenLogprobs(each, ((each, half), (" 2", half), ("x", -1.6), ("11", -1.6)))
        for each in tokens
    )
    reply = Reply("".join(tokens), said)
    assert expected_numbers(reply, "grade") == pytest.approx(expected)
    assert expected_numbers(replace(reply, text=reply.text + " "), "grade") is None
    assert expected_numbers(Reply(reply.text), "grade") is None


class Fixed:
    """A judge that says what it is told to."""

    name = "fixed"

    def __init__(self, said: dict[str, Any]) -> None:
        self.said = said

    async def detect(self, explanation: Explanation, texts: Any, *, seed: int) -> Any:
        return [self.said["".join(text)] for text in texts]

    async def fuzz(self, explanation: Explanation, texts: Any, *, seed: int) -> Any:
        raise AssertionError("no scorer tested with this judge asks for it")

    async def simulate(self, explanation: Explanation, text: Any, *, seed: int) -> Any:
        return self.said["".join(text)]

    async def compare(self, explanation: Explanation, first: str, second: str, *, seed: int) -> Any:
        return self.said[first]

    async def relate(self, explanation: Explanation, pairs: Any, *, seed: int) -> Any:
        raise AssertionError("no scorer tested with this judge asks for it")


def example(text: str, *activations: float) -> Example:
    return Example(
        token_texts=tuple(text), activations=tuple(activations), document_id=f"doc {text}"
    )


def fixed_split(active: Sequence[Example], quiet: Sequence[Example]) -> Split[Example]:
    """A split whose halves are what the test says; a line is fitted on `x` and `y`."""
    explaining = Half((example("x", 2.0),), (example("y", 0.0),), frozenset({"doc x", "doc y"}))
    documents = frozenset(each.document_id for each in (*active, *quiet))
    return Split("neuron.1.7", explaining, Half(tuple(active), tuple(quiet), documents), 8.0, 0)


async def test_detection_by_hand() -> None:
    split = fixed_split(
        [example("a", 8.0), example("b", 6.0), example("c", 4.0)],
        [example("d", 0.0), example("e", 0.0), example("f", 0.0)],
    )
    judge = Fixed({"a": 0.9, "b": 0.7, "c": 0.2, "d": 0.3, "e": 0.1, "f": FailureKind.REFUSED})
    found = by_measure(await detection(RIGHT, split, judge, seed=0))
    # Right: a, b of three; d, e of two. Pairs in order: a and b before d and e, c before e only.
    assert found[Measure.BALANCED_ACCURACY].value == pytest.approx((2 / 3 + 1) / 2)
    assert found[Measure.AUC].value == pytest.approx(5 / 6)
    assert found[Measure.AUC].n == 5
    assert found[Measure.AUC].failures == {FailureKind.REFUSED: 1}


async def test_simulation_by_hand() -> None:
    split = fixed_split(
        [example("ab", 4.0, 0.0), example("cd", 8.0, 2.0)],
        [example("ef", 0.0, 0.0), example("gh", 0.0, 0.0)],
    )
    judge = Fixed(
        {
            "ab": [5.0, 1.0],
            "cd": [8.0, 2.0],
            "ef": [0.0, 2.0],
            "gh": FailureKind.MALFORMED,
            "x": [5.0],
            "y": [1.0],
        }
    )
    found = by_measure(await simulation(RIGHT, split, judge, seed=0))
    expected = [5.0, 1.0, 8.0, 2.0, 0.0, 2.0]
    actual = [4.0, 0.0, 8.0, 2.0, 0.0, 0.0]
    assert found[Measure.PEARSON].value == pytest.approx(np.corrcoef(expected, actual)[0, 1])
    assert (found[Measure.PEARSON].n, found[Measure.PEARSON].failed) == (3, 1)
    # The line through (5, 2) and (1, 0) is (e - 1) / 2: errors 2, 0, 4.5, 1.5, -0.5 -> 0.5, 0.5.
    errors = [4 - 2, 0 - 0, 8 - 3.5, 2 - 0.5, 0 + 0.5, 0 - 0.5]
    spread = [value - sum(actual) / 6 for value in actual]
    wanted = 1 - sum(e * e for e in errors) / sum(s * s for s in spread)
    assert found[Measure.EXPLAINED_VARIANCE].value == pytest.approx(wanted)


async def steered(prompt: str) -> tuple[str, str]:
    return {
        "1": (" went to the store", " sat down"),
        "2": (" store store", " a store"),
        "3": (" sat", " sat"),
        "4": (" sat", " store"),
    }[prompt]


@pytest.mark.parametrize("seed", range(5))
async def test_intervention_by_hand(seed: int, server: OpenAIServer) -> None:
    offline = await intervention(
        RIGHT, ["1", "2", "3", "4"], steered, OfflineSimulator(), seed=seed
    )
    assert offline.value == (1 + 1 + 0.5 + 0) / 4
    assert (offline.n, offline.failed, offline.measure) == (4, 0, Measure.ACCURACY)
    low, value, high = interval(offline)
    assert low <= value <= high
    async with provider(server) as asked:
        judge = ProviderJudge(asked, ledger := Ledger())
        asked_model = await intervention(RIGHT, ["1", "2", "3", "4"], steered, judge, seed=seed)
    assert asked_model.value == offline.value
    assert ledger.calls == 3, "texts that are the same are not asked about"


async def test_who_always_says_the_first_is_at_chance() -> None:
    prompts = [str(number) for number in range(200)]

    async def generate(prompt: str) -> tuple[str, str]:
        return f"s{prompt}", f"u{prompt}"

    always = Fixed({f"{side}{prompt}": 1.0 for side in "su" for prompt in prompts})
    score = await intervention(RIGHT, prompts, generate, always, seed=0)
    assert near_chance(score)
    low, _, high = interval(score)
    assert low < 0.5 < high


async def test_steering_needs_a_promise_to_look_for() -> None:
    silent = synthetic.explanation('Fires on the token " Mary" (10).')
    with pytest.raises(FailedPrecondition, match="promotes"):
        await intervention(silent, ["1"], steered, OfflineSimulator(), seed=0)
    with pytest.raises(InvalidArgument):
        await intervention(RIGHT, [], steered, OfflineSimulator(), seed=0)
    with pytest.raises(InvalidArgument):
        await intervention(RIGHT, ["1", "1"], steered, OfflineSimulator(), seed=0)


async def test_fuzzing_marks_as_many_wrong_tokens_anywhere() -> None:
    seen: list[Any] = []

    class Watching(OfflineSimulator):
        async def fuzz(self, explanation: Explanation, texts: Any, *, seed: int) -> Any:
            seen.extend(texts)
            return await super().fuzz(explanation, texts, seed=seed)

    split = split_tokens(NEURON, seed=1)
    await fuzzing(RIGHT, split, Watching(), seed=2)
    right = {each.token_texts: each for each in split.scoring.active}
    wrong_places = set()
    wrong = 0
    for text in seen:
        active = {n for n, value in enumerate(right[text.token_texts].activations) if value > 0}
        if not text.marked & active:
            wrong += 1
            wrong_places |= text.marked
            assert 1 <= len(text.marked) <= len(active)
    assert abs(wrong - len(seen) / 2) <= 1
    assert len(wrong_places) > 8, "no place is preferred"


async def test_the_same_seed_gives_the_same_score_and_no_random_state_is_touched() -> None:
    random.seed(5)
    before = random.getstate()
    split = split_tokens(NEURON, seed=1)
    half = synthetic.explanation('Fires on the token " Mary" (10).')
    first = await detection(half, split, OfflineSimulator(), seed=2)
    assert first == await detection(half, split, OfflineSimulator(), seed=2)
    assert random.getstate() == before


async def test_what_the_explainer_saw_is_not_scored() -> None:
    split = split_tokens(NEURON, seed=1)
    made = token_pattern(NEURON, split)
    assert (await detection(made, split, OfflineSimulator(), seed=2))[0].failed == 0
    other = split_tokens(NEURON, seed=3)
    for score in (*BOTH, simulation):
        with pytest.raises(FailedPrecondition, match="seed of the explanation, 1") as refused:
            await score(made, other, OfflineSimulator(), seed=2)
        assert refused.value.reason == "DOCUMENTS_SHARED"
    stranger = synthetic.explanation(synthetic.NAMES, component="neuron.0.0")
    with pytest.raises(InvalidArgument, match=r"explains neuron\.0\.0"):
        await detection(stranger, split, OfflineSimulator(), seed=2)


async def test_words_need_a_model() -> None:
    words = synthetic.explanation("names of people")
    with pytest.raises(FailedPrecondition, match="token patterns only") as refused:
        await detection(words, split_tokens(NEURON, seed=1), OfflineSimulator(), seed=2)
    assert refused.value.reason == "NEEDS_PROVIDER"


async def test_a_budget_stops_a_scorer(server: OpenAIServer) -> None:
    split = split_tokens(NEURON, seed=1)
    async with provider(server) as asked:
        judge: Judge = ProviderJudge(asked, ledger := Ledger(Budget(max_tokens=4000)))
        with pytest.raises(BudgetExceeded):
            await detection(RIGHT, split, judge, seed=2)
    assert 0 < ledger.tokens <= 4000
    assert len(server.requests) < 8


async def test_an_endpoint_that_is_down_leaves_no_number(server: OpenAIServer) -> None:
    server.faults.extend([Fault(503)] * 1000)
    split = split_tokens(NEURON, seed=1)
    async with provider(server) as asked:
        scores = await simulation(RIGHT, split, ProviderJudge(asked, Ledger()), seed=2, count=2)
    (score,) = scores
    assert (score.value, score.n, score.failures) == (None, 0, {FailureKind.UNAVAILABLE: 4})


def test_a_component_of_one_sort_is_not_taken_for_another() -> None:
    with pytest.raises(InvalidArgument, match="HeadExample"):
        Component(address="head.0.0", examples=NEURON.examples)
    with pytest.raises(InvalidArgument, match="Example"):
        Component(
            address="neuron.0.0",
            examples=(HeadExample(token_texts=("a",), pair_activations=(1.0,)),),
        )
