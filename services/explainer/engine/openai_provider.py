"""Any OpenAI-compatible endpoint: hosted models, vLLM, llama.cpp, Ollama, OpenRouter and the like.

Endpoints differ in what they understand. We ask for everything (JSON schema, logprobs, seed); where
one answers that it does not know a parameter, it is not asked for that again, and the reply is held
to the schema by `replies.py` in any case.

When a call is tried again, `openai_calls.py` says. One that was cut off may have been paid for and
is counted at the most it can have cost.
"""

import asyncio
import hashlib
import math
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import openai
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from services.explainer.engine import openai_calls
from services.explainer.engine.budget import Ledger, Prices, Usage
from services.explainer.engine.openai_calls import ATTEMPTS
from services.explainer.engine.prompts import Prompt
from services.explainer.engine.provider import OnText, Reply, TokenLogprobs, answer
from services.explainer.engine.provider_settings import ProviderSettings
from services.explainer.engine.replies import FailureKind
from services.explainer.engine.response_cache import ResponseCache

_TOP_LOGPROBS = 20

_UNSUPPORTED = ("unsupported", "not support", "unknown", "unrecognized", "not permitted", "extra")

# What an endpoint may not know, and what is sent instead, if anything.
_INSTEAD = {
    "response_format": None,
    "logprobs": None,
    "temperature": None,
    "seed": None,
    "stream_options": None,
    "max_tokens": "max_completion_tokens",
}


