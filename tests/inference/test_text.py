"""Real tokenizers: bytes, offsets, single tokens."""

from pathlib import Path

import pytest

from services.common.errors import InvalidArgument
from services.inference.engine.text import Vocabulary

pytestmark = pytest.mark.shared

TEXT = "Hello world, naïve 猫 🙂!\n"


@pytest.fixture(scope="module")
def gpt2(shared_data: Path) -> Vocabulary:
    return Vocabulary.load(50257, shared_data / "gpt2-tokenizer")


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> Vocabulary:
    return Vocabulary.load(512, shared_data / "stories260k")


def test_gpt2_ids_are_the_published_ones(gpt2: Vocabulary) -> None:
    assert gpt2.encode("Hello world") == (15496, 995)
    assert gpt2.facts is not None
    assert not gpt2.facts.prepends_bos
    assert gpt2.encode("Hello world", prepend_bos=True) == (50256, 15496, 995)


def test_byte_level_tokens_are_the_bytes_of_the_text(gpt2: Vocabulary) -> None:
    ids = gpt2.encode(TEXT)
    assert b"".join(gpt2.token(each).raw for each in ids) == TEXT.encode()
    text, offsets = gpt2.decode(ids)
    assert text == TEXT
    assert offsets[0] == 0
    assert list(offsets) == sorted(offsets)
    assert gpt2.token(50256).text == "<|endoftext|>"


def test_byte_fallback_tokens_are_bytes(stories: Vocabulary) -> None:
    ids = stories.encode("Once ö")
    raw = b"".join(stories.token(each).raw for each in ids[1:])
    assert raw == " Once ö".encode()
    assert stories.facts is not None
    assert stories.facts.prepends_bos
    assert ids[0] == stories.facts.bos_id
    assert stories.encode("Once ö", prepend_bos=False) == ids[1:]


def test_a_text_of_several_tokens_is_shown_in_parts(gpt2: Vocabulary) -> None:
    assert gpt2.single(" Mary") == 5335
    with pytest.raises(InvalidArgument, match=r"' Maryland stuff' is 2 tokens.*' Maryland'"):
        gpt2.single(" Maryland stuff")
    with pytest.raises(InvalidArgument, match="' Tokyo', with a leading space, is one token"):
        gpt2.single("Tokyo")
    with pytest.raises(InvalidArgument, match="'ized', without its leading space, is one token"):
        gpt2.single(" ized")
    with pytest.raises(InvalidArgument, match="this text is empty"):
        gpt2.single("")
