"""Which scores there are for what, who answers their questions, and asking them.

A judge is chosen by what is judged: the offline simulator reads token patterns and asks nobody, a
language model reads every other text.
"""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any, Protocol, TypeVar

from tdb import __version__

from services.common.addresses import Kind, parse
from services.common.errors import (
    FailedPrecondition,
    InvalidArgument,
    TdbError,
    Unavailable,
    Unimplemented,
)
from services.explainer.components import Subject
from services.explainer.engine import scorers
from services.explainer.engine.budget import Ledger
from services.explainer.engine.explainers import AnySplit
from services.explainer.engine.explanations import Explanation
from services.explainer.engine.intervention import Generate, intervention
from services.explainer.engine.judges import Judge
from services.explainer.engine.offline_simulator import OfflineSimulator
from services.explainer.engine.provider import Provider
from services.explainer.engine.provider_judge import ProviderJudge
from services.explainer.engine.provider_settings import HOW_TO_CONFIGURE, ProviderNotConfigured
from services.explainer.engine.replies import FailureKind
from services.explainer.engine.scores import Score, Scorer
from services.explainer.engine.token_patterns import TokenPattern
from services.explainer.stored import NewScore

T = TypeVar("T")

MAX_ITEMS = 200
PROMPTS = 8
"""Prompts of an intervention score."""
AWAY_S = 30.0
"""When to come back to an endpoint that does not answer."""

_OF_HEADS = (Scorer.HEAD_PAIRS, Scorer.INTERVENTION)
_OF_OTHERS = (Scorer.DETECTION, Scorer.FUZZING, Scorer.SIMULATION, Scorer.INTERVENTION)


class JudgeChoice(StrEnum):
    """Who answers; DEFAULT: the offline simulator for token patterns, a language model else."""

    DEFAULT = "default"
    OFFLINE = "offline"
    PROVIDER = "provider"


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """What an explanation is scored with, `items` of each class and draws by `seed`.

    Without `items`, as many as the scorer takes; without `seed`, that of the explanation, or 0.
    """

    scorers: tuple[Scorer, ...]
    judge: JudgeChoice = JudgeChoice.DEFAULT
    items: int | None = None
    seed: int | None = None

    def draw_seed(self, explanation_seed: int | None) -> int:
        return self.seed if self.seed is not None else explanation_seed or 0

    def check(self, address: str) -> None:
        """Raises InvalidArgument where a scorer is not for such a component."""
        is_head = parse(address).kind is Kind.HEAD
        known = _OF_HEADS if is_head else _OF_OTHERS
        for number, scorer in enumerate(self.scorers):
            if scorer not in known:
                raise InvalidArgument(
                    f"{address} is {'a head' if is_head else 'no head'}: it has no score "
                    f"{scorer.value}, but {', '.join(known)}",
                    field=f"scorers[{number}]",
                )


class Steering(Protocol):
    """What the intervention score needs of the model."""

    async def prepare(
        self, subject: Subject, *, prompts: int, seed: int, shown: frozenset[str]
    ) -> tuple[Sequence[str], Generate]:
        """At most so many prompts, of no document in `shown`, and what makes the model go on with
        one: with the component amplified, and without. Raises TdbError where the model that the
        dataset is of cannot be asked."""


class Scorers:
    """Scores explanations; None for `provider`: without a language model, for `steering`: without
    the intervention score."""

    def __init__(self, provider: Provider | None, steering: Steering | None = None) -> None:
        self._provider = provider
        self._steering = steering

    async def score(
        self,
        scorer: Scorer,
        explanation: Explanation,
        subject: Subject,
        split: AnySplit | None,
        scoring: Scoring,
        ledger: Ledger,
    ) -> list[NewScore]:
        """One score per measure of the scorer. Only the intervention score needs no split.

        Raises FailedPrecondition where the explanation cannot be scored so, Unavailable where
        nobody answers, and what the provider and the budget raise.
        """
        judge = judge_of(scoring.judge, explanation.text, self._provider, ledger)
        seed = scoring.draw_seed(explanation.provenance.seed)
        if scorer is Scorer.INTERVENTION:
            made = await self._intervention(explanation, subject, judge, scoring, seed)
        else:
            assert split is not None
            count = scoring.items or scorers.COUNT
            asked = partial(
                scorers.score, scorer, explanation, split, judge, seed=seed, count=count
            )
            made = await off_the_loop(asked, judge)
        if all(each.n == 0 for each in made) and any(each.failed for each in made):
            raise _nobody_answered(made, judge)
        return [new_score(each, subject) for each in made]

    async def _intervention(
        self, explanation: Explanation, subject: Subject, judge: Judge, scoring: Scoring, seed: int
    ) -> tuple[Score, ...]:
        if self._steering is None:
            raise Unimplemented(
                "the intervention score is not part of this version", reason="NOT_BUILT"
            )
        prompts, generate = await self._steering.prepare(
            subject,
            prompts=scoring.items or PROMPTS,
            seed=seed,
            shown=explanation.provenance.documents,
        )
        return (await intervention(explanation, prompts, generate, judge, seed=seed),)


def judge_of(
    choice: JudgeChoice, text: str, provider: Provider | None, ledger: Ledger
) -> ProviderJudge | OfflineSimulator:
    """Who answers about an explanation with this text. Raises ProviderNotConfigured."""
    if not asks_provider(choice, is_pattern(text)):
        return OfflineSimulator()
    if provider is None:
        raise ProviderNotConfigured(HOW_TO_CONFIGURE)
    return ProviderJudge(provider, ledger)


def asks_provider(choice: JudgeChoice, pattern: bool) -> bool:
    """Whether a language model answers about a text that is or is not a token pattern."""
    if choice is JudgeChoice.DEFAULT:
        return not pattern
    return choice is JudgeChoice.PROVIDER


def is_pattern(text: str) -> bool:
    """Whether the offline simulator can read it."""
    try:
        TokenPattern.parse(text)
    except InvalidArgument:
        return False
    return True


async def off_the_loop(work: Callable[[], Coroutine[Any, Any, T]], judge: Judge) -> T:
    """The result of `work`: in a thread where nobody is waited for and all is arithmetic."""
    if isinstance(judge, OfflineSimulator):
        return await asyncio.to_thread(lambda: asyncio.run(work()))
    return await work()


def _nobody_answered(made: Sequence[Score], judge: Judge) -> TdbError:
    failures = made[0].failures
    counted = ", ".join(f"{count} {kind.value}" for kind, count in failures.items())
    sentence = f"{judge.name} answered none of the questions: {counted}"
    if failures.keys() <= {FailureKind.UNAVAILABLE, FailureKind.TIMED_OUT}:
        return Unavailable(sentence, reason="NO_ANSWERS", retry_after_s=AWAY_S)
    return FailedPrecondition(sentence, reason="NO_ANSWERS")


def new_score(score: Score, subject: Subject) -> NewScore:
    """As it is stored."""
    return NewScore(
        **vars(score),
        dataset=subject.dataset.name,
        dataset_hash=subject.dataset.hash,
        code_version=__version__,
    )