class OpenAIProvider:
    """Asks one model. Use as an async context manager, or `close()` it."""

    def __init__(
        self,
        settings: ProviderSettings,
        cache: ResponseCache,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        jitter: random.Random | None = None,
    ) -> None:
        self._settings = settings
        self._cache = cache
        self._sleep = sleep
        self._jitter = jitter or random.Random()
        self._slots = asyncio.Semaphore(settings.concurrency)
        self._asking: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._unknown: set[str] = set()
        self._calls: set[asyncio.Future[Reply]] = set()
        self._endpoint = settings.endpoint
        self._client = openai_calls.client(self._endpoint)

    @property
    def model(self) -> str:
        return self._settings.model

    @property
    def host(self) -> str:
        return self._endpoint.host

    @property
    def prices(self) -> Prices | None:
        return self._settings.prices

    @property
    def at_once(self) -> int:
        return self._settings.concurrency

    def most(self, prompt: Prompt) -> Usage:
        return Usage(prompt.token_bound, self._longest(prompt), bounded=True)

    async def __aenter__(self) -> "OpenAIProvider":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Calls on their way are cut off."""
        for work in self._calls:
            work.cancel()
        await asyncio.gather(*self._calls, return_exceptions=True)
        await self._client.close()

    async def complete(
        self, prompt: Prompt, ledger: Ledger, on_text: OnText | None = None
    ) -> Reply:
        call = _Call(prompt, ledger, on_text)
        work = asyncio.ensure_future(self._complete(call))
        self._calls.add(work)
        work.add_done_callback(self._calls.discard)
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            call.has_caller = False
            if not call.is_sent:
                work.cancel()
            work.add_done_callback(lambda done: done.cancelled() or done.exception())
            raise

    async def _complete(self, call: "_Call") -> Reply:
        key = self._key(call.prompt)
        # Whoever asks the same meanwhile waits, and finds the reply in the cache.
        async with self._asking.setdefault(key, asyncio.Lock()):
            kept = await self._cache.get(key)
            if kept is not None:
                call.ledger.cached += 1
                reply = Reply.from_json(kept)
                if call.on_text is not None:
                    call.on_text(reply.text)
                return reply
            async with self._slots:
                reply = await self._ask(call)
            if not isinstance(answer(reply, call.prompt), FailureKind):
                await self._cache.put(key, reply.to_json())
            return reply

    def _key(self, prompt: Prompt) -> str:
        parts = f"{self._settings.url}\n{self.model}\n{prompt.hash}"
        return hashlib.sha256(parts.encode()).hexdigest()

    async def _ask(self, call: "_Call") -> Reply:
        prompt, ledger, on_text = call.prompt, call.ledger, call.on_text
        most = self.most(prompt)
        failure = FailureKind.UNAVAILABLE
        attempt = 0
        while attempt < ATTEMPTS and call.has_caller:
            asked_to_wait = None
            parameters = self._parameters(prompt, stream=on_text is not None)
            async with ledger.reserve(most):
                try:
                    call.is_sent = True
                    reply, usage = await self._send(prompt, parameters, on_text)
                    ledger.spend(usage or most)
                    return reply
                except (TimeoutError, openai.APITimeoutError):
                    ledger.spend(most)
                    failure = FailureKind.TIMED_OUT
                except openai.APIConnectionError as error:
                    if openai_calls.was_sent(error):
                        ledger.spend(most)
                    failure = FailureKind.UNAVAILABLE
                except openai.APIStatusError as error:
                    if self._learn(error, parameters):
                        continue
                    if (rejected := openai_calls.rejection(error, self._endpoint)) is not None:
                        return Reply(failure=rejected)
                    failure = FailureKind.UNAVAILABLE
                    asked_to_wait = openai_calls.retry_after(error.response.headers)
                except (_Broken, openai.APIError, ValueError):
                    # Half a stream, an error within one, a body that is no chat completion.
                    ledger.spend(most)
                    failure = FailureKind.UNAVAILABLE
                except asyncio.CancelledError:
                    ledger.spend(most)
                    raise
                finally:
                    call.is_sent = False
            attempt += 1
            if attempt < ATTEMPTS and call.has_caller:
                ledger.retries += 1
                await self._sleep(openai_calls.pause_s(self._jitter, attempt, asked_to_wait))
        return Reply(failure=failure)

    def _longest(self, prompt: Prompt) -> int:
        return prompt.max_tokens + self._settings.thinking_tokens

    def _learn(self, error: openai.APIStatusError, sent: Mapping[str, Any]) -> bool:
        """Whether the endpoint refuses a parameter that it can be asked without."""
        if error.status_code not in (400, 404, 422):
            return False
        named = str(error.param or "")
        if not named and any(word in error.message.lower() for word in _UNSUPPORTED):
            named = error.message
        for name in sent:
            if name in _INSTEAD and name in named:
                self._unknown.add(name)
                return True
        return False

    def _parameters(self, prompt: Prompt, *, stream: bool) -> dict[str, Any]:
        wanted: dict[str, Any] = {
            "max_tokens": self._longest(prompt),
            "temperature": prompt.temperature,
            "seed": prompt.seed,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": prompt.name, "strict": True, "schema": prompt.schema},
            },
        }
        if prompt.logprobs:
            wanted["logprobs"] = True
        if stream:
            wanted["stream_options"] = {"include_usage": True}
        sent = {
            _INSTEAD[name] if name in self._unknown else name: value
            for name, value in wanted.items()
        }
        sent.pop(None, None)
        if "logprobs" in sent:
            sent["top_logprobs"] = _TOP_LOGPROBS
        return {str(name): value for name, value in sent.items()}

    async def _send(
        self, prompt: Prompt, parameters: Mapping[str, Any], on_text: OnText | None
    ) -> tuple[Reply, Usage | None]:
        create: Any = self._client.chat.completions.create
        messages = list(prompt.messages)
        # The package's time-out is for silence, this one for the whole of a call.
        async with asyncio.timeout(self._settings.timeout_s):
            if on_text is None:
                return _reply(await create(model=self.model, messages=messages, **parameters))
            chunks = await create(model=self.model, messages=messages, stream=True, **parameters)
            async with chunks:
                return await _streamed(chunks, on_text)


@dataclass(eq=False)
class _Call:
    """A question on its way. Once sent it is paid for: then its reply is waited for and kept, even
    when its caller has gone; it is not sent again."""

    prompt: Prompt
    ledger: Ledger
    on_text: OnText | None
    has_caller: bool = True
    is_sent: bool = False


class _Broken(Exception):
    """A reply that ended before it was whole."""


def _reply(whole: ChatCompletion) -> tuple[Reply, Usage | None]:
    if not isinstance(whole, ChatCompletion) or not whole.choices:
        raise _Broken
    choice = whole.choices[0]
    message = choice.message
    logprobs = choice.logprobs.content if choice.logprobs else None
    reply = _finished(
        message.content or "", bool(message.refusal), choice.finish_reason, _logprobs(logprobs)
    )
    return reply, _usage(whole)


async def _streamed(chunks: Any, on_text: OnText) -> tuple[Reply, Usage | None]:
    text, refused, finish, usage = "", False, None, None
    logprobs: list[Any] = []
    chunk: ChatCompletionChunk
    async for chunk in chunks:
        usage = _usage(chunk) or usage
        for choice in chunk.choices:
            if choice.delta.content:
                text += choice.delta.content
                on_text(text)
            refused = refused or bool(choice.delta.refusal)
            finish = choice.finish_reason or finish
            if choice.logprobs and choice.logprobs.content:
                logprobs += choice.logprobs.content
    if finish is None:
        raise _Broken
    return _finished(text, refused, finish, _logprobs(logprobs or None)), usage


def _finished(
    text: str,
    refused: bool,
    finish: str | None,
    logprobs: tuple[TokenLogprobs, ...] | None,
) -> Reply:
    if refused or finish == "content_filter":
        return Reply(failure=FailureKind.REFUSED)
    if finish == "length":
        return Reply(failure=FailureKind.TRUNCATED)
    return Reply(text, logprobs)


def _logprobs(content: Any) -> tuple[TokenLogprobs, ...] | None:
    if not content:
        return None
    return tuple(
        TokenLogprobs(
            each.token,
            tuple(
                (other.token, float(other.logprob))
                for other in each.top_logprobs or ()
                if math.isfinite(other.logprob)
            ),
        )
        for each in content
    )


def _usage(whole: ChatCompletion | ChatCompletionChunk) -> Usage | None:
    if whole.usage is None:
        return None
    return Usage(whole.usage.prompt_tokens or 0, whole.usage.completion_tokens or 0)
