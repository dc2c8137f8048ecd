"""Documents cut into sequences of tokens, each of one document, none of its tokens lost.

A document's tokens are those of its text alone, read in pieces where it is very long, so neither
its neighbours nor the point at which a build goes on change them. Where the tokenizer begins texts
with a token of its own, every sequence begins with that.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from services.dataset.building.corpora import Document

Tokenize = Callable[[Sequence[str]], list[Sequence[int]]]
"""The ids of each text."""

BATCH_CHARACTERS = 500_000
BATCH_DOCUMENTS = 512
PIECE_CHARACTERS = 100_000

_SPACE = re.compile(r"\s(?=\S)")


@dataclass(frozen=True)
class Position:
    """Where the corpus goes on: a document's number, and tokens of it that were taken."""

    document: int = 0
    token: int = 0


@dataclass(frozen=True)
class CorpusSequence:
    index: int
    """Its number in the corpus, from 0."""
    ids: tuple[int, ...]
    document_id: str
    offset: int
    """Where in its document it starts, in tokens; the token put first is none of them."""
    end: Position
    """Behind it."""


def cut(
    documents: Iterable[Document],
    tokenize: Tokenize,
    length: int,
    bos: int | None,
    start: Position,
    index: int,
) -> Iterator[CorpusSequence]:
    """The sequences of at most `length` tokens from `start` on; `index` is that of the first."""
    room = length - (bos is not None)
    begin = () if bos is None else (bos,)
    for number, (document, ids) in _tokenised(documents, tokenize, start.document):
        first = start.token if number == start.document else 0
        for offset in range(first, len(ids), room):
            part = ids[offset : offset + room]
            stop = offset + len(part)
            end = Position(number, stop) if stop < len(ids) else Position(number + 1)
            yield CorpusSequence(index, (*begin, *part), document.id, offset, end)
            index += 1


def _tokenised(
    documents: Iterable[Document], tokenize: Tokenize, skipped: int
) -> Iterator[tuple[int, tuple[Document, list[int]]]]:
    """Numbers, documents and their ids, `skipped` documents left out."""
    batch: list[tuple[int, Document]] = []
    characters = 0
    for number, document in enumerate(documents):
        if number < skipped:
            continue
        batch.append((number, document))
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS or len(batch) == BATCH_DOCUMENTS:
            yield from _of_batch(batch, tokenize)
            batch, characters = [], 0
    yield from _of_batch(batch, tokenize)


def _of_batch(
    batch: list[tuple[int, Document]], tokenize: Tokenize
) -> Iterator[tuple[int, tuple[Document, list[int]]]]:
    texts = [(place, piece) for place, (_, each) in enumerate(batch) for piece in pieces(each.text)]
    ids: list[list[int]] = [[] for _ in batch]
    sent: list[tuple[int, str]] = []
    characters = 0
    for place, piece in texts:
        if sent and characters + len(piece) > BATCH_CHARACTERS:
            _add(ids, sent, tokenize)
            sent, characters = [], 0
        sent.append((place, piece))
        characters += len(piece)
    _add(ids, sent, tokenize)
    for (number, document), found in zip(batch, ids, strict=True):
        yield number, (document, found)


def _add(ids: list[list[int]], sent: list[tuple[int, str]], tokenize: Tokenize) -> None:
    if not sent:
        return
    found = tokenize([piece for _, piece in sent])
    for (place, _), each in zip(sent, found, strict=True):
        ids[place] += each


def pieces(text: str) -> Iterator[str]:
    """A text in pieces that a tokenizer takes at once, cut before white space if there is any."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        stop = start + PIECE_CHARACTERS
        found = _SPACE.finditer(text, start + PIECE_CHARACTERS // 2, stop)
        spaces = [each.start() for each in found]
        stop = spaces[-1] if spaces else stop
        yield text[start:stop]
        start = stop
    if start < len(text):
        yield text[start:]
