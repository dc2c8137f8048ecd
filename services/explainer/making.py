"""Explaining one component, and scoring an explanation: from its examples to what is stored.

    async for event in Maker(store, provider).explain(subject, task, ledger): ...

What comes is told as it comes, and is stored before it is told. Whoever stops listening ends the
work: what is stored is whole, and what was sent to a language model is in the ledger.
"""

import asyncio
import hashlib
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass

from tdb import __version__

from services.common.addresses import Kind, parse
from services.common.errors import (
    FailedPrecondition,
    InvalidArgument,
    TdbError,
    Unavailable,
    inside,
)
from services.explainer.components import Records, Subject
from services.explainer.engine import explainers
from services.explainer.engine.budget import Ledger
from services.explainer.engine.components import Component, Example
from services.explainer.engine.explainers import AnySplit
from services.explainer.engine.explanations import Explanation, Method, Provenance
from services.explainer.engine.provider import Provider
from services.explainer.engine.provider_settings import HOW_TO_CONFIGURE, ProviderNotConfigured
from services.explainer.engine.replies import FailureKind
from services.explainer.engine.scores import Scorer
from services.explainer.engine.splits import Half, Split, split_pairs, split_tokens
from services.explainer.scoring import (
    AWAY_S,
    JudgeChoice,
    Scorers,
    Scoring,
    Steering,
    asks_provider,
)
from services.explainer.store import ExplanationStore
from services.explainer.stored import (
    ExplainedModel,
    NewExplanation,
    StoredExplanation,
    StoredScore,
)

OF_HEADS = (Method.ATTENTION_HEAD, Method.OUTPUT_CENTRED, Method.TOKEN_PATTERN)
OF_OTHERS = (
    Method.TOKEN_ACTIVATION_PAIRS,
    Method.MAX_ACTIVATION_SUMMARY,
    Method.CONTRASTIVE,
    Method.OUTPUT_CENTRED,
    Method.TOKEN_PATTERN,
)
OFFLINE = Method.TOKEN_PATTERN
"""The method that asks nobody."""

TEXT_EVERY_S = 0.1
"""A text that is being written is told so often at most."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """How a component is explained; `author` asked for it."""

    method: Method
    seed: int = 0
    scoring: Scoring | None = None
    author: str

    @property
    def needs_read_outs(self) -> bool:
        """Whether what the component promotes is looked at."""
        return self.method in (Method.OUTPUT_CENTRED, Method.TOKEN_PATTERN)

    @property
    def is_about_read_outs(self) -> bool:
        """Whether there is no explanation without what the component promotes."""
        return self.method is Method.OUTPUT_CENTRED

    async def fetch(self, records: Records, dataset: str, component: str) -> Subject:
        """What is known of a component, as far as the task reads it."""
        return await records.fetch(
            dataset, component, read_outs=self.needs_read_outs, required=self.is_about_read_outs
        )

    @property
    def asks_provider(self) -> bool:
        """Whether a language model is asked for any of it."""
        pattern = self.method is OFFLINE
        scoring = self.scoring
        return not pattern or (scoring is not None and asks_provider(scoring.judge, pattern))

    def check(self, address: str) -> None:
        """Refuses what can never work. Raises InvalidArgument."""
        is_head = parse(address).kind is Kind.HEAD
        known = OF_HEADS if is_head else OF_OTHERS
        if self.method not in known:
            raise InvalidArgument(
                f"{address} is {'a head' if is_head else 'no head'}: it is not explained by "
                f"{self.method.value}, but by {', '.join(known)}",
                field="method",
            )
        if self.scoring is None:
            return
        with inside("scoring"):
            self.scoring.check(address)
            if self.method is not OFFLINE and self.scoring.judge is JudgeChoice.OFFLINE:
                raise InvalidArgument(
                    "the offline simulator reads token patterns, and not what a language model "
                    "writes: only a language model can judge that",
                    field="judge",
                )


@dataclass(frozen=True)
class Doing:
    """What is being done: `explaining`, or a scorer's name. `text` as far as it is written."""

    phase: str
    text: str = ""


@dataclass(frozen=True)
class Explained:
    """An explanation is stored."""

    explanation: StoredExplanation


@dataclass(frozen=True)
class ScoreStored:
    """A score is stored."""

    score: StoredScore


@dataclass(frozen=True)
class NotScored:
    """A score could not be made."""

    scorer: Scorer
    error: TdbError


