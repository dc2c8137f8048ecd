"""Every way in which an endpoint answers, or does not."""

import asyncio
import email.utils
import logging
import random
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import pytest

from services.common.settings import Settings, SettingsError
from services.explainer.engine.budget import Budget, BudgetExceeded, Ledger, Prices, Usage
from services.explainer.engine.openai_calls import ATTEMPTS
from services.explainer.engine.openai_provider import OpenAIProvider
from services.explainer.engine.prompts import STRING, Prompt, ask, object_of
from services.explainer.engine.provider import Reply, answer
from services.explainer.engine.provider_settings import (
    ProviderMisconfigured,
    ProviderNotConfigured,
    ProviderSettings,
)
from services.explainer.engine.replies import FailureKind
from services.explainer.engine.response_cache import MemoryCache
from tests.explainer.openai_server import (
    KEY,
    MODEL,
    Fault,
    OpenAIServer,
    Said,
    failing,
    too_many,
    usage_of,
)

SAID = '{"explanation": "fires on names"}'
PROMPT = ask(
    "explain",
    "Say what it is.",
    {"text": "Mary"},
    object_of(explanation=STRING),
    max_tokens=50,
    seed=7,
)


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with OpenAIServer(lambda body: SAID) as running:
        yield running


class Waits:
    def __init__(self) -> None:
        self.seconds: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)


@asynccontextmanager
async def provider(
    server: OpenAIServer,
    *,
    cache: MemoryCache | None = None,
    waits: Waits | None = None,
    **env: str,
) -> AsyncIterator[OpenAIProvider]:
    given = {
        "TDB_PROVIDER_URL": server.url,
        "TDB_PROVIDER_MODEL": MODEL,
        "TDB_PROVIDER_KEY": KEY,
        **{f"TDB_PROVIDER_{name}": value for name, value in env.items()},
    }
    settings = ProviderSettings.of(Settings.from_env(given))
    async with OpenAIProvider(
        settings, cache or MemoryCache(), sleep=waits or Waits(), jitter=random.Random(1)
    ) as made:
        yield made


async def ask_once(server: OpenAIServer, ledger: Ledger, **more: Any) -> Reply:
    async with provider(server, **more) as asked:
        return await asked.complete(PROMPT, ledger)


async def test_a_reply_is_read_and_counted(server: OpenAIServer) -> None:
    ledger = Ledger(prices=Prices(2.0, 10.0))
    reply = await ask_once(server, ledger)
    assert answer(reply, PROMPT) == {"explanation": "fires on names"}
    usage = usage_of(server.requests[0], Said(SAID))
    assert (ledger.prompt_tokens, ledger.completion_tokens) == (
        usage["prompt_tokens"],
        usage["completion_tokens"],
    )
    assert ledger.cost == pytest.approx(
        (2 * usage["prompt_tokens"] + 10 * usage["completion_tokens"]) / 1e6
    )
    assert (ledger.calls, ledger.cached, ledger.retries, ledger.bounded_calls) == (1, 0, 0, 0)
    asked = server.requests[0]
    assert asked["response_format"]["json_schema"]["schema"] == PROMPT.schema
    assert (asked["temperature"], asked["seed"], asked["max_tokens"]) == (0.0, 7, 50)


async def test_a_question_is_paid_for_once(server: OpenAIServer) -> None:
    cache, ledger = MemoryCache(), Ledger()
    first = await ask_once(server, ledger, cache=cache)
    second = await ask_once(server, ledger, cache=cache)
    assert (second.text, second.logprobs) == (first.text, first.logprobs)
    assert (first.cached, second.cached) == (False, True)
    assert (len(server.requests), ledger.calls, ledger.cached) == (1, 1, 1)


async def test_two_who_ask_the_same_at_once_pay_once(server: OpenAIServer) -> None:
    server.faults.append(Fault(delay_s=0.05))
    async with provider(server) as asked:
        replies = await asyncio.gather(
            *(asked.complete(PROMPT, ledger) for ledger in (Ledger(), Ledger(), Ledger()))
        )
    assert [each.text for each in replies] == [SAID] * 3
    assert [each.cached for each in replies] == [False, True, True]
    assert len(server.requests) == 1


