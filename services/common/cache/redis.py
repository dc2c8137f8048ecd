"""The cache in Redis (or Valkey), shared by services; it may fail in any way and at any time.

redis-py's defaults cost 3.8 s a call when nothing listens, and more when what listens never
answers. So here nothing is retried, every wait ends after 50 ms, every command after 250 ms, and
a breaker keeps calls away from what does not answer. Failures are counted, a change of state is
logged once, and a value that cannot be had is a miss.
"""

import asyncio
import logging
import ssl
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import redis.asyncio
import redis.exceptions
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from services.common.cache import values
from services.common.cache.breaker import Breaker, State
from services.common.cache.cache import MAX_VALUE_BYTES, Counters
from services.common.cache.redis_url import RedisUrl

PREFIX = "tdb:1:"
"""The number changes with the layout of keys or values."""
LIFE_S = 7 * 24 * 3600
WAIT_S = 0.05
"""For the set-up of a connection, and for each piece of an answer."""
COMMAND_S = 0.25
"""For a free connection, and for a whole command: what comes drop by drop is no answer."""
CONNECTIONS = 16
LONG_BYTES = 64 * 1024
"""Longer values are packed in a thread: the loop must not wait for it."""

Result = TypeVar("Result")
_log = logging.getLogger("tdb.cache")


class RedisCache:
    """For one event loop; connects when it is first used."""

    name = "redis"
    kept_bytes = None

    def __init__(
        self,
        url: RedisUrl,
        breaker: Breaker | None = None,
        wait_s: float = WAIT_S,
        command_s: float = COMMAND_S,
    ) -> None:
        self.counters = Counters()
        self._url = url
        self._command_s = command_s
        self._breaker = breaker or Breaker()
        self._refuses = False
        # Not redis-py's blocking pool: that loses a connection when a caller leaves as it is given
        # back, until none is left.
        self._room = asyncio.Semaphore(CONNECTIONS)
        self._pool = redis.asyncio.ConnectionPool(
            max_connections=CONNECTIONS, **_connection(url, wait_s)
        )
        self._client = redis.asyncio.Redis(connection_pool=self._pool)

    @property
    def state(self) -> State:
        return self._breaker.state

    async def get(self, key: str) -> bytes | None:
        value = await self._get(key)
        if value is None:
            self.counters.misses += 1
        else:
            self.counters.hits += 1
        return value

    async def put(self, key: str, value: bytes) -> None:
        if len(value) > MAX_VALUE_BYTES:
            self.counters.too_large += 1
            return
        if self._breaker.state is not State.CLOSED:
            return  # a probe is for reading: it shows as much and carries less
        packed = await _off_loop(len(value), values.pack, key, value)

        async def store() -> None:
            try:
                await self._client.set(PREFIX + key, packed, ex=LIFE_S)
            except redis.exceptions.ResponseError as error:
                # It answers, so it can be read: it is full, or not to be written to.
                self.counters.errors += 1
                self._note_refusal(type(error).__name__)
            else:
                self.counters.stored += 1
                self._note_refusal(None)

        await self._guarded(store)

    async def aclose(self) -> None:
        await self._pool.aclose()

    async def _get(self, key: str) -> bytes | None:
        async def fetch() -> object:
            try:
                return await self._client.get(PREFIX + key)
            except redis.exceptions.ResponseError as error:
                if not str(error).startswith("WRONGTYPE"):
                    raise
                return error  # under the key lies a list, a hash or the like

        found = await self._guarded(fetch)
        if found is None:
            return None
        try:
            if not isinstance(found, bytes):
                raise values.Damaged
            return await _off_loop(len(found), values.unpack, key, found)
        except values.Damaged:
            self.counters.damaged += 1
            return None

    async def _guarded(self, command: Callable[[], Awaitable[Result]]) -> Result | None:
        """What `command` answers; None where the breaker is open or the command fails."""
        try:
            async with asyncio.timeout(self._command_s):
                await self._room.acquire()
        except TimeoutError:
            self.counters.errors += 1
            return None
        try:
            # Asked only now: the breaker may have opened while others were waited for.
            return await self._admitted(command) if self._breaker.admits() else None
        finally:
            self._room.release()

    async def _admitted(self, command: Callable[[], Awaitable[Result]]) -> Result | None:
        try:
            async with asyncio.timeout(self._command_s):
                result = await command()
        except asyncio.CancelledError:
            self._breaker.abandoned()
            raise
        except Exception as error:  # a client library that is fed garbage raises whatever it likes
            self._failed(type(error).__name__)
            return None
        if self._breaker.succeeded():
            _log.info("the cache answers again", extra={"fields": {"cache": str(self._url)}})
        return result

    def _failed(self, error: str) -> None:
        """`error`: a type's name. The text may quote what the other side sent."""
        self.counters.errors += 1
        if self._breaker.failed():
            fields = {
                "cache": str(self._url),
                "error": error,
                "retry_s": self._breaker.pause_s,
            }
            _log.warning(
                "the cache does not answer; results are computed without it",
                extra={"fields": fields},
            )

    def _note_refusal(self, error: str | None) -> None:
        """Logs the first refusal of a series, and its end."""
        if self._refuses == (error is not None):
            return
        self._refuses = error is not None
        fields = {"cache": str(self._url)}
        if error:
            _log.warning(
                "the cache takes no values; is it full, without an eviction policy?",
                extra={"fields": {**fields, "error": error}},
            )
        else:
            _log.info("the cache takes values again", extra={"fields": fields})


def _connection(url: RedisUrl, wait_s: float) -> dict[str, Any]:
    options: dict[str, Any] = {
        "host": url.host,
        "port": url.port,
        "db": url.database,
        "username": url.user or None,
        "password": url.password or None,
        "retry": Retry(NoBackoff(), 0),
        "socket_connect_timeout": wait_s,
        "socket_timeout": wait_s,
        "socket_keepalive": True,
        # The older protocol and no introduction: fewer round trips to set up a connection.
        "protocol": 2,
        "driver_info": None,
    }
    if url.tls:
        options["connection_class"] = _TlsConnection
        options["context"] = ssl.create_default_context()
    return options


class _TlsConnection(redis.asyncio.SSLConnection):
    """Shares the context, which takes longer to make than a connection may take to set up."""

    def __init__(self, *, context: ssl.SSLContext, **options: Any) -> None:
        super().__init__(**options)
        self.ssl_context.context = context


async def _off_loop(
    size: int, work: Callable[[str, bytes], bytes], key: str, value: bytes
) -> bytes:
    if size > LONG_BYTES:
        return await asyncio.to_thread(work, key, value)
    return work(key, value)
