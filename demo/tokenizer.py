"""The demo's byte-level BPE: GPT-2's scheme, where each word of the corpus is one token.

Merges are learnt on the corpus and on the list of its words, with punctuation kept apart, so that
a closing quote is a token of its own and never a part of `."`. The saved tokenizer is a plain
GPT-2 one: any bytes can be encoded, and nothing is added before or after a text. `<|endoftext|>`
separates documents in training.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2TokenizerFast

from demo import corpus

END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 2048
_SAMPLE = 4000
_PIECES = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]|\s+(?!\S)|\s+"


def words() -> list[str]:
    """Every word that the corpus can use, in the capitalisation in which it uses it."""
    text = " ".join(islice(corpus.documents("words"), _SAMPLE))
    found = {word for word in text.replace('"', " ").translate(_NO_MARKS).split() if word}
    lists = corpus.SLOTS.values()
    return sorted(
        found.union(word for words in lists for phrase in words for word in phrase.split())
    )


_NO_MARKS = str.maketrans(dict.fromkeys(".,?!", " "))


def _text() -> Iterator[str]:
    yield from islice(corpus.documents("tokenizer"), _SAMPLE)
    for word in words():  # often enough that each word's merges are learnt to the end
        yield f" {word}" * 50
    for word in _openers():
        yield from [word] * 50


def _openers() -> list[str]:
    """The words that can open a document, where no space comes before them."""
    first = (text.split()[0] for text in islice(corpus.documents("words"), _SAMPLE))
    return sorted({*(word.strip('",') for word in first), *corpus.NAMES})


def train_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_text(), trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    GPT2TokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