Event = Doing | Explained | ScoreStored | NotScored


class Maker:
    """Makes explanations and scores, and stores them.

    None for `provider`: without a language model; for `steering`: without the intervention score.
    """

    def __init__(
        self,
        store: ExplanationStore,
        provider: Provider | None,
        steering: Steering | None = None,
    ) -> None:
        self._store = store
        self._provider = provider
        self._scorers = Scorers(provider, steering)

    async def explain(
        self, subject: Subject, task: Task, ledger: Ledger
    ) -> AsyncGenerator[Event, None]:
        """One explanation, and its scores where the task asks for them.

        Raises InvalidArgument; FailedPrecondition and Unavailable where no explanation comes; what
        the store, the provider and the budget raise.
        """
        task.check(subject.address)
        yield Doing("explaining")
        split = None
        if task.method is not Method.OUTPUT_CENTRED:
            split = await split_of(subject.component, task.seed)
        events = self._explanation(subject.component, split, task, ledger)
        async with aclosing(events):
            async for event in events:
                if isinstance(event, Doing):
                    yield event
                else:
                    explanation = event
        stored = await self._store.add(new_explanation(explanation, subject, task.author))
        yield Explained(stored)
        if task.scoring is not None:
            scores = self._scores(stored, explanation, subject, split, task.scoring, ledger)
            async with aclosing(scores):
                async for score in scores:
                    yield score

    async def score(
        self, stored: StoredExplanation, subject: Subject, scoring: Scoring, ledger: Ledger
    ) -> AsyncGenerator[Event, None]:
        """Scores of a stored explanation, each as it comes.

        Raises InvalidArgument; FailedPrecondition where the dataset is of another model or holds
        too few documents.
        """
        with inside("scoring"):
            scoring.check(stored.component)
        check_model(stored, subject)
        provenance = Provenance(
            method=stored.method,
            seed=stored.seed,
            documents=await self._store.documents(stored.id),
        )
        explanation = Explanation(stored.component, stored.text, provenance)
        split = None
        if set(scoring.scorers) != {Scorer.INTERVENTION}:
            seed = scoring.draw_seed(None) if stored.seed is None else stored.seed
            split = await split_of(subject.component, seed, provenance.documents)
        scores = self._scores(stored, explanation, subject, split, scoring, ledger)
        async with aclosing(scores):
            async for score in scores:
                yield score

    async def _explanation(
        self, component: Component, split: AnySplit | None, task: Task, ledger: Ledger
    ) -> AsyncGenerator[Doing | Explanation, None]:
        """The text as it is written, then the explanation."""
        if task.method is OFFLINE:
            assert split is not None
            yield await asyncio.to_thread(explainers.token_pattern, component, split)
            return
        if self._provider is None:
            raise ProviderNotConfigured(HOW_TO_CONFIGURE)
        text = _Text()
        asking = asyncio.ensure_future(
            explainers.explain(
                task.method,
                component,
                split or nothing_shown(component, task.seed),
                self._provider,
                ledger,
                seed=task.seed,
                on_text=text.write,
            )
        )
        try:
            async for so_far in text.until(asking):
                yield Doing("explaining", so_far)
            made = await asking
        finally:
            await _ended(asking)
        if isinstance(made, FailureKind):
            raise _not_explained(made, self._provider)
        yield made

    async def _scores(
        self,
        stored: StoredExplanation,
        explanation: Explanation,
        subject: Subject,
        split: AnySplit | None,
        scoring: Scoring,
        ledger: Ledger,
    ) -> AsyncGenerator[Event, None]:
        for scorer in scoring.scorers:
            yield Doing(scorer.value)
            try:
                if split is None and scorer is not Scorer.INTERVENTION:
                    split = await split_of(subject.component, stored.seed or 0)
                made = await self._scorers.score(
                    scorer, explanation, subject, split, scoring, ledger
                )
            except TdbError as error:
                yield NotScored(scorer, error)
                continue
            for score in await self._store.score(stored.id, made):
                yield ScoreStored(score)


async def split_of(
    component: Component, seed: int, shown: frozenset[str] = frozenset()
) -> AnySplit:
    """The examples dealt out by the seed, those of documents that were `shown` not for scoring.

    Raises FailedPrecondition (`TOO_FEW_DOCUMENTS`).
    """
    if component.is_head:
        return await asyncio.to_thread(split_pairs, component, seed=seed, shown=shown)
    return await asyncio.to_thread(split_tokens, component, seed=seed, shown=shown)


