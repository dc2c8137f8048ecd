"""A Redis that is dead, hung, full, flushed, restarted or no Redis at all: a miss, never an error.

Times are bounded by guards far above what they are; `benchmarks/cache.py` measures them.
"""

import asyncio
import hashlib
import logging
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from services.common.cache.breaker import Breaker, State
from services.common.cache.redis import PREFIX, RedisCache
from services.common.cache.redis_url import RedisUrl
from tests.common.cache.redis_server import RedisServer, patient, running
from tests.common.certificates import Authority, Pair

HANGS_S = 60
"""What takes this long would have gone on for ever; every wait here is of milliseconds."""


NOISE = hashlib.shake_256(b"seed").digest(200_000)
"""What cannot be deflated."""


class Clock:
    """Time for the breaker, so that no test waits for it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@asynccontextmanager
async def cache_of(
    address: RedisUrl, clock: Clock, *, hasty: bool = False
) -> AsyncIterator[RedisCache]:
    """`hasty`: with the real time-outs; a value that is there may then be missed."""
    breaker = Breaker(clock)
    cache = RedisCache(address, breaker) if hasty else patient(address, breaker)
    async with asyncio.timeout(HANGS_S):
        yield cache
    await cache.aclose()


async def recovers(cache: RedisCache, clock: Clock) -> None:
    """In the end it is used again, by itself."""
    found = None
    while found != b"again":
        clock.now += 60
        await cache.put("recovered", b"again")
        found = await cache.get("recovered")
    assert cache.state == State.CLOSED


async def loses_nothing(cache: RedisCache) -> None:
    """Whatever state the other side is in: a miss, and a value that goes nowhere."""
    assert await cache.get("a") is None
    await cache.put("a", b"x")


async def test_nothing_listens(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    server = RedisServer()  # a free port; never started
    async with cache_of(server.address, clock) as cache:
        for _ in range(20):
            await loses_nothing(cache)
        assert str(cache.state) == "open"
        assert cache.counters.misses == 20
        assert cache.counters.errors == 3
        assert [each.message for each in caplog.records] == [
            "the cache does not answer; results are computed without it"
        ]
        for _ in range(4):  # probes that fail say nothing new
            clock.now += 60
            await loses_nothing(cache)
        assert cache.counters.errors == 7
        assert len(caplog.records) == 1
        server.start()
        try:
            assert await cache.get("a") is None
            assert str(cache.state) == "open", "not probed before its pause is over"
            clock.now += 60
            await loses_nothing(cache)
            assert cache.state == State.CLOSED
            await cache.put("a", b"x")
            assert await cache.get("a") == b"x"
        finally:
            server.stop()
    assert caplog.records[-1].message == "the cache answers again"
    assert len(caplog.records) == 2


async def test_it_hangs_and_comes_back(redis_server: RedisServer, clock: Clock) -> None:
    async with cache_of(redis_server.address, clock, hasty=True) as cache:
        await recovers(cache, clock)
        errors = cache.counters.errors
        redis_server.freeze()
        try:
            for _ in range(10):
                assert await cache.get("recovered") is None
                await cache.put("b", b"lost")
            assert cache.state == State.OPEN
            assert cache.counters.errors == errors + 3
        finally:
            redis_server.thaw()
        await recovers(cache, clock)


async def test_many_calls_at_once_while_it_hangs(redis_server: RedisServer, clock: Clock) -> None:
    """More than there are connections: none is lost, and none of them is either."""
    async with cache_of(redis_server.address, clock, hasty=True) as cache:
        redis_server.freeze()
        try:
            found = await asyncio.gather(*(cache.get(str(number)) for number in range(200)))
        finally:
            redis_server.thaw()
        assert found == [None] * 200
        await recovers(cache, clock)
    async with cache_of(redis_server.address, clock) as cache:
        found = await asyncio.gather(*(cache.get("recovered") for _ in range(200)))
        assert found == [b"again"] * 200


async def test_it_is_restarted(clock: Clock) -> None:
    with running() as server:
        async with cache_of(server.address, clock) as cache:
            await cache.put("a", b"x")
            server.stop()
            server.start()
            await loses_nothing(cache)  # may fail on a connection of before
            assert cache.counters.errors <= 1
            await recovers(cache, clock)


async def test_it_is_killed_while_many_use_it(clock: Clock) -> None:
    with running() as server:
        async with cache_of(server.address, clock) as cache:

            async def use(number: int) -> None:
                for _ in range(100):
                    assert await cache.get(str(number)) in (None, b"x" * number)
                    await cache.put(str(number), b"x" * number)

            using = asyncio.gather(*(use(number) for number in range(20)))
            await asyncio.sleep(0.05)
            server.stop()
            await using
            server.start()
            await recovers(cache, clock)


async def test_it_is_full(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """What it has is still read; what it refuses is said once."""
    caplog.set_level(logging.INFO)
    limits = ("--maxmemory", "4mb", "--maxmemory-policy", "noeviction")
    with running(*limits) as server:
        async with cache_of(server.address, clock) as cache:
            await cache.put("first", b"here")
            for number in range(30):
                await cache.put(str(number), NOISE)
                assert await cache.get("first") == b"here"
            assert cache.state == State.CLOSED
            assert cache.counters.errors > 10
            assert cache.counters.stored + cache.counters.errors == 31
            assert len(caplog.records) == 1
            server.command("FLUSHALL")
            await cache.put("a", b"x")
            assert await cache.get("a") == b"x"
    assert [each.message for each in caplog.records] == [
        "the cache takes no values; is it full, without an eviction policy?",
        "the cache takes values again",
    ]


async def test_it_makes_room_where_it_may(clock: Clock) -> None:
    limits = ("--maxmemory", "4mb", "--maxmemory-policy", "allkeys-lfu")
    with running(*limits) as server:
        async with cache_of(server.address, clock) as cache:
            for number in range(30):
                await cache.put(str(number), NOISE)
            assert cache.counters.errors == 0
            assert cache.counters.stored == 30


async def test_it_is_flushed(redis_server: RedisServer, clock: Clock) -> None:
    async with cache_of(redis_server.address, clock) as cache:
        await cache.put("a", b"x")
        redis_server.command("FLUSHALL")
        assert await cache.get("a") is None
        assert cache.counters.errors == 0


async def test_values_live_for_a_week(redis_server: RedisServer, clock: Clock) -> None:
    async with cache_of(redis_server.address, clock) as cache:
        await cache.put("a", b"x")
        reply = redis_server.command("TTL", PREFIX + "a")
        assert 0 <= 7 * 24 * 3600 - int(reply[1:]) < 60


async def test_what_lies_there_is_not_ours(redis_server: RedisServer, clock: Clock) -> None:
    async with cache_of(redis_server.address, clock) as cache:
        redis_server.command("SET", PREFIX + "text", "hello")
        redis_server.command("RPUSH", PREFIX + "list", "hello")
        await cache.put("a", b"the value of a")
        redis_server.command("COPY", PREFIX + "a", PREFIX + "b")
        redis_server.command("APPEND", PREFIX + "a", "more")
        for key in ("text", "list", "a", "b"):
            assert await cache.get(key) is None
        counters = cache.counters
        assert (counters.damaged, counters.misses, counters.errors) == (4, 4, 0)
        assert cache.state == State.CLOSED
        await cache.put("a", b"mended")
        assert await cache.get("a") == b"mended"


async def test_a_wrong_password(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with running(password="s3cret") as server:
        async with cache_of(server.address, clock) as cache:
            await cache.put("a", b"x")
            assert await cache.get("a") == b"x"
        wrong = RedisUrl.parse(f"redis://:hush@127.0.0.1:{server.port}")
        for address in (wrong, RedisUrl.parse(f"redis://127.0.0.1:{server.port}")):
            async with cache_of(address, clock) as cache:
                for _ in range(5):
                    await loses_nothing(cache)
                assert cache.state == State.OPEN
    assert "hush" not in caplog.text
    assert "s3cret" not in caplog.text
    assert all("hush" not in repr(vars(record)) for record in caplog.records)


@asynccontextmanager
async def behind_tls(server: RedisServer, pair: Pair) -> AsyncIterator[int]:
    """A port that speaks TLS for the server: not every Redis is built with it."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(pair.cert, pair.key)
    serving: set[asyncio.Task[None]] = set()

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(4096):
            writer.write(data)
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        serving.add(task)
        inner = await asyncio.open_connection("127.0.0.1", server.port)
        await asyncio.gather(copy(reader, inner[1]), copy(inner[0], writer))

    listener = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    yield listener.sockets[0].getsockname()[1]
    listener.close()
    await asyncio.gather(*serving, return_exceptions=True)
    await listener.wait_closed()


