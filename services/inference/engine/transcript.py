"""Transcripts: tokens as they come, and the text that becomes readable with each of them."""

import codecs
from collections.abc import Sequence

from services.inference.engine.text import Vocabulary


class Transcript:
    """The text of a growing list of tokens. Bytes of a character wait until it is complete."""

    def __init__(self, vocabulary: Vocabulary, stops: Sequence[str] = ()) -> None:
        """`stops` are texts to look for, none empty."""
        self._vocabulary = vocabulary
        self._stops = [stop.encode() for stop in stops]
        self._longest = max(map(len, self._stops), default=0)
        self._tail = b""
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.stopped = False
        """Whether one of the stop texts occurs in the tokens so far."""

    def add(self, token_id: int) -> str:
        """What became readable with this token."""
        token = self._vocabulary.token(token_id)
        if self._vocabulary.facts is None:
            return token.text
        self._tail += token.raw
        self.stopped = self.stopped or any(stop in self._tail for stop in self._stops)
        self._tail = self._tail[-self._longest :] if self._longest else b""
        return self._decoder.decode(token.raw)

    def end(self) -> str:
        """A sign for the incomplete character that still waits, if there is one."""
        return self._decoder.decode(b"", final=True)
