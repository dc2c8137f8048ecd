"""The calls that find explanations, embed them and import them."""

import re
from collections.abc import AsyncGenerator
from contextlib import aclosing

from tdb.explainer.v1 import explain_pb2, explanation_pb2, search_pb2

from services.common.addresses import parse
from services.common.errors import InvalidArgument, inside
from services.explainer import requests, wire
from services.explainer.components import Records
from services.explainer.database import Database
from services.explainer.embedding import Embedded, Embedding
from services.explainer.engine.budget import Budget
from services.explainer.engine.embeddings import Embeddings
from services.explainer.explanation_calls import user
from services.explainer.importing import Imported, Importer
from services.explainer.search import Filter, Mode, Page, Question, Search
from services.explainer.upstream import Upstream

MAX_LIMIT, USUAL_LIMIT = 1000, 100
MAX_GROUPS = 1000

_MODES = {
    search_pb2.SEARCH_MODE_UNSPECIFIED: Mode.WORDS,
    search_pb2.SEARCH_MODE_WORDS: Mode.WORDS,
    search_pb2.SEARCH_MODE_MEANING: Mode.MEANING,
}
_GROUP = re.compile(r"(neuron|head|latent)\.[A-Za-z0-9_-]+")


class SearchCalls:
    """Answers requests; None for `embeddings`: without an endpoint for them."""

    def __init__(
        self,
        database: Database,
        upstream: Upstream,
        records: Records,
        embeddings: Embeddings | None,
    ) -> None:
        self._search = Search(database, embeddings)
        self._embedding = Embedding(database, embeddings)
        self._importer = Importer(database, records, upstream)

    async def find(self, request: search_pb2.SearchRequest) -> search_pb2.SearchResponse:
        question = _question(request)
        limit = request.limit if request.HasField("limit") else USUAL_LIMIT
        if not 1 <= limit <= MAX_LIMIT:
            raise InvalidArgument(f"is in 1..{MAX_LIMIT}, or absent", field="limit")
        page = await self._search.find(question, limit=limit, cursor_at=request.cursor, user=user())
        return _found(page)

    async def embed(
        self, request: search_pb2.EmbedExplanationsRequest
    ) -> AsyncGenerator[search_pb2.EmbedExplanationsResponse, None]:
        if not request.HasField("max_tokens"):
            raise InvalidArgument(
                "embeddings cost what their endpoint takes for them: say how many tokens may be "
                "spent; EstimateCost says how many it takes",
                field="max_tokens",
                reason="REQUIRED",
            )
        budget = Budget(max_tokens=request.max_tokens)
        progress = search_pb2.EmbedProgress()
        async with aclosing(self._embedding.run(_of_model(request), budget)) as steps:
            async for step in steps:
                progress = _embedded(step)
                yield search_pb2.EmbedExplanationsResponse(progress=progress)
        yield search_pb2.EmbedExplanationsResponse(summary=progress)

    async def estimate(
        self, request: search_pb2.EmbedExplanationsRequest
    ) -> explain_pb2.EstimateCostResponse:
        """What embedding may cost. Prices of embeddings are not configured."""
        found = await self._embedding.estimate(_of_model(request))
        return explain_pb2.EstimateCostResponse(
            calls=found.calls,
            expected_tokens=found.expected_tokens,
            most_tokens=found.most_tokens,
            provider=found.host,
            provider_model=found.model,
            components=found.explanations,
        )

    async def import_explanations(
        self, request: search_pb2.ImportExplanationsRequest
    ) -> AsyncGenerator[search_pb2.ImportExplanationsResponse, None]:
        so_far = Imported()
        async with aclosing(self._importer.run(requests.dataset(request.dataset), user())) as steps:
            async for so_far in steps:
                yield search_pb2.ImportExplanationsResponse(
                    progress=search_pb2.ImportProgress(read=so_far.read)
                )
        yield search_pb2.ImportExplanationsResponse(
            summary=search_pb2.ImportSummary(**vars(so_far))
        )


def _question(request: search_pb2.SearchRequest) -> Question:
    """Raises InvalidArgument."""
    groups = []
    if len(request.groups) > MAX_GROUPS:
        raise InvalidArgument(f"at most {MAX_GROUPS} fit in one call", field="groups")
    for number, each in enumerate(request.groups):
        with inside(f"groups[{number}]"):
            groups.append(_group(each))
    methods = []
    for number, method in enumerate(request.methods):
        if method == explanation_pb2.METHOD_UNSPECIFIED:
            raise InvalidArgument(
                "a method is required", field=f"methods[{number}]", reason="REQUIRED"
            )
        methods.append(wire.METHODS[method])
    filter = Filter(_of_model(request).model, tuple(groups), tuple(methods))
    return Question(request.query, _MODES[request.mode], filter)


def _of_model(
    request: search_pb2.SearchRequest | search_pb2.EmbedExplanationsRequest,
) -> Filter:
    """Raises InvalidArgument."""
    if not request.HasField("model"):
        return Filter()
    with inside("model"):
        return Filter(requests.model(request.model))


def _group(given: str) -> str:
    """Raises InvalidArgument."""
    if not _GROUP.fullmatch(given):
        raise InvalidArgument(
            "is an address without its last number, such as neuron.3, head.0 or latent.D"
        )
    return str(parse(f"{given}.0")).rpartition(".")[0]


def _found(page: Page) -> search_pb2.SearchResponse:
    return search_pb2.SearchResponse(
        found=[
            search_pb2.FoundExplanation(explanation=wire.explanation(each), relevance=relevance)
            for each, relevance in page.found
        ],
        next_cursor=page.next_cursor,
        total=page.total,
        without_embedding=page.without_embedding,
    )


def _embedded(step: Embedded) -> search_pb2.EmbedProgress:
    return search_pb2.EmbedProgress(
        total=step.total,
        embedded=step.done,
        refused=step.refused,
        calls=step.ledger.calls,
        tokens=step.ledger.tokens,
        bounded_calls=step.ledger.bounded_calls,
    )
