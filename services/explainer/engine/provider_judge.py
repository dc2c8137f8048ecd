"""The judge that is a language model.

Grades run from 0 to 10. Where the endpoint gives logprobs, a grade is its expected value over the
alternatives of its token, so that a model in doubt says so; otherwise it is the number as written.
Texts go in batches, and an answer that does not have exactly one grade for each is no answer to any
of them.
"""

import asyncio
import math
import re
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from services.explainer.engine import instructions
from services.explainer.engine.budget import Ledger
from services.explainer.engine.explanations import Explanation
from services.explainer.engine.judges import MarkedPair, MarkedText
from services.explainer.engine.prompts import Prompt, ask, integer, list_of, object_of
from services.explainer.engine.provider import Provider, Reply, answer
from services.explainer.engine.replies import FailureKind

BATCH = 5
_TOP = 10
_GRADES = object_of(answers=list_of(object_of(id=integer(1, 1000), grade=integer(0, _TOP))))
_ACTIVATIONS = object_of(
    activations=list_of(object_of(token=integer(1, 100_000), activation=integer(0, _TOP)))
)
_CHOICE = object_of(grade=integer(0, _TOP))

T = TypeVar("T")


class ProviderJudge:
    """Asks `provider` at the expense of `ledger`."""

    def __init__(self, provider: Provider, ledger: Ledger, *, batch: int = BATCH) -> None:
        self._provider = provider
        self._ledger = ledger
        self._batch = batch

    @property
    def name(self) -> str:
        return self._provider.model

    async def detect(
        self, explanation: Explanation, texts: Sequence[tuple[str, ...]], *, seed: int
    ) -> list[float | FailureKind]:
        items = ["".join(text) for text in texts]
        return await self._grades("detect", instructions.DETECT, explanation, items, seed)

    async def fuzz(
        self, explanation: Explanation, texts: Sequence[MarkedText], *, seed: int
    ) -> list[float | FailureKind]:
        items = [segments(text.token_texts, dict.fromkeys(text.marked, "marked")) for text in texts]
        return await self._grades("fuzz", instructions.FUZZ, explanation, items, seed)

    async def relate(
        self, explanation: Explanation, pairs: Sequence[MarkedPair], *, seed: int
    ) -> list[float | FailureKind]:
        items = [pair_segments(pair) for pair in pairs]
        return await self._grades("relate", instructions.RELATE, explanation, items, seed)

    async def simulate(
        self, explanation: Explanation, text: tuple[str, ...], *, seed: int
    ) -> list[float] | FailureKind:
        tokens = [{"token": number, "text": token} for number, token in enumerate(text, start=1)]
        prompt = ask(
            "simulate",
            instructions.SIMULATE,
            tokens,
            _ACTIVATIONS,
            max_tokens=64 + 24 * len(text),
            seed=seed,
            given=explanation.text,
            logprobs=True,
        )
        reply = await self._provider.complete(prompt, self._ledger)
        found = answer(reply, prompt)
        if isinstance(found, FailureKind):
            return found
        said = [(each["token"], each["activation"]) for each in found["activations"]]
        return _by_number(said, expected_numbers(reply, "activation"), len(text))

    async def compare(
        self, explanation: Explanation, first: str, second: str, *, seed: int
    ) -> float | FailureKind:
        prompt = ask(
            "compare",
            instructions.COMPARE,
            {"first": first, "second": second},
            _CHOICE,
            max_tokens=32,
            seed=seed,
            given=explanation.text,
            logprobs=True,
        )
        reply = await self._provider.complete(prompt, self._ledger)
        found = answer(reply, prompt)
        if isinstance(found, FailureKind):
            return found
        expected = expected_numbers(reply, "grade")
        return (expected[0] if expected else float(found["grade"])) / _TOP

    async def _grades(
        self, name: str, task: str, explanation: Explanation, items: Sequence[object], seed: int
    ) -> list[float | FailureKind]:
        batches = [items[at : at + self._batch] for at in range(0, len(items), self._batch)]
        graded = await all_of(
            [self._grade(name, task, explanation, batch, seed) for batch in batches]
        )
        return [each for batch in graded for each in batch]

    async def _grade(
        self, name: str, task: str, explanation: Explanation, items: Sequence[object], seed: int
    ) -> list[float | FailureKind]:
        prompt: Prompt = ask(
            name,
            task,
            [{"id": number, "text": item} for number, item in enumerate(items, start=1)],
            _GRADES,
            max_tokens=64 + 24 * len(items),
            seed=seed,
            given=explanation.text,
            logprobs=True,
        )
        reply = await self._provider.complete(prompt, self._ledger)
        found = answer(reply, prompt)
        if isinstance(found, FailureKind):
            return [found] * len(items)
        said = [(each["id"], each["grade"]) for each in found["answers"]]
        grades = _by_number(said, expected_numbers(reply, "grade"), len(items))
        if isinstance(grades, FailureKind):
            return [grades] * len(items)
        return [grade / _TOP for grade in grades]


