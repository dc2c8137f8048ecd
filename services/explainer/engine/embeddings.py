"""Texts as vectors: the interface, what that may use, and which endpoint is asked for them."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from services.common.errors import FailedPrecondition
from services.common.settings import Settings
from services.explainer.engine.budget import Ledger, Usage
from services.explainer.engine.provider_settings import Endpoint

Vectors = NDArray[np.float32]

HOW_TO_CONFIGURE = (
    "searching by meaning needs embeddings, and no endpoint for them is configured: set "
    "TDB_EMBEDDING_URL to an OpenAI-compatible endpoint such as http://localhost:8000/v1, "
    "TDB_EMBEDDING_MODEL to a model it serves and, where it wants one, TDB_EMBEDDING_KEY; a search "
    "by words needs none of them"
)

_MORE_TOKENS = 8


class EmbeddingsNotConfigured(FailedPrecondition):
    """There is no endpoint to ask; a search by words needs none."""

    default_reason = "EMBEDDINGS_NOT_CONFIGURED"


class Embeddings(Protocol):
    """Makes vectors of texts with one model of one endpoint."""

    @property
    def model(self) -> str: ...

    @property
    def host(self) -> str: ...

    async def embed(self, texts: Sequence[str], ledger: Ledger) -> Vectors:
        """One row of length 1 per text [texts, width], its cost in the ledger.

        Raises BudgetExceeded before a call that might pass the budget, Unavailable where the
        endpoint gives no answer, FailedPrecondition where it will not have the texts or us.
        """


def endpoint(settings: Settings) -> Endpoint:
    """Raises EmbeddingsNotConfigured."""
    if not settings.embedding_url:
        raise EmbeddingsNotConfigured(HOW_TO_CONFIGURE)
    return Endpoint(
        settings.embedding_url,
        settings.embedding_model,
        settings.embedding_key,
        settings.provider_timeout_s,
        "TDB_EMBEDDING",
    )


def token_bound(count: int, size: int) -> Usage:
    """The most that embedding `count` texts of together `size` bytes of UTF-8 can use: no token is
    less than a byte."""
    return Usage(size + _MORE_TOKENS * count, bounded=True)