async def test_over_tls_its_certificate_is_checked(
    redis_server: RedisServer, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority, stranger = Authority(tmp_path), Authority(tmp_path, "stranger")
    monkeypatch.setenv("SSL_CERT_FILE", authority.path)
    for signed_by, hosts, works in (
        (authority, ("127.0.0.1",), True),
        (stranger, ("127.0.0.1",), False),
        (authority, ("elsewhere",), False),
    ):
        async with behind_tls(redis_server, signed_by.pair("redis", hosts=hosts)) as port:
            address = RedisUrl.parse(f"rediss://127.0.0.1:{port}")
            async with cache_of(address, clock) as cache:
                await cache.put("a", b"x")
                assert await cache.get("a") == (b"x" if works else None)
                assert cache.counters.errors == (0 if works else 2)


def test_the_context_of_tls_is_made_once() -> None:
    """Made for each connection, it would take all the time that one may take, on the loop."""
    cache = RedisCache(RedisUrl.parse("rediss://127.0.0.1"))
    made = [cache._pool.make_connection() for _ in range(3)]  # type: ignore[no-untyped-call]
    contexts = {id(each.ssl_context.get()) for each in made}
    assert len(contexts) == 1


async def test_callers_that_leave_shift_no_answers(redis_server: RedisServer, clock: Clock) -> None:
    """A reply that nobody waits for any more must not become the next command's."""
    async with cache_of(redis_server.address, clock) as cache:
        for number in range(20):
            await cache.put(str(number), str(number).encode())
        for turns in range(60):
            leaving = [asyncio.ensure_future(cache.get(str(number))) for number in range(20)]
            for _ in range(turns % 12):
                await asyncio.sleep(0)
            for task in leaving[:10]:
                task.cancel()
            found = await asyncio.gather(*leaving, return_exceptions=True)
            for number, value in enumerate(found):
                if not isinstance(value, asyncio.CancelledError):
                    assert value == str(number).encode()
        assert cache.counters.damaged == 0


Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def saying(data: bytes) -> Answer:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(4096):
            writer.write(data)

    return answer


async def drop_by_drop(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Each piece comes in time, the whole never."""
    await reader.read(4096)
    writer.write(b"$1000\r\n")
    for _ in range(1000):
        writer.write(b"x")
        await asyncio.sleep(0.02)


async def never(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while await reader.read(4096):
        pass


async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(10)


GARBAGE: dict[str, Answer] = {
    "http": saying(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
    "bytes": saying(bytes(range(256))),
    "zeros": saying(b"\0" * 1000),
    "a length that is none": saying(b"$abc\r\n"),
    "a length below nothing": saying(b"$-7\r\n"),
    "more than there is memory": saying(b"$99999999999999\r\n"),
    "arrays of arrays": saying(b"*1\r\n" * 5000),
    "an error": saying(b"-ERR no\r\n"),
    "an error that is no text": saying(b"-\xff\xfe\r\n"),
    "a number": saying(b":42\r\n"),
    "a list": saying(b"*2\r\n$1\r\na\r\n$1\r\nb\r\n"),
    "fine": saying(b"+OK\r\n"),
    "two replies to one question": saying(b"$1\r\na\r\n$1\r\nb\r\n"),
    "drop by drop": drop_by_drop,
    "nothing": never,
    "the end": hang_up,
}


@pytest.mark.parametrize("answer", GARBAGE.values(), ids=GARBAGE.keys())
async def test_it_speaks_garbage(answer: Answer, clock: Clock) -> None:
    ended: list[asyncio.Task[None]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        ended.append(task)
        try:
            await answer(reader, writer)
        except OSError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    address = RedisUrl.parse(f"redis://127.0.0.1:{port}")
    async with cache_of(address, clock, hasty=True) as cache:
        for _ in range(6):
            await loses_nothing(cache)
            clock.now += 1
        counters = cache.counters
        assert counters.hits == 0
        assert counters.misses == 6
        assert counters.errors + counters.damaged >= 3
    server.close()
    for task in ended:
        task.cancel()
    await asyncio.gather(*ended, return_exceptions=True)
    await server.wait_closed()
