"""Whoever answers prompts: the interface, and what an answer is."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from services.explainer.engine.budget import Ledger, Prices, Usage
from services.explainer.engine.prompts import Prompt
from services.explainer.engine.replies import FailureKind, Malformed, read

T = TypeVar("T")
OnText = Callable[[str], None]


@dataclass(frozen=True)
class TokenLogprobs:
    """A token of a reply, and what was likely in its place, with logprobs."""

    text: str
    alternatives: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Reply:
    """What a model said. `logprobs`: of the tokens of `text`, None where not offered.

    With a `failure` there is no answer, and `text` is not to be read.
    """

    text: str = ""
    logprobs: tuple[TokenLogprobs, ...] | None = None
    failure: FailureKind | None = None
    cached: bool = False

    def to_json(self) -> str:
        logprobs = self.logprobs and [[each.text, each.alternatives] for each in self.logprobs]
        return json.dumps({"text": self.text, "logprobs": logprobs})

    @classmethod
    def from_json(cls, text: str) -> "Reply":
        found = json.loads(text)
        logprobs = found["logprobs"] and tuple(
            TokenLogprobs(token, tuple((other, value) for other, value in alternatives))
            for token, alternatives in found["logprobs"]
        )
        return cls(found["text"], logprobs, cached=True)


class Provider(Protocol):
    """Answers prompts with one model of one endpoint."""

    @property
    def model(self) -> str: ...

    @property
    def host(self) -> str: ...

    @property
    def prices(self) -> Prices | None: ...

    @property
    def at_once(self) -> int:
        """How many calls it sends at once; others wait."""

    def most(self, prompt: Prompt) -> Usage:
        """The most that one call for this prompt can use."""

    async def complete(
        self, prompt: Prompt, ledger: Ledger, on_text: OnText | None = None
    ) -> Reply:
        """The reply, its cost in the ledger; with `on_text`, the text so far as it comes.

        What the model or the network does wrong is a reply with a failure. Raises BudgetExceeded
        before a call that might pass the budget, and ProviderMisconfigured.
        """


class ProviderAround:
    """The same model of the same endpoint; what is asked of it is the subclass's matter."""

    def __init__(self, provider: Provider) -> None:
        self._provider = provider

    @property
    def model(self) -> str:
        return self._provider.model

    @property
    def host(self) -> str:
        return self._provider.host

    @property
    def prices(self) -> Prices | None:
        return self._provider.prices

    @property
    def at_once(self) -> int:
        return self._provider.at_once

    def most(self, prompt: Prompt) -> Usage:
        return self._provider.most(prompt)


def answer(reply: Reply, prompt: Prompt) -> Any | FailureKind:
    """The value that a reply holds, by the prompt's schema; or why it holds none."""
    if reply.failure is not None:
        return reply.failure
    try:
        return read(reply.text, prompt.schema)
    except Malformed:
        return FailureKind.MALFORMED