def _by_number(
    said: Sequence[tuple[int, int]], expected: Sequence[float] | None, count: int
) -> list[float] | FailureKind:
    """The numbers for 1..count in order; MALFORMED unless each is there exactly once."""
    if sorted(number for number, _ in said) != list(range(1, count + 1)):
        return FailureKind.MALFORMED
    values = expected if expected is not None else [float(value) for _, value in said]
    numbered = zip((number for number, _ in said), values, strict=True)
    return [value for _, value in sorted(numbered)]


def expected_numbers(reply: Reply, key: str) -> list[float] | None:
    """The expected value of each number under `key` in a reply, in the order of the text.

    None where the reply has no logprobs that fit its text. A number that is not one token of its
    own is taken as written. The reply has been read by a schema without strings, so that a key
    cannot stand in one.
    """
    if reply.logprobs is None or "".join(each.text for each in reply.logprobs) != reply.text:
        return None
    starts: dict[int, int] = {}
    at = 0
    for number, each in enumerate(reply.logprobs):
        starts[at + len(each.text) - len(each.text.lstrip())] = number
        at += len(each.text)
    found = []
    for match in re.finditer(rf'"{key}"\s*:\s*([0-9]+)', reply.text):
        token = reply.logprobs[starts[match.start(1)]] if match.start(1) in starts else None
        whole = token is not None and token.text.strip() == match[1]
        weights = [
            (int(text.strip()), math.exp(logprob))
            for text, logprob in (token.alternatives if whole and token else ())
            if re.fullmatch(r"[0-9]|10", text.strip())
        ]
        total = sum(weight for _, weight in weights)
        if total > 0:
            found.append(sum(value * weight for value, weight in weights) / total)
        else:
            found.append(float(match[1]))
    return found


def segments(texts: Sequence[str], names: dict[int, str]) -> list[str | dict[str, str]]:
    """A text in pieces: plain strings, and objects for the tokens that have a name.

    What is marked is told by structure, so that no sign within the text can pretend to be a mark.
    """
    found: list[str | dict[str, str]] = []
    last = ""
    for place, text in enumerate(texts):
        name = names.get(place, "")
        piece = found[-1] if found and name == last else None
        if isinstance(piece, dict):
            piece[name] += text
        elif isinstance(piece, str):
            found[-1] = piece + text
        else:
            found.append({name: text} if name else text)
        last = name
    return found


def pair_segments(pair: MarkedPair) -> list[str | dict[str, str]]:
    """The text of a pair up to its query, with the token it reads from and the one it looks at."""
    if pair.query == pair.key:
        names = {pair.query: "from_and_to"}
    else:
        names = {pair.query: "from", pair.key: "to"}
    return segments(pair.token_texts[: pair.query + 1], names)


async def all_of(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All results in order. The first error is raised once all are done: calls on their way have
    been paid for, and their replies are worth keeping."""
    found = await asyncio.gather(*work, return_exceptions=True)
    results = []
    for each in found:
        if isinstance(each, BaseException):
            raise each
        results.append(each)
    return results
