"""Which endpoint is asked, from the environment and from nowhere else: no request names a key."""

from dataclasses import dataclass
from urllib.parse import urlsplit

from services.common.errors import FailedPrecondition
from services.common.setting_values import Secret
from services.common.settings import Settings
from services.explainer.engine.budget import Prices

URL, MODEL, KEY = "TDB_PROVIDER_URL", "TDB_PROVIDER_MODEL", "TDB_PROVIDER_KEY"

HOW_TO_CONFIGURE = (
    f"no language model is configured: set {URL} to an OpenAI-compatible endpoint such as "
    f"http://localhost:8000/v1, {MODEL} to a model it serves and, where it wants one, {KEY}; the "
    "token_pattern method and its scores need none of them"
)


class ProviderNotConfigured(FailedPrecondition):
    """There is no endpoint to ask; what needs none still works."""

    default_reason = "PROVIDER_NOT_CONFIGURED"


class ProviderMisconfigured(FailedPrecondition):
    """The endpoint is there and will not have us: a wrong key, a model it does not know."""

    default_reason = "PROVIDER_MISCONFIGURED"


@dataclass(frozen=True)
class Endpoint:
    """Where a model is asked, and the names of the variables that say so, for refusals."""

    url: str
    model: str
    key: Secret
    timeout_s: float
    prefix: str

    @property
    def host(self) -> str:
        """Who is asked, as results show it."""
        return urlsplit(self.url).netloc


@dataclass(frozen=True, kw_only=True)
class ProviderSettings:
    """An OpenAI-compatible endpoint. The key is not part of the `repr`.

    `thinking_tokens` may be used up before each reply, by models that think first.
    """

    url: str
    model: str
    key: Secret
    prices: Prices | None = None
    concurrency: int = 8
    timeout_s: float = 120.0
    thinking_tokens: int = 0

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(self.url, self.model, self.key, self.timeout_s, "TDB_PROVIDER")

    @classmethod
    def of(cls, settings: Settings) -> "ProviderSettings":
        """Raises ProviderNotConfigured."""
        if not settings.provider_url:
            raise ProviderNotConfigured(HOW_TO_CONFIGURE)
        prices = settings.provider_prices
        return cls(
            url=settings.provider_url,
            model=settings.provider_model,
            key=settings.provider_key,
            prices=Prices(*prices) if prices else None,
            concurrency=settings.provider_concurrency,
            timeout_s=settings.provider_timeout_s,
            thinking_tokens=settings.provider_thinking_tokens,
        )
