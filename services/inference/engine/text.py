"""Text and tokens: what the tokenizer does, made visible and checked.

Token ids are the interface, text is display. A model may be served without a tokenizer: ids work,
text is refused with what to do, and tokens show as `<17>`.
"""

import hashlib
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from services.common.errors import FailedPrecondition, InvalidArgument

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model", "spiece.model", "vocab.txt")
MAX_CHARACTERS = 1_000_000
MAX_TOKEN_CHARACTERS = 1_000  # the longest of published vocabularies have some hundred
SPACE = "\u2581"
"""What SentencePiece tokenizers write for a space."""


@dataclass(frozen=True)
class Token:
    """One vocabulary entry: id, display text, and its bytes where the tokenizer says them."""

    id: int
    text: str
    raw: bytes


@dataclass(frozen=True)
class ChatMessage:
    role: str
    content: str


@dataclass(frozen=True)
class TokenizerFacts:
    vocabulary: int
    prepends_bos: bool
    bos_id: int | None
    eos_id: int | None
    has_chat_template: bool


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer; transformers invents an empty one where it does not."""
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


class Vocabulary:
    """Tokens of one model, with its tokenizer or without."""

    def __init__(self, size: int, tokenizer: Any | None) -> None:
        """`size`: rows of the unembedding. Raises FailedPrecondition where the two do not fit."""
        self.size = size
        self._tokenizer = tokenizer
        # Fast tokenizers raise "Already borrowed" when two threads encode at once.
        self._lock = threading.Lock()
        self._byte_of: dict[str, int] = {}
        self.facts: TokenizerFacts | None = None
        self.files_hash = ""
        """SHA-256, in hex, of the tokenizer's files; empty where it was not read from any."""
        if tokenizer is None:
            return
        entries = len(tokenizer)
        if entries > size:
            raise FailedPrecondition(
                f"the tokenizer has {entries} tokens, the model only {size}: they do not belong "
                "together; name the right one with --tokenizer",
                reason="TOKENIZER_MISMATCH",
            )
        if _is_byte_level(tokenizer):
            self._byte_of = _byte_level_alphabet()
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        first = tokenizer("a").input_ids[:1]
        self.facts = TokenizerFacts(
            vocabulary=entries,
            prepends_bos=bos is not None and first == [bos],
            bos_id=bos,
            eos_id=eos,
            has_chat_template=tokenizer.chat_template is not None,
        )

    @classmethod
    def load(cls, size: int, folder: Path) -> "Vocabulary":
        """Reads a tokenizer; never runs its code."""
        vocabulary = cls(size, AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
        vocabulary.files_hash = _hash(folder)
        return vocabulary

    def encode(self, text: str, prepend_bos: bool | None = None) -> tuple[int, ...]:
        """Ids the model reads for a text. `prepend_bos` None: as the tokenizer does by itself."""
        tokenizer = self._require()
        if not text:
            raise InvalidArgument("the prompt is empty; at least one token is required")
        _check_characters(len(text))
        if prepend_bos is None:
            return self._ids(text, special=True)
        ids = self._ids(text, special=False)
        if not prepend_bos:
            return ids
        if tokenizer.bos_token_id is None:
            raise InvalidArgument("this tokenizer has no beginning-of-sequence token to prepend")
        return (tokenizer.bos_token_id, *ids)

    def encode_documents(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Ids of each text by itself, of any number; nothing is put first."""
        self._require()
        _check_characters(sum(map(len, texts)))
        return [self._ids(text, special=False) for text in texts]

    def encode_chat(
        self, messages: Sequence[ChatMessage], add_generation_prompt: bool
    ) -> tuple[int, ...]:
        """Ids of a conversation rendered by the chat template."""
        tokenizer = self._require()
        if tokenizer.chat_template is None:
            raise FailedPrecondition(
                "this model's tokenizer has no chat template: send text or token_ids",
                reason="NO_CHAT_TEMPLATE",
            )
        _check_characters(sum(len(each.role) + len(each.content) for each in messages))
        conversation = [{"role": each.role, "content": each.content} for each in messages]
        try:
            with self._lock:
                ids = tokenizer.apply_chat_template(
                    conversation, add_generation_prompt=add_generation_prompt, return_dict=False
                )
        except Exception as error:  # jinja raises whatever the template author wrote
            raise InvalidArgument(f"the chat template refuses these messages: {error}") from error
        return tuple(ids)

    def single(self, text: str) -> int:
        """The id of a text that is exactly one token; the refusal of any other says what it is."""
        if len(text) > MAX_TOKEN_CHARACTERS:
            raise InvalidArgument(
                f"one token is asked for, and this text has {len(text)} characters; at most "
                f"{MAX_TOKEN_CHARACTERS} are read"
            )
        ids = self._ids(text, special=False)
        if len(ids) == 1:
            return ids[0]
        if not text:
            raise InvalidArgument("a token is required, for example ' Mary'; this text is empty")
        shown = " | ".join(repr(self.token(each).text) for each in ids[:12])
        message = (
            f"{text!r} is {len(ids)} tokens, not one: {shown}{' ...' if len(ids) > 12 else ''}"
        )
        other = text[1:] if text.startswith(" ") else " " + text
        if other and len(self._ids(other, special=False)) == 1:
            verb = "without its" if text.startswith(" ") else "with a"
            message += f"; {other!r}, {verb} leading space, is one token"
        raise InvalidArgument(message)

    def check_id(self, token_id: int) -> int:
        """Raises InvalidArgument unless the id is a row of the vocabulary."""
        if not 0 <= token_id < self.size:
            raise InvalidArgument(
                f"token id {token_id} does not exist; valid is 0..{self.size - 1}"
            )
        return token_id

    @property
    def listed(self) -> int:
        """How many ids the tokenizer can decode; only those are ever listed or chosen."""
        return self.size if self.facts is None else self.facts.vocabulary

    def is_listed(self, token_id: int) -> bool:
        """Whether the tokenizer can decode the id; it cannot where the vocabulary is padded."""
        return token_id < self.listed

    def token(self, token_id: int) -> Token:
        """Display text and bytes of an id; `<17>` where nothing is known."""
        piece = None
        if self._tokenizer is not None and self.is_listed(token_id):
            piece = self._tokenizer.convert_ids_to_tokens(token_id)
        if piece is None:
            return Token(token_id, f"<{token_id}>", b"")
        raw = self._bytes_of(token_id, piece)
        return Token(token_id, raw.decode("utf-8", errors="replace"), raw)

    def decode(self, ids: Sequence[int]) -> tuple[str, tuple[int, ...]]:
        """The text the tokens stand for, and where each begins in it, in UTF-8 bytes."""
        tokens = [self.token(each) for each in ids]
        if self._tokenizer is None:
            return "".join(token.text for token in tokens), ()
        offsets, raw = [], b""
        for token in tokens:
            offsets.append(len(raw))
            raw += token.raw
        return raw.decode("utf-8", errors="replace"), tuple(offsets)

    def _ids(self, text: str, *, special: bool) -> tuple[int, ...]:
        tokenizer = self._require()
        with self._lock:
            # Not verbose: documents may well be longer than the model's context.
            return tuple(tokenizer(text, add_special_tokens=special, verbose=False).input_ids)

    def _bytes_of(self, token_id: int, piece: str) -> bytes:
        assert self._tokenizer is not None
        if token_id in self._tokenizer.all_special_ids:
            return piece.encode()
        if self._byte_of:
            known = [self._byte_of.get(character) for character in piece]
            # Tokens added after training are stored as plain text.
            return (
                piece.encode()
                if None in known
                else bytes(byte for byte in known if byte is not None)
            )
        if match := _BYTE_TOKEN.fullmatch(piece):
            return bytes([int(match[1], 16)])
        return piece.replace(SPACE, " ").encode()

    def _require(self) -> Any:
        if self._tokenizer is None:
            raise FailedPrecondition(
                "no tokenizer: send token_ids or start with --tokenizer", reason="NO_TOKENIZER"
            )
        return self._tokenizer


def _check_characters(count: int) -> None:
    if count > MAX_CHARACTERS:
        raise InvalidArgument(
            f"the prompt has {count} characters; at most {MAX_CHARACTERS} are read"
        )


_FILES = re.compile(r".*\.(json|model|txt|jinja)")


def _hash(folder: Path) -> str:
    """SHA-256, in hex, of whatever a tokenizer may be made of."""
    digest = hashlib.sha256()
    for path in sorted(each for each in folder.iterdir() if _FILES.fullmatch(each.name)):
        digest.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _is_byte_level(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend is not None and "ByteLevel" in repr(backend.decoder)


def _byte_level_alphabet() -> dict[str, int]:
    """What byte-level BPE writes for each byte: itself if printable, else from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    alphabet.update({chr(256 + number): byte for number, byte in enumerate(others)})
    return alphabet
