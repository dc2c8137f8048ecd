"""The committed tokenizer: every word one token, nothing added, any bytes survive."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from demo.behaviours import BEHAVIOURS, evaluation_prompts
from demo.corpus import NAMES, documents
from demo.measure import token_of
from demo.tokenizer import END_OF_TEXT, words

MODEL = Path(__file__).parents[2] / "demo" / "model"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


def test_every_word_is_one_token(tokenizer: Any) -> None:
    split = [word for word in words() if len(tokenizer(f" {word}").input_ids) != 1]
    assert split == []
    assert [name for name in NAMES if len(tokenizer(name).input_ids) != 1] == []
    assert len(tokenizer(" Zanzibar").input_ids) > 1  # the check can fail


def test_every_word_of_the_corpus_and_of_the_prompts_is_one_token(tokenizer: Any) -> None:
    prompts = [prompt.text for many in evaluation_prompts(60).values() for prompt in many]
    for text in [
        *islice(documents("unseen"), 300),
        *prompts,
        *(b.example.text for b in BEHAVIOURS),
    ]:
        tokens = tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)
        marks = sum(text.count(mark) for mark in '.,?!"')
        assert len(tokens) == len(text.replace('"', " ").split()) + marks, (text, tokens)


def test_the_mary_and_john_prompt(tokenizer: Any) -> None:
    text = BEHAVIOURS[0].example.text
    assert text == "When Mary and John went to the store, John gave a drink to"
    assert [tokenizer.decode([i]) for i in tokenizer(text).input_ids] == [
        *("When", " Mary", " and", " John", " went", " to", " the", " store", ","),
        *(" John", " gave", " a", " drink", " to"),
    ]


def test_nothing_is_added(tokenizer: Any) -> None:
    assert tokenizer("").input_ids == []
    assert tokenizer.convert_tokens_to_ids(END_OF_TEXT) not in tokenizer("x y").input_ids
    assert tokenizer.eos_token == tokenizer.bos_token == END_OF_TEXT
    with pytest.raises(ValueError, match="is 2 tokens"):
        token_of(tokenizer, " Mary Mary")


@pytest.mark.parametrize(
    "text", ["naïve café", "日本語 🙂", "\x00\t\n  two  spaces", 'x = "y."; // z']
)
def test_any_text_survives(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_about_two_thousand_tokens_and_no_mark_is_merged(tokenizer: Any) -> None:
    vocabulary = tokenizer.get_vocab()
    assert 1500 < len(vocabulary) <= 2048
    marked = [t for t in vocabulary if t.strip("Ġ") != t.strip('Ġ.,?!"') and t != END_OF_TEXT]
    assert all(len(t.strip("Ġ")) == 1 for t in marked)
