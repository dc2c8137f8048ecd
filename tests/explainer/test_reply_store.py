"""Replies on disk: kept over a restart, bounded, and kept even for a caller who has gone."""

import asyncio
import random
from pathlib import Path

import pytest

from services.common.settings import Settings
from services.explainer.database import Database
from services.explainer.engine.budget import Ledger
from services.explainer.engine.openai_provider import OpenAIProvider
from services.explainer.engine.provider_settings import ProviderSettings
from services.explainer.reply_store import ReplyStore
from tests.explainer.openai_server import KEY, MODEL, Fault, OpenAIServer
from tests.explainer.test_provider import PROMPT, SAID


def noise(number: int) -> str:
    """Text that compression makes no shorter than 500 bytes."""
    return random.Random(number).randbytes(500).hex()


async def test_replies_outlive_the_process_and_hold_nothing_but_the_answer(tmp_path: Path) -> None:
    path = tmp_path / "explanations.sqlite3"
    database = Database(path)
    await ReplyStore(database, 10**6).put("key", "the reply, a surrogate \\ud800 and Zoë")
    database.close()
    database = Database(path)
    store = ReplyStore(database, 10**6)
    assert await store.get("key") == "the reply, a surrogate \\ud800 and Zoë"
    assert await store.get("other") is None
    columns = await database.read(
        lambda connection: [row[1] for row in connection.execute("PRAGMA table_info(reply)")]
    )
    assert columns == ["key", "value", "created_ms"]
    database.close()


async def test_the_oldest_go(tmp_path: Path) -> None:
    database = Database(tmp_path / "explanations.sqlite3")
    for most in (2_500, 2_500):  # the second one counts what the first has left
        store = ReplyStore(database, most)
        for number in range(10):
            await store.put(f"{number}", noise(number))
            await asyncio.sleep(0.002)
        await store.put("9", noise(9))
        kept = [number for number in range(10) if await store.get(f"{number}") is not None]
        assert kept == [6, 7, 8, 9]
    database.close()


@pytest.fixture
def server() -> OpenAIServer:
    return OpenAIServer(lambda body: SAID)


async def test_a_reply_whose_caller_has_gone_is_kept(server: OpenAIServer, tmp_path: Path) -> None:
    server.faults.append(Fault(delay_s=0.2))
    env = {
        "TDB_PROVIDER_URL": server.url,
        "TDB_PROVIDER_MODEL": MODEL,
        "TDB_PROVIDER_KEY": KEY,
    }
    database = Database(tmp_path / "explanations.sqlite3")
    with server:
        settings = ProviderSettings.of(Settings.from_env(env))
        async with OpenAIProvider(settings, ReplyStore(database, 10**6)) as provider:
            ledger = Ledger()
            task = asyncio.ensure_future(provider.complete(PROMPT, ledger))
            await asyncio.to_thread(server.first.wait, 30)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            # Whoever asks the same next waits for the reply that is on its way.
            again = await provider.complete(PROMPT, Ledger())
    assert (again.text, again.cached) == (SAID, True)
    assert len(server.requests) == 1
    assert (ledger.calls, ledger.bounded_calls) == (1, 0), "its true cost is counted"
    database.close()


async def test_a_question_whose_caller_has_gone_is_not_sent_again(
    server: OpenAIServer, tmp_path: Path
) -> None:
    server.faults.append(Fault(status=500, delay_s=0.2))
    settings = ProviderSettings.of(
        Settings.from_env(
            {"TDB_PROVIDER_URL": server.url, "TDB_PROVIDER_MODEL": MODEL, "TDB_PROVIDER_KEY": KEY}
        )
    )
    database = Database(tmp_path / "explanations.sqlite3")
    with server:
        async with OpenAIProvider(settings, ReplyStore(database, 10**6)) as provider:
            task = asyncio.ensure_future(provider.complete(PROMPT, Ledger()))
            await asyncio.to_thread(server.first.wait, 30)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            # Waits until the first has ended; sent again, it would have been answered.
            assert (await provider.complete(PROMPT, Ledger())).text == SAID
    assert len(server.requests) == 2
    database.close()
