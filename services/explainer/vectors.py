"""Embeddings of one model in memory: which explanations are nearest to a query, exactly.

Vectors have length 1, so that a product is a cosine. They are kept in blocks that are filled one
after another and never copied; what was added to the store since is read before each question, and
once something was removed, all of it anew. What does not fit in memory is read from disk for each
question: slower, and no less right.
"""

import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MOST_BYTES = 2**30
_BLOCK_ROWS = 8192
_ROWS_AT_ONCE = 1024
_NUMBER = np.dtype("<f4")

Numbers = NDArray[np.int64]
Vector = NDArray[np.float32]


@dataclass
class _Block:
    explanations: Numbers
    vectors: NDArray[np.float32]
    used: int = 0

    def take(self, explanations: Numbers, vectors: NDArray[np.float32]) -> int:
        """Adds as many of these as there is room for; how many."""
        taken = min(len(explanations), len(self.explanations) - self.used)
        self.explanations[self.used : self.used + taken] = explanations[:taken]
        self.vectors[self.used : self.used + taken] = vectors[:taken]
        self.used += taken
        return taken


class Vectors:
    """Of one model. Its methods run within a transaction, in whichever thread."""

    def __init__(self, model: str, *, most_bytes: int = MOST_BYTES) -> None:
        self._model = model
        self._most_bytes = most_bytes
        self._lock = threading.Lock()
        self._forget(0, 0)

    def compare(
        self, connection: sqlite3.Connection, query: Vector
    ) -> tuple[Numbers, NDArray[np.float32]]:
        """The explanations that have an embedding, in no order, and the cosine of each.

        `query` has length 1; embeddings of another width than its are of another model.
        """
        with self._lock:
            (removed,) = connection.execute("SELECT count FROM embeddings_removed").fetchone()
            if (removed, query.size) != (self._removed, self._width):
                self._forget(removed, query.size)
            beyond = self._read(connection, query)
            found = [
                (block.explanations[: block.used].copy(), block.vectors[: block.used] @ query)
                for block in self._blocks
            ]
        explanations, cosines = zip(*found, *beyond, strict=True) if found or beyond else ((), ())
        return (
            np.concatenate([np.zeros(0, np.int64), *explanations]),
            np.concatenate([np.zeros(0, np.float32), *cosines]),
        )

    @property
    def bytes(self) -> int:
        """What is held in memory."""
        return sum(block.vectors.nbytes + block.explanations.nbytes for block in self._blocks)

    def _forget(self, removed: int, width: int) -> None:
        self._removed = removed
        self._width = width
        self._last = 0
        self._blocks: list[_Block] = []

    def _read(
        self, connection: sqlite3.Connection, query: Vector
    ) -> list[tuple[Numbers, NDArray[np.float32]]]:
        """Takes in what is new; of what there is no room for, the answers to `query`."""
        beyond: list[tuple[Numbers, NDArray[np.float32]]] = []
        for last, explanations, vectors in self._rows(connection):
            taken = 0 if beyond else self._keep(explanations, vectors)
            if taken < len(explanations):
                beyond.append((explanations[taken:], vectors[taken:] @ query))
            elif not beyond:
                self._last = last
        return beyond

    def _keep(self, explanations: Numbers, vectors: NDArray[np.float32]) -> int:
        """All of them or none, so that `_last` is where the next question goes on."""
        rows = len(explanations)
        room = sum(_BLOCK_ROWS - block.used for block in self._blocks[-1:])
        block_bytes = _BLOCK_ROWS * (self._width * _NUMBER.itemsize + 8)
        if rows > room and self.bytes + block_bytes > self._most_bytes:
            return 0
        taken = self._blocks[-1].take(explanations, vectors) if room else 0
        if taken < rows:
            block = _Block(
                np.zeros(_BLOCK_ROWS, np.int64), np.zeros((_BLOCK_ROWS, self._width), np.float32)
            )
            block.take(explanations[taken:], vectors[taken:])
            self._blocks.append(block)
        return rows

    def _rows(
        self, connection: sqlite3.Connection
    ) -> Iterator[tuple[int, Numbers, NDArray[np.float32]]]:
        """What the store has after `_last`: the last number, explanations, vectors [n, width]."""
        rows = connection.execute(
            "SELECT number, explanation, vector FROM embedding "
            "WHERE number > ? AND model = ? AND length(vector) = ? ORDER BY number",
            (self._last, self._model, self._width * _NUMBER.itemsize),
        )
        while some := rows.fetchmany(_ROWS_AT_ONCE):
            vectors = np.frombuffer(b"".join(row[2] for row in some), _NUMBER)
            explanations = np.array([row[1] for row in some], np.int64)
            yield some[-1][0], explanations, vectors.reshape(len(some), self._width)


def stored(vector: Vector) -> bytes:
    """A vector as the store keeps it."""
    return vector.astype(_NUMBER).tobytes()
