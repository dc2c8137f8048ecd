"""Texts as vectors, by any endpoint that speaks OpenAI's embeddings.

What goes wrong with a call that costs nothing more is tried again, as `openai_calls.py` says. What
comes is held to what was asked: one vector per text, in its order, of one length, finite and not
zero. Vectors are scaled to length 1, so that a product of two is their cosine.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence

import numpy as np
import openai
from numpy.typing import NDArray
from openai.types import CreateEmbeddingResponse

from services.common.errors import FailedPrecondition, Unavailable
from services.explainer.engine import openai_calls
from services.explainer.engine.budget import Ledger, Usage
from services.explainer.engine.embeddings import Vectors, token_bound
from services.explainer.engine.openai_calls import ATTEMPTS
from services.explainer.engine.provider_settings import Endpoint


class OpenAIEmbeddings:
    """Asks one model. `close()` it."""

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        jitter: random.Random | None = None,
    ) -> None:
        self._endpoint = endpoint
        self._sleep = sleep
        self._jitter = jitter or random.Random()
        self._client = openai_calls.client(endpoint)

    @property
    def model(self) -> str:
        return self._endpoint.model

    @property
    def host(self) -> str:
        return self._endpoint.host

    async def close(self) -> None:
        await self._client.close()

    async def embed(self, texts: Sequence[str], ledger: Ledger) -> Vectors:
        size = sum(len(text.encode(errors="replace")) for text in texts)
        most = token_bound(len(texts), size)
        attempt = 0
        while True:
            asked_to_wait = None
            async with ledger.reserve(most):
                try:
                    return await self._send(texts, ledger, most)
                except (TimeoutError, openai.APITimeoutError):
                    ledger.spend(most)
                    said = f"gave no answer in {self._endpoint.timeout_s:g} s"
                except openai.APIConnectionError as error:
                    if openai_calls.was_sent(error):
                        ledger.spend(most)
                    said = "cannot be reached"
                except openai.APIStatusError as error:
                    if openai_calls.rejection(error, self._endpoint) is not None:
                        raise FailedPrecondition(
                            f"{self.host} answered {error.status_code} to texts that were to be "
                            "embedded: it does not take them",
                            reason="EMBEDDING_REFUSED",
                        ) from None
                    said = f"answered {error.status_code}"
                    asked_to_wait = openai_calls.retry_after(error.response.headers)
                except (openai.APIError, ValueError, TypeError):
                    ledger.spend(most)
                    said = "answered with something that is no embedding"
                except asyncio.CancelledError:
                    ledger.spend(most)
                    raise
            attempt += 1
            if attempt == ATTEMPTS:
                raise Unavailable(
                    f"{self.host}, the endpoint for embeddings, {said}",
                    reason="EMBEDDINGS_UNAVAILABLE",
                    retry_after_s=30,
                )
            ledger.retries += 1
            await self._sleep(openai_calls.pause_s(self._jitter, attempt, asked_to_wait))

    async def _send(self, texts: Sequence[str], ledger: Ledger, most: Usage) -> Vectors:
        # The package's time-out is for silence, this one for the whole of a call.
        async with asyncio.timeout(self._endpoint.timeout_s):
            # Floats as JSON: the package's own default, base64, is not known everywhere.
            found = await self._client.embeddings.create(
                model=self.model, input=list(texts), encoding_format="float"
            )
        vectors = _vectors(found, len(texts))
        ledger.spend(_usage(found) or most)
        return vectors


def _vectors(found: CreateEmbeddingResponse, count: int) -> Vectors:
    """Raises ValueError where it is not one vector per text."""
    if not isinstance(found, CreateEmbeddingResponse) or not isinstance(found.data, list):
        raise ValueError("no embeddings")
    ordered = sorted(found.data, key=lambda each: each.index)
    if [each.index for each in ordered] != list(range(count)):
        raise ValueError("not one per text")
    vectors: NDArray[np.float64] = np.array([each.embedding for each in ordered], np.float64)
    if vectors.ndim != 2:
        raise ValueError("not of one length")
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not (np.isfinite(lengths).all() and (lengths > 0).all()):
        raise ValueError("not finite, or zero")
    scaled: Vectors = (vectors / lengths).astype(np.float32)
    return scaled


def _usage(found: CreateEmbeddingResponse) -> Usage | None:
    return Usage(found.usage.prompt_tokens or 0) if found.usage else None
