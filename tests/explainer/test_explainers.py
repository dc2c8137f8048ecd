"""What models are asked to explain, and what becomes of their replies."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from services.common.errors import FailedPrecondition, InvalidArgument
from services.explainer.engine.budget import Ledger
from services.explainer.engine.components import Component, Example, TextScore
from services.explainer.engine.explainers import begun, explain, prompt_for
from services.explainer.engine.explanations import Explanation, Method
from services.explainer.engine.replies import FailureKind
from services.explainer.engine.splits import Half, split_pairs, split_tokens
from tests.explainer import synthetic
from tests.explainer.openai_server import Fault, OpenAIServer, Said
from tests.explainer.test_provider import provider

NEURON = Component(
    address="neuron.1.7",
    examples=synthetic.component().examples,
    promoted=(TextScore(" store", 2.5), TextScore(" shop", 1.25)),
    suppressed=(TextScore(" sea", -1.0),),
)
HEAD = synthetic.head()
SPLIT, HEAD_SPLIT = split_tokens(NEURON, seed=1), split_pairs(HEAD, seed=1)
OF_TOKENS = (Method.TOKEN_ACTIVATION_PAIRS, Method.MAX_ACTIVATION_SUMMARY, Method.CONTRASTIVE)


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with OpenAIServer(lambda body: '{"explanation": "the name Mary"}') as running:
        yield running


async def explained(server: OpenAIServer, method: Method, **more: Any) -> Explanation | FailureKind:
    head = method is Method.ATTENTION_HEAD
    async with provider(server) as asked:
        return await explain(
            method,
            HEAD if head else NEURON,
            HEAD_SPLIT if head else SPLIT,
            asked,
            Ledger(),
            seed=4,
            **more,
        )


@pytest.mark.parametrize("method", [*OF_TOKENS, Method.OUTPUT_CENTRED, Method.ATTENTION_HEAD])
async def test_an_explanation_says_where_it_came_from(server: OpenAIServer, method: Method) -> None:
    made = await explained(server, method)
    assert isinstance(made, Explanation)
    assert (made.text, made.method) == ("the name Mary", method)
    origin = made.provenance
    assert (origin.model, origin.seed) == ("test-model", 1)
    assert origin.provider in server.url
    head = method is Method.ATTENTION_HEAD
    of, split = (HEAD, HEAD_SPLIT) if head else (NEURON, SPLIT)
    prompt, documents = prompt_for(method, of, split, seed=4)
    assert (origin.prompt_hash, origin.documents) == (prompt.hash, documents)
    assert documents == (
        frozenset() if method is Method.OUTPUT_CENTRED else split.explaining.documents
    )


@pytest.mark.parametrize("method", OF_TOKENS)
async def test_no_text_for_scoring_is_shown(server: OpenAIServer, method: Method) -> None:
    await explained(server, method)
    shown = _joined(synthetic.enclosed(server.requests[0], "data"))

    def count(half: Half[Example]) -> int:
        texts = ("".join(each.token_texts) for each in (*half.active, *half.quiet))
        return sum(text in shown for text in texts)

    assert count(SPLIT.explaining) >= 5
    assert count(SPLIT.scoring) == 0


def _joined(shown: Any) -> str:
    """All strings of a prompt's data put together, as a text would stand there."""

    def strings(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            for each in value.values():
                yield from strings(each)
        elif isinstance(value, list):
            for each in value:
                yield from strings(each)

    return "".join(strings(shown))


async def test_token_activation_pairs_are_discretised(server: OpenAIServer) -> None:
    await explained(server, Method.TOKEN_ACTIVATION_PAIRS)
    shown = synthetic.enclosed(server.requests[0], "data")
    first = SPLIT.explaining.active[0]
    assert len(shown) == 5
    assert shown[0] == [
        [text, int(10 * value / 4)]
        for text, value in zip(first.token_texts, first.activations, strict=True)
    ]


async def test_a_summary_marks_where_it_fires(server: OpenAIServer) -> None:
    await explained(server, Method.MAX_ACTIVATION_SUMMARY)
    shown = synthetic.enclosed(server.requests[0], "data")
    assert shown["strongest"] == [" Mary"]
    tokens, marks = synthetic.plain(shown["texts"][0])
    assert {tokens[place] for place in marks["fires"]} <= {" Mary", " John"}


async def test_contrast_shows_what_looks_alike(server: OpenAIServer) -> None:
    await explained(server, Method.CONTRASTIVE)
    shown = synthetic.enclosed(server.requests[0], "data")
    assert len(shown["active"]) == 10
    assert len(shown["silent"]) == 8
    assert all(isinstance(text, str) and " Mary" not in text for text in shown["silent"])


async def test_heads_show_from_and_to(server: OpenAIServer) -> None:
    await explained(server, Method.ATTENTION_HEAD)
    for item in synthetic.enclosed(server.requests[0], "data"):
        tokens, marks = synthetic.plain(item)
        assert [tokens[place] for place in marks["from"]] == [" her"]
        assert [tokens[place] for place in marks["to"]] == [" Mary"]


async def test_output_centred_reads_what_is_promoted(server: OpenAIServer) -> None:
    await explained(server, Method.OUTPUT_CENTRED)
    assert synthetic.enclosed(server.requests[0], "data") == {
        "promoted": [[" store", 2.5], [" shop", 1.25]],
        "suppressed": [[" sea", -1.0]],
    }
    bare = Component(address="neuron.1.7", examples=NEURON.examples)
    with pytest.raises(FailedPrecondition) as refused:
        prompt_for(Method.OUTPUT_CENTRED, bare, SPLIT, seed=0)
    assert refused.value.reason == "NO_READ_OUTS"


async def test_an_explanation_is_shown_as_it_comes(server: OpenAIServer) -> None:
    seen: list[str] = []
    made = await explained(server, Method.CONTRASTIVE, on_text=seen.append)
    assert isinstance(made, Explanation)
    assert seen[0] == ""
    assert "the name" in seen
    assert seen[-1] == "the name Mary"


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        ("", ""),
        ('{"explan', ""),
        ('{"explanation": "', ""),
        (' {"explanation" :"a \\"b', 'a "b'),
        ('{"explanation": "a\\', "a"),
        ('{"explanation": "a\\u00', "a"),
        ('{"explanation": "a\\u00e9", "more": "c', "aé"),
        ('{"explanation": "a\\ud83d', "a"),
        ('```json\n{"explanation": "a', "a"),
        ('Sure: {"explanation": "a', ""),
        ('{"other": "b", "explanation": "a', ""),
    ],
)
def test_the_beginning_of_a_reply_is_read(reply: str, text: str) -> None:
    assert begun(reply) == text


