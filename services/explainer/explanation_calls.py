"""The calls that read, write, rate and delete explanations."""

import asyncio
import logging

from tdb import __version__
from tdb.explainer.v1 import explanation_pb2

from services.common import calls
from services.common.errors import InvalidArgument, NotFound, inside
from services.explainer import requests, wire
from services.explainer.engine.explanations import Method
from services.explainer.store import ExplanationStore
from services.explainer.stored import NewExplanation, StoredExplanation

MOST_LISTED = 20_000
MOST_BYTES = 15 * 2**20
"""Of an answer; messages have at most 16 MiB."""

_log = logging.getLogger("tdb.explainer")


class ExplanationCalls:
    """Answers requests from the store, for the user who calls."""

    def __init__(self, store: ExplanationStore) -> None:
        self._store = store

    async def list(
        self, request: explanation_pb2.ListExplanationsRequest
    ) -> explanation_pb2.ListExplanationsResponse:
        with inside("model"):
            model = requests.model(request.model)
        with inside("components"):
            components = requests.components(request.components)
        found = await self._store.list(
            model, components, best_only=request.best_only, user=user(), most=MOST_LISTED
        )
        return await asyncio.to_thread(_listed, found)

    async def get(
        self, request: explanation_pb2.GetExplanationRequest
    ) -> explanation_pb2.GetExplanationResponse:
        with inside("id"):
            id = requests.id(request.id)
        stored = await self._store.get(id, user=user())
        return explanation_pb2.GetExplanationResponse(explanation=wire.explanation(stored))

    async def write(
        self, request: explanation_pb2.WriteExplanationRequest
    ) -> explanation_pb2.WriteExplanationResponse:
        wanted = requests.write(request)
        if wanted.model is None:
            try:
                base = await self._store.get(wanted.based_on)
            except NotFound as error:
                error.field = "based_on"
                raise
            new = await self._edit(base, wanted.text)
        else:
            new = NewExplanation(
                model=wanted.model,
                component=wanted.component,
                text=wanted.text,
                method=Method.HUMAN,
                code_version=__version__,
                author=user(),
            )
        stored = await self._store.add(new, user=user())
        return explanation_pb2.WriteExplanationResponse(explanation=wire.explanation(stored))

    async def _edit(self, base: StoredExplanation, text: str) -> NewExplanation:
        """The text stands on what the other was made from, so no score may use that."""
        return NewExplanation(
            model=base.model,
            component=base.component,
            text=text,
            method=Method.HUMAN,
            seed=base.seed,
            dataset=base.dataset,
            dataset_hash=base.dataset_hash,
            documents=await self._store.documents(base.id),
            code_version=__version__,
            author=user(),
            based_on=base.id,
        )

    async def rate(
        self, request: explanation_pb2.RateExplanationRequest
    ) -> explanation_pb2.RateExplanationResponse:
        with inside("id"):
            id = requests.id(request.id)
        rating = requests.rating(request)
        ratings = await self._store.rate(id, rating, user=user())
        return explanation_pb2.RateExplanationResponse(ratings=wire.ratings(ratings))

    async def delete(
        self, request: explanation_pb2.DeleteExplanationRequest
    ) -> explanation_pb2.DeleteExplanationResponse:
        """Whoever may call may delete, and it is said who did."""
        with inside("id"):
            id = requests.id(request.id)
        await self._store.delete(id)
        _log.info("an explanation was deleted", extra={"fields": {"user": user(), "id": id}})
        return explanation_pb2.DeleteExplanationResponse()


def user() -> str:
    """Who calls."""
    call = calls.current()
    return call.user if call else calls.LOCAL_USER


def _listed(found: list[StoredExplanation]) -> explanation_pb2.ListExplanationsResponse:
    response = explanation_pb2.ListExplanationsResponse(
        explanations=[wire.explanation(each) for each in found[:MOST_LISTED]]
    )
    if len(found) > MOST_LISTED or response.ByteSize() > MOST_BYTES:
        raise InvalidArgument(
            f"these components have more explanations than one answer holds ({MOST_LISTED} of "
            f"them, {MOST_BYTES // 2**20} MiB): ask for fewer components, or for best_only",
            field="components",
            reason="TOO_LARGE",
        )
    return response
