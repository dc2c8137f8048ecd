"""The calls that explain, score and simulate: what is asked for, and what comes, as messages."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

from tdb.explainer.v1 import explain_pb2

from services.common.errors import TdbError, inside
from services.explainer import requests, simulating, wire
from services.explainer.components import Records
from services.explainer.engine.budget import Budget, Ledger
from services.explainer.engine.explanations import Method
from services.explainer.engine.provider import Provider
from services.explainer.engine.provider_settings import HOW_TO_CONFIGURE, ProviderNotConfigured
from services.explainer.explanation_calls import user
from services.explainer.making import Doing, Event, Explained, Maker, NotScored, ScoreStored
from services.explainer.scoring import Steering, asks_provider, is_pattern
from services.explainer.store import ExplanationStore
from services.explainer.stored import StoredExplanation

DOCUMENTS_UNKNOWN = (
    "nobody knows which documents the author of this text has seen: if some of those it was scored "
    "on are among them, the scores are too good"
)


class MakingCalls:
    """Explains and scores at the expense of the call; None for `provider`: without a language
    model, for `steering`: without the intervention score."""

    def __init__(
        self,
        store: ExplanationStore,
        records: Records,
        provider: Provider | None,
        steering: Steering | None = None,
    ) -> None:
        self._store = store
        self._records = records
        self._provider = provider
        self._maker = Maker(store, provider, steering)

    async def explain(
        self, request: explain_pb2.ExplainRequest
    ) -> AsyncGenerator[explain_pb2.ExplainResponse, None]:
        dataset = requests.dataset(request.dataset)
        task = requests.task(request, user())
        ledger = self._ledger(requests.budget(request), asks=task.asks_provider)
        yield explain_pb2.ExplainResponse(progress=_progress("reading", ledger))
        subject = await task.fetch(self._records, dataset, request.component)
        summary = explain_pb2.ExplainSummary()
        async with aclosing(self._maker.explain(subject, task, ledger)) as events:
            async for event in _told(events):
                match event:
                    case TdbError():
                        yield explain_pb2.ExplainResponse(progress=_progress("explaining", ledger))
                        raise event
                    case Doing():
                        progress = _progress(event.phase, ledger, event.text)
                        yield explain_pb2.ExplainResponse(progress=progress)
                    case Explained():
                        explanation = wire.explanation(event.explanation)
                        yield explain_pb2.ExplainResponse(explanation=explanation)
                    case ScoreStored():
                        yield explain_pb2.ExplainResponse(score=wire.score(event.score))
                    case NotScored():
                        summary.unscored.append(_unscored(event))
        summary.usage.CopyFrom(wire.usage(ledger))
        yield explain_pb2.ExplainResponse(summary=summary)

    async def score(
        self, request: explain_pb2.ScoreRequest
    ) -> AsyncGenerator[explain_pb2.ScoreResponse, None]:
        """Raises what the first score raised where there is none at all."""
        with inside("id"):
            id = requests.id(request.id)
        dataset = requests.dataset(request.dataset)
        with inside("scoring"):
            scoring = requests.scoring(request.scoring)
        budget = requests.budget(request)
        stored = await self._store.get(id)
        with inside("scoring"):
            scoring.check(stored.component)
        asks = asks_provider(scoring.judge, is_pattern(stored.text))
        ledger = self._ledger(budget, asks=asks)
        yield explain_pb2.ScoreResponse(progress=_progress("reading", ledger))
        try:
            subject = await self._records.fetch(dataset, stored.component, read_outs=False)
        except TdbError as error:
            # The request names none: the dataset is what lacks it.
            error.field = error.field.replace("component", "dataset")
            raise
        summary = explain_pb2.ExplainSummary(warnings=_warnings(stored))
        refused: TdbError | None = None
        phase, scores = "reading", 0
        async with aclosing(self._maker.score(stored, subject, scoring, ledger)) as events:
            async for event in events:
                match event:
                    case Doing():
                        phase = event.phase
                        yield explain_pb2.ScoreResponse(progress=_progress(phase, ledger))
                    case ScoreStored():
                        scores += 1
                        yield explain_pb2.ScoreResponse(score=wire.score(event.score))
                    case NotScored():
                        refused = refused or event.error
                        summary.unscored.append(_unscored(event))
        if refused is not None and not scores:
            yield explain_pb2.ScoreResponse(progress=_progress(phase, ledger))
            raise refused
        summary.usage.CopyFrom(wire.usage(ledger))
        yield explain_pb2.ScoreResponse(summary=summary)

    async def simulate(self, request: explain_pb2.SimulateRequest) -> explain_pb2.SimulateResponse:
        wanted = requests.simulate(request)
        budget = requests.budget(request)
        text = wanted.text
        if wanted.id:
            stored = await self._store.get(wanted.id)
            simulating.check_kind(stored.component)
            text = stored.text
        choice = wire.JUDGES[request.judge]
        ledger = self._ledger(budget, asks=asks_provider(choice, is_pattern(text)))
        judge, found = await simulating.simulate(
            text, wanted.texts, choice, self._provider, ledger, seed=wanted.seed
        )
        return explain_pb2.SimulateResponse(
            texts=[
                explain_pb2.SimulatedText(expected=each)
                if isinstance(each, list)
                else explain_pb2.SimulatedText(failure=each.value)
                for each in found
            ],
            judge=judge,
            usage=wire.usage(ledger),
        )

    def _ledger(self, budget: Budget, *, asks: bool) -> Ledger:
        """The account of a call. Raises ProviderNotConfigured where there is nobody to ask, and
        FailedPrecondition for a budget in dollars without prices."""
        if not asks:
            return Ledger()
        if self._provider is None:
            raise ProviderNotConfigured(HOW_TO_CONFIGURE)
        with inside("budget"):
            return Ledger(budget, self._provider.prices)


async def _told(events: AsyncGenerator[Event, None]) -> AsyncIterator[Event | TdbError]:
    """The events, and as the last one what ended them: what was used until then is still said."""
    try:
        async for event in events:
            yield event
    except TdbError as error:
        yield error


def _progress(phase: str, ledger: Ledger, text: str = "") -> explain_pb2.ExplainProgress:
    return explain_pb2.ExplainProgress(phase=phase, text=text, usage=wire.usage(ledger))


def _unscored(event: NotScored) -> explain_pb2.UnscoredReason:
    return explain_pb2.UnscoredReason(
        scorer=wire.scorer_number(event.scorer),
        reason=event.error.reason,
        message=event.error.message,
    )


def _warnings(stored: StoredExplanation) -> list[str]:
    unknown = stored.method in (Method.HUMAN, Method.IMPORTED) and not stored.documents
    return [DOCUMENTS_UNKNOWN] if unknown else []