@pytest.mark.parametrize(
    ("said", "failure"),
    [
        (Said(refusal="no"), FailureKind.REFUSED),
        (Said('{"explanation": "the', finish="length"), FailureKind.TRUNCATED),
        (Said("the name Mary"), FailureKind.MALFORMED),
        (Said('{"explanation": "  "}'), FailureKind.MALFORMED),
        (Said('{"explanation": "\\u200b\\u202e"}'), FailureKind.MALFORMED),
        (Said(json.dumps({"explanation": "x" * 501})), FailureKind.MALFORMED),
        (Said('{"explanation": "x", "score": 1}'), FailureKind.MALFORMED),
    ],
)
async def test_a_reply_that_explains_nothing_is_a_failure(
    server: OpenAIServer, said: Said, failure: FailureKind
) -> None:
    server.model = lambda body: said
    assert await explained(server, Method.CONTRASTIVE) is failure


async def test_a_reply_is_one_line_without_hidden_signs(server: OpenAIServer) -> None:
    text = "the\n\n name\t\u202eMary\u0000 \ud800"
    server.faults.append(Fault(reply=json.dumps({"explanation": text})))
    made = await explained(server, Method.CONTRASTIVE)
    assert isinstance(made, Explanation)
    assert made.text == "the name Mary"


def test_methods_are_for_what_they_are_for() -> None:
    for method in (Method.TOKEN_PATTERN, Method.HUMAN, Method.IMPORTED, Method.ATTENTION_HEAD):
        with pytest.raises(InvalidArgument):
            prompt_for(method, NEURON, SPLIT, seed=0)
    with pytest.raises(InvalidArgument, match="attention_head"):
        prompt_for(Method.CONTRASTIVE, HEAD, HEAD_SPLIT, seed=0)
    with pytest.raises(InvalidArgument, match=r"those of head\.1\.2"):
        prompt_for(Method.CONTRASTIVE, NEURON, HEAD_SPLIT, seed=0)
