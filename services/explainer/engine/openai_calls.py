"""What calls to any OpenAI-compatible endpoint have in common: the client, and trying again.

Retries are ours, not the package's, because each may cost: 408, 409, 429, 5xx, broken connections
and time-outs, with full jitter and after what `Retry-After` says. What an endpoint says in words
may hold the key or the corpus: it is never shown.
"""

import email.utils
import math
import random
import ssl
import time
from collections.abc import Mapping
from typing import Any

import openai
from openai import Omit

from services.explainer.engine.provider_settings import Endpoint, ProviderMisconfigured
from services.explainer.engine.replies import FailureKind

ATTEMPTS = 6
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0
_RETRIED = (408, 409, 425, 429)


def client(endpoint: Endpoint) -> openai.AsyncOpenAI:
    # Else the package would tell any endpoint the account that OPENAI_ORG_ID names.
    headers: Any = {"OpenAI-Organization": Omit(), "OpenAI-Project": Omit()}
    return openai.AsyncOpenAI(
        base_url=endpoint.url,
        # Local servers want none, the package insists on one.
        api_key=endpoint.key.value or "none",
        timeout=endpoint.timeout_s,
        max_retries=0,
        default_headers=headers,
        http_client=openai.DefaultAsyncHttpxClient(
            follow_redirects=False,
            # For plain http no authority's certificate need be read: trusting none is safe.
            verify=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            if endpoint.url.startswith("http:")
            else True,
        ),
    )


def pause_s(jitter: random.Random, attempt: int, asked: float | None) -> float:
    """Seconds before the attempt after this one, 1 being the first; `asked`: at least so many."""
    longest = min(_FIRST_WAIT_S * 2.0 ** (attempt - 1), _LONGEST_WAIT_S)
    drawn: float = jitter.uniform(0, longest)
    return drawn + min(asked or 0.0, _LONGEST_WAIT_S)


def was_sent(error: openai.APIConnectionError) -> bool:
    """Whether the request may have reached the endpoint before the connection broke."""
    return type(error.__cause__).__name__ not in ("ConnectError", "ConnectTimeout", "PoolTimeout")


def rejection(error: openai.APIStatusError, endpoint: Endpoint) -> FailureKind | None:
    """What became of a question that is not to be asked again; None where it is.

    Raises ProviderMisconfigured for what would befall every question.
    """
    status = error.status_code
    if error.code == "content_filter":
        return FailureKind.REFUSED
    if status in (401, 403):
        given = "set" if endpoint.key else "not set"
        meant = f"it does not accept the key: {endpoint.prefix}_KEY is {given}"
    elif status == 404:
        names = f"{endpoint.prefix}_MODEL and {endpoint.prefix}_URL"
        meant = f"it has no model {endpoint.model} there: see {names}"
    elif status == 402 or (status == 429 and error.code == "insufficient_quota"):
        meant = "the account has nothing left to spend"
    elif status >= 500 or status in _RETRIED:
        return None
    else:
        return FailureKind.REJECTED
    raise ProviderMisconfigured(f"{endpoint.host} answered {status}: {meant}")


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait, from `Retry-After` in seconds or as a date; None where it says nothing."""
    text = headers.get("retry-after", "")
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        except ValueError:
            return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None
