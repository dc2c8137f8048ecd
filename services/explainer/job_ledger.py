"""What a job spends, written down before it is spent, and who it asks.

Before a call is sent, what the job has used with it at most is on disk. So a job that goes on after
a crash knows all that it may have spent, and its budget holds.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Self

from services.common.errors import Unavailable
from services.explainer.engine.budget import Budget, Ledger, Prices, Usage
from services.explainer.engine.prompts import Prompt
from services.explainer.engine.provider import OnText, Provider, ProviderAround, Reply
from services.explainer.engine.replies import FailureKind
from services.explainer.job_store import JobStore, StoredJob, Used

AWAY = (FailureKind.UNAVAILABLE, FailureKind.TIMED_OUT)
"""What an endpoint that is not there makes of a question, and what may pass."""


class EndpointAway(Unavailable):
    """The endpoint of the language model does not answer, and may do so later."""

    default_reason = "ENDPOINT_AWAY"


@dataclass
class JobLedger(Ledger):
    """The ledger of job `number`, which goes on with what is known of it in `store`."""

    number: int = field(kw_only=True)
    store: JobStore = field(kw_only=True, repr=False)

    @classmethod
    def of(cls, job: StoredJob, store: JobStore, budget: Budget, prices: Prices | None) -> Self:
        return cls(
            budget,
            prices,
            calls=job.used.calls,
            cached=job.used.cached_calls,
            bounded_calls=job.used.bounded_calls,
            prompt_tokens=job.used.prompt_tokens,
            completion_tokens=job.used.completion_tokens,
            number=job.number,
            store=store,
        )

    @property
    def used(self) -> Used:
        """What is used so far."""
        return Used(
            calls=self.calls,
            cached_calls=self.cached,
            bounded_calls=self.bounded_calls,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
        )

    @property
    def used_at_most(self) -> Used:
        """The same with the most that calls on their way can use."""
        pending = self.on_their_way
        return Used(
            calls=self.calls + len(pending),
            cached_calls=self.cached,
            bounded_calls=self.bounded_calls + len(pending),
            prompt_tokens=self.prompt_tokens + sum(each.prompt_tokens for each in pending),
            completion_tokens=self.completion_tokens
            + sum(each.completion_tokens for each in pending),
        )

    @asynccontextmanager
    async def reserve(self, most: Usage) -> AsyncIterator[None]:
        async with super().reserve(most):
            await self.store.set_used(self.number, self.used_at_most)
            yield


class PatientProvider(ProviderAround):
    """A provider that raises EndpointAway where there is nobody, instead of an answer that failed.

    Once one call found nobody, none is sent until `go_on`, not even one that waits for its turn. A
    `tolerant` one lets failures be: for a component that goes on failing while others do not.
    """

    def __init__(self, provider: Provider, *, tolerant: bool = False) -> None:
        super().__init__(provider)
        self._tolerant = tolerant
        self._away = False
        self._turns = asyncio.Semaphore(provider.at_once)

    def go_on(self) -> None:
        self._away = False

    def tolerant(self) -> "PatientProvider":
        return PatientProvider(self._provider, tolerant=True)

    async def complete(
        self, prompt: Prompt, ledger: Ledger, on_text: OnText | None = None
    ) -> Reply:
        """As any provider. Raises EndpointAway."""
        async with self._turns:
            if self._away:
                raise self._is_away()
            reply = await self._provider.complete(prompt, ledger, on_text)
        if reply.failure in AWAY and not self._tolerant:
            self._away = True
            raise self._is_away()
        return reply

    def _is_away(self) -> EndpointAway:
        return EndpointAway(f"{self.host} does not answer; the job goes on when it does")
