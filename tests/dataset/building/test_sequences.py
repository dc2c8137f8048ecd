"""Documents cut into sequences: no token lost, wherever the cutting goes on."""

import pytest

from services.dataset.building import sequences
from services.dataset.building.corpora import Document
from services.dataset.building.sequences import CorpusSequence, Position


def tokenize(texts: list[str]) -> list[list[int]]:
    """A token per character."""
    return [[ord(each) for each in text] for text in texts]


DOCUMENTS = [
    Document(f"d{number}", "abcdefghij"[:size]) for number, size in enumerate((7, 0, 1, 10, 4))
]


START = Position()


def cut(
    bos: int | None,
    start: Position = START,
    index: int = 0,
    documents: list[Document] = DOCUMENTS,
) -> list[CorpusSequence]:
    return list(sequences.cut(documents, tokenize, 4, bos, start, index))  # type: ignore[arg-type]


@pytest.mark.parametrize("bos", [None, 0])
def test_every_token_is_in_one_sequence_of_its_document(bos: int | None) -> None:
    found = cut(bos)
    texts: dict[str, str] = {}
    for number, each in enumerate(found):
        assert each.index == number
        assert len(each.ids) <= 4
        ids = each.ids if bos is None else each.ids[1:]
        assert bos is None or each.ids[0] == bos
        assert each.offset == len(texts.setdefault(each.document_id, ""))
        texts[each.document_id] += "".join(map(chr, ids))
    assert texts == {each.id: each.text for each in DOCUMENTS if each.text}


@pytest.mark.parametrize("bos", [None, 0])
def test_cutting_goes_on_behind_any_sequence(bos: int | None) -> None:
    found = cut(bos)
    for number, each in enumerate(found):
        assert cut(bos, each.end, number + 1) == found[number + 1 :]


def test_what_is_tokenised_at_once_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = cut(0)
    monkeypatch.setattr(sequences, "BATCH_DOCUMENTS", 1)
    assert cut(0) == found
    monkeypatch.setattr(sequences, "BATCH_DOCUMENTS", 100)
    monkeypatch.setattr(sequences, "BATCH_CHARACTERS", 3)
    assert cut(0) == found


def test_long_texts_are_read_in_pieces_cut_before_white_space(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sequences, "PIECE_CHARACTERS", 10)
    text = "one two  three\nfour fivesixseveneightnine ten"
    found = list(sequences.pieces(text))
    assert "".join(found) == text
    assert all(len(piece) <= 10 for piece in found)
    assert found[:2] == ["one two ", " three"]
    assert list(sequences.pieces("")) == []
