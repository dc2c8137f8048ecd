"""Which endpoint is asked, from the environment and from nowhere else: no request names a key."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from services.common.errors import FailedPrecondition
from services.explainer.engine.budget import Prices

URL, MODEL, KEY = "TDB_PROVIDER_URL", "TDB_PROVIDER_MODEL", "TDB_PROVIDER_KEY"
PRICES = "TDB_PROVIDER_PRICES"
CONCURRENCY = "TDB_PROVIDER_CONCURRENCY"
TIMEOUT = "TDB_PROVIDER_TIMEOUT_SECONDS"
THINKING = "TDB_PROVIDER_THINKING_TOKENS"
VARIABLES = (URL, MODEL, KEY, PRICES, CONCURRENCY, TIMEOUT, THINKING)


class ProviderNotConfigured(FailedPrecondition):
    """There is no endpoint to ask; what needs none still works."""

    default_reason = "PROVIDER_NOT_CONFIGURED"


class ProviderMisconfigured(FailedPrecondition):
    """The endpoint is there and will not have us: a wrong key, a model it does not know."""

    default_reason = "PROVIDER_MISCONFIGURED"


@dataclass(frozen=True, kw_only=True)
class ProviderSettings:
    """An OpenAI-compatible endpoint. The key is not part of the `repr`.

    `thinking_tokens` may be used up before each reply, by models that think first.
    """

    url: str
    model: str
    key: "Secret"
    prices: Prices | None = None
    concurrency: int = 8
    timeout_s: float = 120.0
    thinking_tokens: int = 0

    @property
    def host(self) -> str:
        """Who is asked, as results show it."""
        return urlsplit(self.url).netloc

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> "ProviderSettings":
        """Reads the variables. Raises ProviderNotConfigured, or ValueError naming a bad one."""
        values = {name: env.get(name, "").strip() for name in VARIABLES}
        missing = [name for name in (URL, MODEL) if not values[name]]
        if missing:
            raise ProviderNotConfigured(
                f"no language model is configured ({' and '.join(missing)} not set): set {URL} to "
                f"an OpenAI-compatible endpoint such as http://localhost:8000/v1, {MODEL} to a "
                f"model it serves and, where it wants one, {KEY}; the token_pattern method and its "
                "scores need none of them"
            )
        return cls(
            url=_url(values[URL]),
            model=values[MODEL],
            key=Secret(values[KEY]),
            prices=_prices(values[PRICES]) if values[PRICES] else None,
            concurrency=int(_number(CONCURRENCY, values[CONCURRENCY] or "8", whole=True)),
            timeout_s=_number(TIMEOUT, values[TIMEOUT] or "120"),
            thinking_tokens=int(_number(THINKING, values[THINKING] or "0", whole=True, least=0)),
        )


class Secret:
    """A text that nothing shows by accident."""

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        return self._text

    def __bool__(self) -> bool:
        return bool(self._text)

    def __repr__(self) -> str:
        return "Secret()"


def _url(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{URL} is not an http or https URL")
    if parts.username is not None or parts.query or parts.fragment:
        raise ValueError(f"{URL} is a plain URL without user, query or fragment; the key is {KEY}")
    return text.rstrip("/")


def _prices(text: str) -> Prices:
    parts = text.split(",")
    if len(parts) != 2:
        raise ValueError(f"{PRICES} is PROMPT,COMPLETION in dollars per million tokens")
    return Prices(*(_number(PRICES, part, least=0.0) for part in parts))


def _number(name: str, text: str, *, whole: bool = False, least: float = 1e-9) -> float:
    try:
        value = float(int(text)) if whole else float(text)
    except ValueError:
        value = math.nan
    if not least <= value < math.inf:
        kind = "whole number" if whole else "number"
        raise ValueError(f"{name} is not a {kind} {'above' if least > 0 else 'from'} 0")
    return value
