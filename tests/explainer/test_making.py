"""Explaining, scoring and simulating without a language model, over real gRPC."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from tdb import __version__
from tdb.explainer.v1 import explain_pb2, explanation_pb2
from tdb.inference.v1 import component_pb2, manifest_pb2
from tdb.type.v1 import token_pb2

from services.explainer.components import component_of
from services.explainer.engine.components import Component, Example, TextScore
from services.explainer.engine.splits import split_tokens
from tests.explainer import stack, synthetic
from tests.explainer.stack import DATASET_HASH, WEIGHTS, Stack, refusal
from tests.explainer.test_servicer import SIMULATE, explain, listed, scoring, texts, write

DETECTION = explanation_pb2.SCORER_DETECTION
FUZZING = explanation_pb2.SCORER_FUZZING
SIMULATION = explanation_pb2.SCORER_SIMULATION
INTERVENTION = explanation_pb2.SCORER_INTERVENTION
PAIRS = explanation_pb2.SCORER_HEAD_PAIRS
AUC = explanation_pb2.MEASURE_AUC


def few() -> Component:
    """A neuron with a single document that activates it."""
    tokens = tuple("abcdef")
    return Component(
        address="neuron.1.9",
        examples=(
            Example(token_texts=tokens, activations=(0, 0, 4, 0, 0, 0), document_id="a"),
            Example(token_texts=tokens[::-1], activations=(0,) * 6, document_id="b"),
        ),
    )


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Stack]:
    components = [synthetic.component(), synthetic.head(), few()]
    async with stack.serving(tmp_path, components) as found:
        yield found


async def told(served: Stack, **fields: Any) -> list[explain_pb2.ExplainResponse]:
    return [each async for each in served.stub.Explain(explain(**fields))]


async def explained(
    served: Stack, **fields: Any
) -> tuple[explanation_pb2.Explanation, list[explanation_pb2.Score], explain_pb2.ExplainSummary]:
    """What an Explain ends in, its events in the order that is promised."""
    events = await told(served, **fields)
    kinds = [each.WhichOneof("event") for each in events]
    assert kinds[0] == "progress"
    assert kinds[-1] == "summary"
    (place,) = (number for number, kind in enumerate(kinds) if kind == "explanation")
    assert "score" not in kinds[:place]
    scores = [each.score for each in events if each.HasField("score")]
    return events[place].explanation, scores, events[-1].summary


async def scored(
    served: Stack, id: str, *scorers: int, **fields: Any
) -> tuple[list[explanation_pb2.Score], explain_pb2.ExplainSummary]:
    request = explain_pb2.ScoreRequest(id=id, dataset="small", scoring=scoring(*scorers, **fields))
    events = [each async for each in served.stub.Score(request)]
    assert events[-1].HasField("summary")
    return [each.score for each in events if each.HasField("score")], events[-1].summary


def documents(component: Component, seed: int) -> tuple[frozenset[str], frozenset[str]]:
    """Those of the explaining and of the scoring half."""
    split = split_tokens(component_of(stack.record(component)), seed=seed)
    return split.explaining.documents, split.scoring.documents


async def test_a_component_is_explained_scored_and_kept(served: Stack) -> None:
    explanation, scores, summary = await explained(
        served, seed=3, scoring=scoring(DETECTION, FUZZING, SIMULATION)
    )
    assert '" Mary"' in explanation.text
    assert explanation.model == explanation_pb2.ExplainedModel(id="demo", weights_hash=WEIGHTS)
    assert explanation.component == "neuron.1.7"
    provenance = explanation.provenance
    assert provenance.method == explanation_pb2.METHOD_TOKEN_PATTERN
    assert provenance.seed == 3
    assert (provenance.dataset, provenance.dataset_hash) == ("small", DATASET_HASH)
    assert provenance.code_version == __version__
    assert provenance.author == "local"
    assert (provenance.explainer_model, provenance.provider, provenance.prompt_hash) == ("",) * 3
    assert [each.scorer for each in scores] == [DETECTION] * 2 + [FUZZING] * 2 + [SIMULATION] * 2
    for score in scores:
        assert (score.judge, score.seed, score.dataset) == ("offline", 3, "small")
        assert score.dataset_hash == DATASET_HASH
        assert score.code_version == __version__
        assert not score.failures
        assert score.n > 0
        assert score.value > 0.9
        assert score.low <= score.value <= score.high
        assert score.chance == (0.0 if score.scorer == SIMULATION else 0.5)
    assert summary == explain_pb2.ExplainSummary(
        usage=explain_pb2.Usage(), unscored=[], warnings=[]
    )
    (kept,) = await listed(served)
    assert list(kept.scores) == scores[::-1]
    assert kept.id == explanation.id
    assert kept.text == explanation.text
    explaining, scoring_half = documents(synthetic.component(), 3)
    assert await served.store.documents(explanation.id) == explaining
    assert not explaining & scoring_half
    assert provenance.documents == len(explaining)


async def test_the_phases_are_told(served: Stack) -> None:
    events = await told(served, scoring=scoring(FUZZING, DETECTION))
    phases = [each.progress.phase for each in events if each.HasField("progress")]
    assert phases == ["reading", "explaining", "fuzzing", "detection"]


async def test_what_is_made_again_is_the_same(served: Stack) -> None:
    first = await explained(served, scoring=scoring(DETECTION))
    again = await explained(served, scoring=scoring(DETECTION))
    assert again[0].id == first[0].id
    assert [each.value for each in again[1]] == [each.value for each in first[1]]
    assert await served.store.count() == 1
    # Another seed deals other documents out; the text may be the same, and yet it is another.
    other = await explained(served, seed=1)
    assert other[0].id != first[0].id


async def test_two_at_once_are_one(served: Stack) -> None:
    made = await asyncio.gather(*(explained(served, scoring=scoring(DETECTION)) for _ in range(4)))
    assert len({explanation.id for explanation, _, _ in made}) == 1
    (kept,) = await listed(served)
    assert len(kept.scores) == 2


async def test_a_head_is_explained_by_its_pairs(served: Stack) -> None:
    explanation, scores, _ = await explained(served, component="head.1.2", scoring=scoring(PAIRS))
    assert 'from " her"' in explanation.text or 'to " Mary"' in explanation.text
    assert [each.scorer for each in scores] == [PAIRS, PAIRS]
    assert all(each.value > 0.8 for each in scores)


async def test_a_neuron_without_texts_has_its_ids_for_tokens(tmp_path: Path) -> None:
    known = stack.record(synthetic.component(count=60))
    for examples in (known.top, known.quantiles[0].examples, known.random):
        for example in examples:
            example.token_ids.extend(hash_of(text) for text in example.token_texts)
            del example.token_texts[:]
    async with stack.serving(tmp_path, [known]) as served:
        explanation, _, _ = await explained(served)
    assert f'the token "<{hash_of(" Mary")}>"' in explanation.text


def hash_of(text: str) -> int:
    return sum(map(ord, text))


async def test_too_few_documents_are_too_few(served: Stack) -> None:
    written = await write(served, 'Fires on the token "c" (10).', component="neuron.1.9")
    with pytest.raises(grpc.aio.AioRpcError, match="1 documents that activate it") as refused:
        await told(served, component="neuron.1.9")
    assert refusal(refused.value) == ("FAILED_PRECONDITION", "", "TOO_FEW_DOCUMENTS")
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await scored(served, written.id)
    assert refusal(refused.value) == ("FAILED_PRECONDITION", "", "TOO_FEW_DOCUMENTS")


async def test_an_explanation_is_scored_on_the_halves_it_was_made_with(served: Stack) -> None:
    explanation, first, _ = await explained(served, seed=5, scoring=scoring(DETECTION))
    again, summary = await scored(served, explanation.id, DETECTION)
    assert [each.value for each in again] == [each.value for each in first]
    assert not summary.warnings
    # Other draws, the same halves.
    others, _ = await scored(served, explanation.id, DETECTION, seed=6, items=3)
    assert [(each.seed, each.n) for each in others] == [(6, 6), (6, 6)]


def renamed(component: Component, count: int) -> Component:
    """The first `count` texts, under the names of other documents of the same dataset."""
    examples = tuple(
        replace(each, document_id=f"doc-{(number * 7 + 3) % len(component.examples)}")
        for number, each in enumerate(component.examples)
        if isinstance(each, Example)
    )
    return replace(component, examples=examples[:count])


async def test_what_the_explainer_saw_is_not_scored(served: Stack) -> None:
    explanation, before, _ = await explained(served, seed=5, scoring=scoring(DETECTION, items=200))
    shown = await served.store.documents(explanation.id)
    # The dataset comes again, with other texts in its documents.
    moved = renamed(synthetic.component(), 100)
    served.dataset.records["neuron.1.7"] = stack.record(moved)
    _, dealt = documents(moved, 5)
    assert dealt & shown
    after, _ = await scored(served, explanation.id, DETECTION, items=200)
    assert 0 < after[0].n < before[0].n
    assert after[0].value > 0.9
    # An edit stands on the same documents.
    edit = await write(served, synthetic.NAMES, based_on=explanation.id)
    assert edit.provenance.documents == explanation.provenance.documents
    again, _ = await scored(served, edit.id, DETECTION, items=200)
    assert again[0].n == after[0].n
    # Nobody knows what the author of a new text saw, and that is said.
    written = await write(served, synthetic.NAMES)
    scores, summary = await scored(served, written.id, DETECTION, items=200)
    assert scores[0].n > after[0].n
    assert "nobody knows which documents" in summary.warnings[0]


async def test_where_all_was_shown_nothing_is_scored(served: Stack) -> None:
    explanation, _, _ = await explained(served, seed=5)
    shown = await served.store.documents(explanation.id)
    known = synthetic.component()
    seen = tuple(
        each for each in known.examples if isinstance(each, Example) and each.document_id in shown
    )
    served.dataset.records["neuron.1.7"] = stack.record(replace(known, examples=seen))
    with pytest.raises(grpc.aio.AioRpcError, match="that were not shown") as refused:
        await scored(served, explanation.id, DETECTION)
    assert refusal(refused.value) == ("FAILED_PRECONDITION", "", "TOO_FEW_DOCUMENTS")


async def test_a_wrong_text_has_a_low_score(served: Stack) -> None:
    wrong = await write(served, synthetic.COLOURS)
    scores, _ = await scored(served, wrong.id, DETECTION)
    (auc,) = (each for each in scores if each.measure == AUC)
    assert abs(auc.value - 0.5) < 0.2


async def test_a_score_that_is_not_for_it_is_refused(served: Stack) -> None:
    head = await write(served, synthetic.HEAD, component="head.1.2")
    neuron = await write(served, synthetic.NAMES)
    for id, scorer in ((head.id, DETECTION), (neuron.id, PAIRS)):
        with pytest.raises(grpc.aio.AioRpcError, match=", but ") as refused:
            await scored(served, id, scorer)
        assert refusal(refused.value)[:2] == ("INVALID_ARGUMENT", "scoring.scorers[0]")


async def test_the_offline_judge_reads_token_patterns_only(served: Stack) -> None:
    written = await write(served, "names of women")
    with pytest.raises(grpc.aio.AioRpcError, match="not a token pattern") as refused:
        await scored(served, written.id, judge=explain_pb2.JUDGE_OFFLINE)
    assert refusal(refused.value) == ("FAILED_PRECONDITION", "", "NEEDS_PROVIDER")


async def test_a_dataset_of_another_model_scores_nothing(served: Stack) -> None:
    written = await write(served, synthetic.NAMES)
    served.dataset.header.model.weights_hash = "ef" * 32
    served.dataset.hash = "12" * 32
    with pytest.raises(grpc.aio.AioRpcError, match="is of the model demo") as refused:
        await scored(served, written.id)
    assert refusal(refused.value) == ("FAILED_PRECONDITION", "dataset", "OTHER_MODEL")
    # Where nobody knows the weights, the same id is the same model.
    served.dataset.header.model.weights_hash = ""
    served.dataset.hash = "34" * 32
    assert await scored(served, written.id)


async def test_a_dictionary_of_the_same_name_is_another(served: Stack) -> None:
    latent = replace(synthetic.component(), address="latent.d.7")
    served.dataset.records["latent.d.7"] = stack.record(latent)
    served.dataset.header.model.dictionaries.add(id="d", weights_hash="11" * 32)
    explanation, _, _ = await explained(served, component="latent.d.7")
    (dictionary,) = explanation.model.dictionaries
    assert (dictionary.id, dictionary.weights_hash) == ("d", "11" * 32)
    served.inference.described = described()
    served.dataset.header.model.dictionaries[0].weights_hash = "22" * 32
    served.dataset.hash = "ef" * 32
    with pytest.raises(grpc.aio.AioRpcError, match="has other weights in the dataset") as refused:
        await scored(served, explanation.id)
    assert refusal(refused.value) == ("FAILED_PRECONDITION", "dataset", "OTHER_MODEL")
    # Nor is it asked what a dictionary promotes that is not the same.
    again, _, _ = await explained(served, component="latent.d.7")
    assert again.id != explanation.id
    assert "Promotes" not in again.text


async def test_a_score_that_cannot_be_made_leaves_the_others(served: Stack) -> None:
    explanation, scores, summary = await explained(served, scoring=scoring(INTERVENTION, DETECTION))
    assert [each.scorer for each in scores] == [DETECTION] * 2
    (unscored,) = summary.unscored
    assert (unscored.scorer, unscored.reason) == (INTERVENTION, "NOT_BUILT")
    assert explanation.id


def described(weights: str = WEIGHTS) -> component_pb2.DescribeComponentResponse:
    tokens = [
        token_pb2.TokenScore(token=token_pb2.Token(text=text), score=score)
        for text, score in ((" out", -3.0), (" box", 2.0), (" house", 1.5), (" in", -0.5))
    ]
    return component_pb2.DescribeComponentResponse(
        manifest=manifest_pb2.Manifest(
            model=manifest_pb2.ModelRef(id="demo", weights_hash=weights)
        ),
        component="neuron.1.7",
        directions=[
            component_pb2.ComponentDirection(name="read", input_tokens=tokens),
            component_pb2.ComponentDirection(name="write", output_tokens=tokens),
        ],
    )


async def test_what_a_component_promotes_comes_from_the_model(served: Stack) -> None:
    served.inference.described = described()
    explanation, _, _ = await explained(served)
    assert explanation.text.endswith('Promotes " box", " house".')


async def test_another_models_word_is_not_taken(served: Stack) -> None:
    served.inference.described = described("ef" * 32)
    explanation, _, _ = await explained(served)
    assert "Promotes" not in explanation.text


async def test_a_record_says_itself_what_is_promoted(tmp_path: Path) -> None:
    known = synthetic.component()
    promoted = (TextScore(" store", 2.0), TextScore(" shop", 1.0))
    component = Component(
        address=known.address, examples=known.examples, promoted=promoted, max_activation=4.0
    )
    async with stack.serving(tmp_path, [component]) as served:
        served.inference.described = described()
        explanation, _, _ = await explained(served)
    assert explanation.text.endswith('Promotes " store", " shop".')


async def test_a_damaged_record_is_no_bug_of_ours(served: Stack) -> None:
    served.dataset.records["neuron.1.7"].top[0].activations.pop()
    with pytest.raises(grpc.aio.AioRpcError, match="has 23 values where 24 belong") as refused:
        await told(served)
    assert refusal(refused.value) == ("FAILED_PRECONDITION", "component", "RECORD_UNREADABLE")


async def test_a_dataset_without_the_component_scores_nothing(served: Stack) -> None:
    written = await write(served, synthetic.NAMES, component="neuron.5.5")
    with pytest.raises(grpc.aio.AioRpcError, match=r"no record of neuron\.5\.5") as refused:
        await scored(served, written.id)
    assert refusal(refused.value) == ("NOT_FOUND", "dataset", "NOT_FOUND")


async def test_a_dataset_service_that_is_away_is_said_to_be(tmp_path: Path) -> None:
    async with stack.serving(tmp_path, TDB_DATASET_ADDRESS="127.0.0.1:1") as served:
        with pytest.raises(grpc.aio.AioRpcError, match="dataset service at") as refused:
            await told(served)
    assert refusal(refused.value) == ("UNAVAILABLE", "", "DATASET_UNREACHABLE")


async def test_texts_are_simulated_by_the_pattern(served: Stack) -> None:
    explanation, _, _ = await explained(served)
    request = SIMULATE(id=explanation.id, texts=texts(" a", " Mary") + texts(" b"))
    response = await served.stub.Simulate(request)
    assert response.judge == "offline"
    assert response.usage == explain_pb2.Usage()
    first, second = response.texts
    assert (first.expected[0], list(second.expected)) == (0.0, [0.0])
    assert first.expected[1] > 5
    given = await served.stub.Simulate(SIMULATE(text=synthetic.COLOURS, texts=texts(" red", "x")))
    assert list(given.texts[0].expected) == [10.0, 0.0]


async def test_a_head_has_nothing_to_simulate(served: Stack) -> None:
    head = await write(served, "looks at names", component="head.1.2")
    with pytest.raises(grpc.aio.AioRpcError, match="by pairs of tokens") as refused:
        await served.stub.Simulate(SIMULATE(id=head.id, texts=texts("a")))
    assert refusal(refused.value) == ("FAILED_PRECONDITION", "id", "IS_HEAD")