def check_model(stored: StoredExplanation, subject: Subject) -> None:
    """Raises FailedPrecondition where the dataset is of another model than the explanation."""
    explained, recorded = stored.model, subject.dataset.model
    if explained.weights_hash and recorded.weights_hash:
        same = explained.weights_hash == recorded.weights_hash
    else:
        same = explained.id == recorded.id
    dictionaries = {each.dictionary_hash(stored.component) for each in (explained, recorded)}
    if len(dictionaries - {""}) > 1:
        raise FailedPrecondition(
            f"the dictionary that {stored.component} is of has other weights in the dataset "
            f"{subject.dataset.name!r} than the one that the explanation is of",
            field="dataset",
            reason="OTHER_MODEL",
        )
    if not same:
        raise FailedPrecondition(
            f"the explanation is of the model {_named(explained)}, and the dataset "
            f"{subject.dataset.name!r} of {_named(recorded)}",
            field="dataset",
            reason="OTHER_MODEL",
        )


async def _ended(work: "asyncio.Future[Explanation | FailureKind]") -> None:
    """Ends it, and waits until it has: what it spent is in the ledger then."""
    work.cancel()
    await asyncio.wait([work])
    if not work.cancelled():
        work.exception()


class _Text:
    """A text that is being written: what is new of it is given out as often as may be told."""

    def __init__(self) -> None:
        self._text = ""
        self._changed = asyncio.Event()

    def write(self, text: str) -> None:
        if text != self._text:
            self._text = text
            self._changed.set()

    async def until(self, done: "asyncio.Future[Explanation | FailureKind]") -> AsyncIterator[str]:
        """The text each time that there is more of it, until `done`."""
        done.add_done_callback(lambda _: self._changed.set())
        while not done.done():
            await self._changed.wait()
            self._changed.clear()
            if self._text and not done.done():
                yield self._text
                await asyncio.wait([done], timeout=TEXT_EVERY_S)


def new_explanation(explanation: Explanation, subject: Subject, author: str) -> NewExplanation:
    """As it is stored. What comes out the same again is the same explanation."""
    provenance, dataset = explanation.provenance, subject.dataset
    parts = [
        dataset.model.id,
        dataset.model.weights_hash,
        explanation.component,
        explanation.text,
        provenance.method,
        provenance.model,
        provenance.provider,
        provenance.prompt_hash,
        provenance.seed,
        dataset.name,
        dataset.hash,
    ]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return NewExplanation(
        model=dataset.model,
        component=explanation.component,
        text=explanation.text,
        method=provenance.method,
        explainer_model=provenance.model,
        provider=provenance.provider,
        prompt_hash=provenance.prompt_hash,
        seed=provenance.seed,
        dataset=dataset.name,
        dataset_hash=dataset.hash,
        documents=provenance.documents,
        code_version=__version__,
        author=author,
        source_key=f"made/{digest}",
    )


def nothing_shown(component: Component, seed: int) -> Split[Example]:
    """For a method that is shown no example, so that none need be there."""
    nothing: Half[Example] = Half((), (), frozenset())
    return Split(component.address, nothing, nothing, 0.0, seed)


def _not_explained(failure: FailureKind, provider: Provider) -> TdbError:
    asked = f"{provider.model} at {provider.host}"
    reason = f"EXPLAINER_{failure.name}"
    match failure:
        case FailureKind.UNAVAILABLE | FailureKind.TIMED_OUT:
            return Unavailable(
                f"{asked} gave no answer ({failure.value}), however often it was asked",
                reason=reason,
                retry_after_s=AWAY_S,
            )
        case FailureKind.TRUNCATED:
            said = (
                "its reply was cut off; models that think before they answer need "
                "TDB_PROVIDER_THINKING_TOKENS"
            )
        case FailureKind.MALFORMED:
            said = "its reply is not the JSON that was asked for"
        case FailureKind.REFUSED:
            said = "it refuses to answer"
        case FailureKind.REJECTED:
            said = "the endpoint rejects the question"
    return FailedPrecondition(f"{asked} gave no explanation: {said}", reason=reason)


def _named(model: ExplainedModel) -> str:
    return f"{model.id} ({model.weights_hash[:12] or 'no hash known'})"