async def test_a_model_that_thinks_has_room_for_it(server: OpenAIServer) -> None:
    server.faults.append(Fault(no_usage=True))
    await ask_once(server, ledger := Ledger(), THINKING_TOKENS="1000")
    assert server.requests[0]["max_tokens"] == 1050
    assert ledger.completion_tokens == 1050


@pytest.mark.parametrize(
    "change",
    [{"user": "x"}, {"system": "x"}, {"temperature": 1.0}, {"seed": 1}, {"max_tokens": 51}],
)
async def test_another_question_is_another_entry(
    server: OpenAIServer, change: dict[str, Any]
) -> None:
    parts = {name: getattr(PROMPT, name) for name in PROMPT.__dataclass_fields__}
    async with provider(server) as asked:
        await asked.complete(PROMPT, Ledger())
        await asked.complete(Prompt(**{**parts, **change}), Ledger())
    assert len(server.requests) == 2


async def test_429_waits_for_as_long_as_it_says(server: OpenAIServer) -> None:
    in_ten = email.utils.formatdate(time.time() + 10, usegmt=True)
    server.faults.extend([too_many("3"), too_many(), too_many(in_ten), too_many("soon")])
    waits, ledger = Waits(), Ledger()
    reply = await ask_once(server, ledger, waits=waits)
    assert answer(reply, PROMPT) == {"explanation": "fires on names"}
    first, second, third, fourth = waits.seconds
    assert 3 <= first <= 3.5
    assert 0 <= second <= 1
    assert 8 <= third <= 12
    assert 0 <= fourth <= 4
    assert (ledger.calls, ledger.retries) == (1, 4)


@pytest.mark.parametrize("status", [500, 502, 503, 529, 408])
async def test_server_errors_are_tried_again(server: OpenAIServer, status: int) -> None:
    server.faults.append(failing(status))
    reply = await ask_once(server, ledger := Ledger())
    assert reply.failure is None
    assert ledger.retries == 1


async def test_an_endpoint_that_stays_down_is_a_counted_failure(server: OpenAIServer) -> None:
    server.faults.extend([failing()] * ATTEMPTS)
    waits = Waits()
    reply = await ask_once(server, ledger := Ledger(), waits=waits)
    assert reply.failure is FailureKind.UNAVAILABLE
    assert len(server.requests) == ATTEMPTS
    assert len(waits.seconds) == ATTEMPTS - 1
    assert len(set(waits.seconds)) == ATTEMPTS - 1, "waits have jitter"
    assert ledger.tokens == 0


async def test_a_failure_is_not_kept(server: OpenAIServer) -> None:
    cache = MemoryCache()
    server.faults.extend([failing()] * ATTEMPTS)
    assert (await ask_once(server, Ledger(), cache=cache)).failure
    assert (await ask_once(server, Ledger(), cache=cache)).failure is None


async def test_a_slow_endpoint_times_out_and_may_have_been_paid(server: OpenAIServer) -> None:
    server.faults.extend([Fault(delay_s=30)] * ATTEMPTS)
    ledger = Ledger()
    reply = await ask_once(server, ledger, TIMEOUT_SECONDS="0.05")
    assert reply.failure is FailureKind.TIMED_OUT
    assert ledger.bounded_calls == ATTEMPTS
    assert ledger.tokens == ATTEMPTS * (PROMPT.token_bound + PROMPT.max_tokens)


async def test_a_connection_that_breaks_is_tried_again_and_counted(server: OpenAIServer) -> None:
    server.faults.append(Fault(hang_up=True))
    reply = await ask_once(server, ledger := Ledger())
    assert reply.failure is None
    assert (ledger.calls, ledger.bounded_calls) == (2, 1)


async def test_nobody_there_costs_nothing() -> None:
    with OpenAIServer() as gone:
        pass
    reply = await ask_once(gone, ledger := Ledger())
    assert reply.failure is FailureKind.UNAVAILABLE
    assert ledger.tokens == 0


