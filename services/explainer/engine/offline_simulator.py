"""The judge that asks nobody: it applies a token pattern, the same way every time."""

import re
from collections.abc import Sequence

from services.common.errors import FailedPrecondition, InvalidArgument
from services.explainer.engine.components import ACTIVE_SHARE
from services.explainer.engine.explanations import Explanation
from services.explainer.engine.judges import MarkedPair, MarkedText
from services.explainer.engine.replies import FailureKind
from services.explainer.engine.token_patterns import SCALE, TokenPattern


class OfflineSimulator:
    """Reads explanations that are token patterns, by whatever method they came."""

    name = "offline"

    async def detect(
        self, explanation: Explanation, texts: Sequence[tuple[str, ...]], *, seed: int
    ) -> list[float | FailureKind]:
        pattern = _pattern(explanation)
        return [_probability(max(pattern.on_tokens(text))) for text in texts]

    async def fuzz(
        self, explanation: Explanation, texts: Sequence[MarkedText], *, seed: int
    ) -> list[float | FailureKind]:
        pattern = _pattern(explanation)
        found: list[float | FailureKind] = []
        for text in texts:
            expected = pattern.on_tokens(text.token_texts)
            marked = [expected[place] for place in sorted(text.marked)]
            found.append(_probability(sum(marked) / max(len(marked), 1)))
        return found

    async def simulate(
        self, explanation: Explanation, text: tuple[str, ...], *, seed: int
    ) -> list[float] | FailureKind:
        return _pattern(explanation).on_tokens(text)

    async def compare(
        self, explanation: Explanation, first: str, second: str, *, seed: int
    ) -> float | FailureKind:
        pattern = _pattern(explanation)
        if not pattern.promoted:
            raise FailedPrecondition(
                "the token pattern says nothing of what the component promotes, so there is "
                "nothing to look for in steered text",
                reason="NOTHING_PROMOTED",
            )
        one, other = (_rate(pattern.promoted, text) for text in (first, second))
        return 0.5 if one == other else float(one > other)

    async def relate(
        self, explanation: Explanation, pairs: Sequence[MarkedPair], *, seed: int
    ) -> list[float | FailureKind]:
        pattern = _pattern(explanation)
        return [
            _probability(pattern.on_pair(pair.token_texts, pair.query, pair.key)) for pair in pairs
        ]


def _pattern(explanation: Explanation) -> TokenPattern:
    try:
        return TokenPattern.parse(explanation.text)
    except InvalidArgument as error:
        raise FailedPrecondition(
            f"the offline simulator reads token patterns only, and the text is {error.message}: "
            "score this explanation with a language model",
            reason="NEEDS_PROVIDER",
        ) from None


def _probability(strength: float) -> float:
    """Above a half exactly where the strength is what counts as active."""
    share = strength / SCALE
    return share / (share + ACTIVE_SHARE)


def _rate(tokens: Sequence[str], text: str) -> float:
    """How often the tokens stand in the text, per character."""
    found = 0
    for token in dict.fromkeys(tokens):
        ends_word = token[-1:].isalnum()
        found += len(re.findall(re.escape(token) + (r"(?!\w)" if ends_word else ""), text))
    return found / max(len(text), 1)
