"""Whoever answers a scorer's questions, and what the questions are about.

A judge reads an explanation and says what it expects. There are two: `ProviderJudge`, a language
model, and `OfflineSimulator`, which reads a token pattern and asks nobody. Every answer is a number
or, where there is none, why.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from services.explainer.engine.explanations import Explanation
from services.explainer.engine.replies import FailureKind


@dataclass(frozen=True)
class MarkedText:
    """A text of which some tokens are marked."""

    token_texts: tuple[str, ...]
    marked: frozenset[int]


@dataclass(frozen=True)
class MarkedPair:
    """A text and, in it, the pair in which a head reads from `query` and looks at `key`."""

    token_texts: tuple[str, ...]
    query: int
    key: int


class Judge(Protocol):
    """Says what an explanation leads one to expect. `seed` makes the same question the same."""

    @property
    def name(self) -> str: ...

    async def detect(
        self, explanation: Explanation, texts: Sequence[tuple[str, ...]], *, seed: int
    ) -> list[float | FailureKind]:
        """For each text [T tokens], the probability that it activates the component."""

    async def fuzz(
        self, explanation: Explanation, texts: Sequence[MarkedText], *, seed: int
    ) -> list[float | FailureKind]:
        """For each text, the probability that its marked tokens are those that fire."""

    async def simulate(
        self, explanation: Explanation, text: tuple[str, ...], *, seed: int
    ) -> list[float] | FailureKind:
        """The expected activation at each token, 0..10."""

    async def compare(
        self, explanation: Explanation, first: str, second: str, *, seed: int
    ) -> float | FailureKind:
        """The probability that the component was amplified in `first`, rather than in `second`."""

    async def relate(
        self, explanation: Explanation, pairs: Sequence[MarkedPair], *, seed: int
    ) -> list[float | FailureKind]:
        """For each pair, the probability that the head attends strongly from query to key."""