@pytest.mark.parametrize("body", ["", "<html>busy</html>", "[]", '{"choices": []}', '"ok"', "null"])
async def test_a_body_that_is_no_completion_is_a_failure(server: OpenAIServer, body: str) -> None:
    server.faults.extend([Fault(body=body)] * ATTEMPTS)
    reply = await ask_once(server, Ledger())
    assert reply.failure is FailureKind.UNAVAILABLE


async def test_no_usage_counts_as_the_most_it_can_be(server: OpenAIServer) -> None:
    server.faults.append(Fault(no_usage=True))
    await ask_once(server, ledger := Ledger())
    assert ledger.tokens == PROMPT.token_bound + PROMPT.max_tokens
    assert ledger.bounded_calls == 1


@pytest.mark.parametrize(
    ("said", "failure"),
    [
        (Said(refusal="I cannot help with that."), FailureKind.REFUSED),
        (Said('{"explanation": "', finish="content_filter"), FailureKind.REFUSED),
        (Said('{"explanation": "fires', finish="length"), FailureKind.TRUNCATED),
        (Said(SAID, finish="length"), FailureKind.TRUNCATED),
        (Said('{"explanation": "fires'), FailureKind.MALFORMED),
        (Said('{"explanation": 5}'), FailureKind.MALFORMED),
        (Said('{"explanation": "a", "more": 1}'), FailureKind.MALFORMED),
        (Said("{}"), FailureKind.MALFORMED),
        (Said(f"Here you are: {SAID}"), FailureKind.MALFORMED),
        (Said(f"{SAID}{SAID}"), FailureKind.MALFORMED),
        (Said('{"explanation": "a", "explanation": "b"}'), FailureKind.MALFORMED),
        (Said('{"explanation": NaN}'), FailureKind.MALFORMED),
        (Said(tokens=[("[" * 100_000, [])]), FailureKind.MALFORMED),
        (Said(tokens=[("9" * 10_000, [])]), FailureKind.MALFORMED),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
async def test_what_is_no_answer_is_a_failure(
    server: OpenAIServer, said: Said, failure: FailureKind, streamed: bool
) -> None:
    server.model = lambda body: said
    async with provider(server) as asked:
        on_text = (lambda text: None) if streamed else None
        reply = await asked.complete(PROMPT, ledger := Ledger(), on_text)
    assert answer(reply, PROMPT) is failure
    assert ledger.calls == 1, "it was paid for"


async def test_a_code_fence_is_no_harm(server: OpenAIServer) -> None:
    server.model = lambda body: f"```json\n{SAID}\n```"
    assert answer(await ask_once(server, Ledger()), PROMPT) == {"explanation": "fires on names"}


async def test_a_stream_shows_the_text_so_far(server: OpenAIServer) -> None:
    seen: list[str] = []
    async with provider(server) as asked:
        reply = await asked.complete(PROMPT, ledger := Ledger(), seen.append)
    assert (reply.text, seen[-1]) == (SAID, SAID)
    assert len(seen) > 3
    assert all(later.startswith(earlier) for earlier, later in pairwise(seen))
    assert ledger.bounded_calls == 0
    assert ledger.completion_tokens == len(Said(SAID).pieces)


async def test_a_stream_that_breaks_starts_again(server: OpenAIServer) -> None:
    server.faults.append(Fault(stop_stream_after=4))
    seen: list[str] = []
    async with provider(server) as asked:
        reply = await asked.complete(PROMPT, ledger := Ledger(), seen.append)
    assert (reply.text, seen[-1]) == (SAID, SAID)
    assert (ledger.calls, ledger.bounded_calls, ledger.retries) == (2, 1, 1)


@pytest.mark.parametrize("streamed", [False, True])
async def test_logprobs_come_along_where_offered(server: OpenAIServer, streamed: bool) -> None:
    server.model = lambda body: Said(tokens=[("7", [("7", 0.75), ("3", 0.25)])])
    parts = {name: getattr(PROMPT, name) for name in PROMPT.__dataclass_fields__}
    async with provider(server) as asked:
        on_text = (lambda text: None) if streamed else None
        prompt = Prompt(**{**parts, "logprobs": True})
        reply = await asked.complete(prompt, Ledger(), on_text)
        again = await asked.complete(prompt, Ledger())
    assert reply.logprobs is not None
    (token,) = reply.logprobs
    assert token.text == "7"
    assert dict(token.alternatives) == pytest.approx({"7": -0.28768, "3": -1.38629}, abs=1e-4)
    assert again.logprobs == reply.logprobs, "the cache keeps them"


@pytest.mark.parametrize(
    "missing", ["logprobs", "response_format", "temperature", "seed", "max_tokens"]
)
async def test_what_an_endpoint_does_not_know_is_left_out(
    server: OpenAIServer, missing: str
) -> None:
    server.unsupported = {missing}
    parts = {name: getattr(PROMPT, name) for name in PROMPT.__dataclass_fields__}
    async with provider(server) as asked:
        for seed in (1, 2):
            prompt = Prompt(**{**parts, "logprobs": True, "seed": seed})
            reply = await asked.complete(prompt, ledger := Ledger())
            assert answer(reply, prompt) == {"explanation": "fires on names"}
            assert (ledger.calls, ledger.retries) == (1, 0)
    assert [missing in body for body in server.requests] == [True, False, False]
    if missing == "max_tokens":
        assert server.requests[-1]["max_completion_tokens"] == 50


async def test_a_question_that_is_too_long_is_a_failure_of_its_own(server: OpenAIServer) -> None:
    error = {"message": "context length exceeded: shorten messages or lower max_tokens"}
    server.faults.append(Fault(400, {**error, "code": "context_length_exceeded"}))
    reply = await ask_once(server, Ledger())
    assert reply.failure is FailureKind.REJECTED
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"KEY": "sk-wrong-key"}, "does not accept the key: TDB_PROVIDER_KEY is set"),
        ({"KEY": ""}, "TDB_PROVIDER_KEY is not set"),
        ({"MODEL": "other"}, "has no model other"),
    ],
)
async def test_what_befalls_every_question_stops_the_job(
    server: OpenAIServer, env: dict[str, str], says: str
) -> None:
    with pytest.raises(ProviderMisconfigured, match=says) as refused:
        await ask_once(server, Ledger(), **env)
    assert "sk-" not in str(refused.value)
    assert len(server.requests) == 1


