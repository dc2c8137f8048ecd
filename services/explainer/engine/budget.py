"""What calls cost, and the point at which no more are made.

A `Ledger` counts one job. Before a call its largest possible cost is set aside, and the call is
made only if everything set aside and spent stays within the budget; afterwards the true cost takes
its place. So a budget is never passed, however many calls are on their way at once.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from services.common.errors import FailedPrecondition, InvalidArgument


class BudgetExceeded(FailedPrecondition):
    """The next call might cost more than is left: nothing further is sent."""

    default_reason = "BUDGET_EXCEEDED"


@dataclass(frozen=True)
class Prices:
    """US dollars per million tokens, of the question and of the reply."""

    prompt: float
    completion: float


@dataclass(frozen=True)
class Usage:
    """Tokens of one call. `bounded`: the endpoint did not say, so this is the most it can be."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    bounded: bool = False

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def cost(self, prices: Prices) -> float:
        """US dollars."""
        prompt = self.prompt_tokens * prices.prompt
        return (prompt + self.completion_tokens * prices.completion) / 1e6


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The most one job may use; None: no limit of this sort. `max_cost` is in US dollars."""

    max_tokens: int | None = None
    max_cost: float | None = None

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 0:
            raise InvalidArgument("must not be negative", field="max_tokens")
        if self.max_cost is not None and not 0 <= self.max_cost < float("inf"):
            raise InvalidArgument("must be finite and not negative", field="max_cost")


@dataclass
class Ledger:
    """The account of one job: calls that were sent, answers from the cache, tokens, dollars.

    `cost` is None where prices are unknown. `bounded_calls` of the calls are counted at the most
    they can have used.
    """

    budget: Budget = field(default_factory=Budget)
    prices: Prices | None = None
    calls: int = 0
    cached: int = 0
    retries: int = 0
    bounded_calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    _set_aside: list[Usage] = field(default_factory=list, repr=False)
    _settled: asyncio.Event = field(default_factory=asyncio.Event, repr=False)

    def __post_init__(self) -> None:
        if self.budget.max_cost is not None and self.prices is None:
            raise FailedPrecondition(
                "a budget in dollars needs the model's prices: set TDB_PROVIDER_PRICES to "
                "PROMPT,COMPLETION in dollars per million tokens, or give a budget in tokens",
                field="max_cost",
                reason="NO_PRICES",
            )

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    @property
    def cost(self) -> float | None:
        if self.prices is None:
            return None
        return Usage(self.prompt_tokens, self.completion_tokens).cost(self.prices)

    @asynccontextmanager
    async def reserve(self, most: Usage) -> AsyncIterator[None]:
        """Sets the most that a call can use aside while it runs.

        Waits for calls on their way where their true cost may leave room. Raises BudgetExceeded.
        """
        while refusal := self._refusal(most):
            if not self._set_aside:
                raise refusal
            self._settled.clear()
            await self._settled.wait()
        self._set_aside.append(most)
        try:
            yield
        finally:
            self._set_aside.remove(most)
            self._settled.set()

    @property
    def on_their_way(self) -> tuple[Usage, ...]:
        """The most that each call can use that is on its way."""
        return tuple(self._set_aside)

    async def settled(self) -> None:
        """Waits until no call is on its way."""
        while self._set_aside:
            self._settled.clear()
            await self._settled.wait()

    def spend(self, usage: Usage) -> None:
        self.calls += 1
        self.bounded_calls += usage.bounded
        self.prompt_tokens += usage.prompt_tokens
        self.completion_tokens += usage.completion_tokens

    def _refusal(self, most: Usage) -> BudgetExceeded | None:
        pending = [*self._set_aside, most]
        tokens = self.tokens + sum(each.tokens for each in pending)
        if self.budget.max_tokens is not None and tokens > self.budget.max_tokens:
            return BudgetExceeded(
                f"the budget of {self.budget.max_tokens} tokens has {self.tokens} spent and cannot "
                f"take a call of up to {most.tokens}"
            )
        if self.budget.max_cost is None or self.prices is None:
            return None
        cost = (self.cost or 0.0) + sum(each.cost(self.prices) for each in pending)
        if cost > self.budget.max_cost:
            return BudgetExceeded(
                f"the budget of ${self.budget.max_cost:g} has ${self.cost:.6f} spent and cannot "
                f"take a call of up to ${most.cost(self.prices):.6f}"
            )
        return None