async def test_an_empty_account_is_not_asked_again(server: OpenAIServer) -> None:
    server.faults.append(Fault(429, {"message": "no money", "code": "insufficient_quota"}))
    with pytest.raises(ProviderMisconfigured, match="nothing left to spend"):
        await ask_once(server, Ledger())


async def test_the_key_is_nowhere_but_in_its_header(
    server: OpenAIServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_ORG_ID", "org-private")
    caplog.set_level(logging.DEBUG)
    cache = MemoryCache()
    server.faults.append(Fault(500, {"message": f"your key {KEY}"}))
    async with provider(server, cache=cache) as asked:
        reply = await asked.complete(PROMPT, Ledger())
        assert KEY not in repr(vars(asked))
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    assert "openai-organization" not in server.headers[0]
    kept = repr(vars(cache))
    assert "fires on names" in kept
    assert KEY not in caplog.text + repr(reply) + kept + repr(server.requests)


async def test_no_more_calls_at_once_than_allowed(server: OpenAIServer) -> None:
    server.faults.extend([Fault(delay_s=0.05)] * 8)
    parts = {name: getattr(PROMPT, name) for name in PROMPT.__dataclass_fields__}
    async with provider(server, CONCURRENCY="3") as asked:
        prompts = [Prompt(**{**parts, "seed": seed}) for seed in range(8)]
        await asyncio.gather(*(asked.complete(each, Ledger()) for each in prompts))
    assert server.most_at_once == 3


async def test_the_budget_is_never_passed(server: OpenAIServer) -> None:
    most = PROMPT.token_bound + PROMPT.max_tokens
    parts = {name: getattr(PROMPT, name) for name in PROMPT.__dataclass_fields__}
    ledger = Ledger(Budget(max_tokens=2 * most))
    async with provider(server) as asked:
        prompts = [Prompt(**{**parts, "seed": seed}) for seed in range(100)]
        found = await asyncio.gather(
            *(asked.complete(each, ledger) for each in prompts), return_exceptions=True
        )
    refused = [each for each in found if isinstance(each, BudgetExceeded)]
    assert len(refused) == 100 - len(server.requests)
    assert len(server.requests) > 2, "what calls did not use is there for others"
    assert 2 * most - most < ledger.tokens <= 2 * most
    assert refused[0].reason == "BUDGET_EXCEEDED"


async def test_a_budget_in_dollars(server: OpenAIServer) -> None:
    prices = Prices(1.0, 1.0)
    most = Usage(PROMPT.token_bound, PROMPT.max_tokens).cost(prices)
    assert (await ask_once(server, Ledger(Budget(max_cost=most), prices))).failure is None
    with pytest.raises(BudgetExceeded, match=r"\$"):
        await ask_once(server, Ledger(Budget(max_cost=most * 0.99), prices))
    assert len(server.requests) == 1
    with pytest.raises(Exception, match="TDB_PROVIDER_PRICES"):
        Ledger(Budget(max_cost=1.0))


async def test_a_call_that_is_cancelled_may_have_been_paid(server: OpenAIServer) -> None:
    server.faults.append(Fault(delay_s=30))
    ledger = Ledger(Budget(max_tokens=10**6))
    task = asyncio.ensure_future(ask_once(server, ledger))
    await asyncio.to_thread(server.first.wait, 30)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ledger.tokens == PROMPT.token_bound + PROMPT.max_tokens
    async with ledger.reserve(Usage(1, 1)):
        pass


def test_no_provider_says_how_to_have_one() -> None:
    with pytest.raises(ProviderNotConfigured, match="TDB_PROVIDER_URL") as refused:
        ProviderSettings.of(Settings.from_env({}))
    assert refused.value.code == "FAILED_PRECONDITION"
    assert "token_pattern" in str(refused.value)


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"URL": "ftp://x/v1"}, "URL must be an http or https URL"),
        ({"URL": "http://user:word@x/v1"}, "must be a plain URL without user"),
        ({"URL": "http://x/v1?key=1"}, "must be a plain URL"),
        ({"MODEL": ""}, "TDB_PROVIDER_URL is set and TDB_PROVIDER_MODEL is not"),
        ({"URL": ""}, "TDB_PROVIDER_MODEL is set and TDB_PROVIDER_URL is not"),
        ({"PRICES": "1"}, "PRICES must be PROMPT,COMPLETION"),
        ({"PRICES": "-1,1"}, "PRICES must be PROMPT,COMPLETION"),
        ({"CONCURRENCY": "0"}, "CONCURRENCY must be a number from 1"),
        ({"CONCURRENCY": "1.5"}, "CONCURRENCY must be a number from 1"),
        ({"TIMEOUT_SECONDS": "nan"}, "TIMEOUT_SECONDS must be a number of seconds"),
        ({"TIMEOUT_SECONDS": "0"}, "TIMEOUT_SECONDS must be more than 0 seconds"),
        ({"THINKING_TOKENS": "-1"}, "THINKING_TOKENS must be a whole number from 0"),
    ],
)
def test_settings_that_cannot_be_right(env: dict[str, str], says: str) -> None:
    given = {"URL": "http://x/v1", "MODEL": "m", **env}
    with pytest.raises(SettingsError, match=says):
        Settings.from_env({f"TDB_PROVIDER_{name}": value for name, value in given.items()})


def test_settings_do_not_show_the_key() -> None:
    given = {"TDB_PROVIDER_URL": "http://x:1/v1/", "TDB_PROVIDER_MODEL": "m"}
    settings = ProviderSettings.of(Settings.from_env({**given, "TDB_PROVIDER_KEY": KEY}))
    assert KEY not in repr(settings)
    assert settings.endpoint.host == "x:1"
    assert (settings.prices, settings.concurrency, settings.timeout_s) == (None, 8, 120.0)
