"""Answers that were given before, or are being worked out for somebody else.

The key of an answer is known before anything runs: the `result_id` of its manifest, and whatever
else decides one of its bytes. What is asked by several at once is worked out once, for all of them;
what was answered is kept, its manifest saying `cached` and no timings, because nothing ran. Errors
are never kept, and neither is what cannot be told from its request: sampling without a seed.

`result_id` says which question was answered, on whatever machine; two answers under it differ by
rounding. The key names the kind of device and the version of torch besides, so that an answer kept
is the one this machine gives, to the last bit.
"""

import asyncio
import functools
import hashlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from google.protobuf import descriptor_pool
from google.protobuf.message import DecodeError, Message
from tdb.inference.v1 import manifest_pb2, status_pb2

from services.common import calls
from services.common.cache.cache import MAX_VALUE_BYTES, Cache
from services.common.cache.flights import Flights
from services.inference import manifest
from services.inference.engine.model import Model

LONG_BYTES = 64 * 1024
"""Longer messages are read and written in a thread: the loop must not wait for them."""

Answer = TypeVar("Answer", bound=Message)
Value = TypeVar("Value")
_log = logging.getLogger("tdb.cache")


@dataclass(frozen=True)
class Key:
    """Under which an answer is kept, and the id that its manifest must bear."""

    text: str
    result_id: str


class Answers:
    """Gives answers from the cache or from `compute`, once for all who ask at the same time."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.flights: Flights[Message] = Flights()

    def status(self) -> status_pb2.CacheStatus:
        counters = self.cache.counters
        return status_pb2.CacheStatus(
            store=self.cache.name,
            breaker=self.cache.state.value,
            hits=counters.hits,
            misses=counters.misses,
            errors=counters.errors,
            joined=self.flights.joined,
        )

    async def one(
        self,
        method: str,
        model: Model,
        canonical: Message,
        kind: type[Answer],
        compute: Callable[[], Awaitable[Answer]],
        dictionaries: Sequence[str] = (),
    ) -> Answer:
        """The answer of a unary call. `dictionaries` are used besides those that it names."""

        async def messages() -> AsyncIterator[Answer]:
            yield await compute()

        found = self.stream(method, model, canonical, kind, messages, dictionaries)
        async with aclosing(found):  # type: ignore[type-var]
            return await anext(found)

    async def stream(
        self,
        method: str,
        model: Model,
        canonical: Message,
        kind: type[Answer],
        compute: Callable[[], AsyncIterator[Answer]],
        dictionaries: Sequence[str] = (),
    ) -> AsyncIterator[Answer]:
        """The messages of a streamed answer, as they come; the last has the manifest."""

        def find_key() -> Key:
            return key_of(manifest.question(method, model, canonical, dictionaries), model, kind)

        key = await _off_loop(canonical.ByteSize(), find_key)

        def work() -> AsyncIterator[Message]:
            return self._work(key, kind, compute)

        following = self.flights.follow(key.text, work, partial(calls.share, calls.current()))
        async with aclosing(following) as found:  # type: ignore[type-var]
            async for message in found:
                assert isinstance(message, kind)
                yield message

    async def _work(
        self, key: Key, kind: type[Answer], compute: Callable[[], AsyncIterator[Answer]]
    ) -> AsyncIterator[Message]:
        if (kept := await self._kept(key, kind)) is not None:
            for message in kept:
                yield message
            return
        sent: list[Message] = []
        async with aclosing(compute()) as computed:  # type: ignore[type-var]
            async for message in computed:
                sent.append(message)
                if (made := _manifest(message)) is not None:
                    await self._keep(key, made, sent)
                yield message

    async def _kept(self, key: Key, kind: type[Answer]) -> list[Answer] | None:
        value = await self.cache.get(key.text)
        if value is None:
            return None
        try:
            messages = await _off_loop(len(value), lambda: [*_messages(value, kind)])
        except DecodeError:
            messages = []
        if not messages or _id_of(messages[-1]) != key.result_id:
            self.cache.counters.damaged += 1
            return None
        return messages

    async def _keep(self, key: Key, made: manifest_pb2.Manifest, sent: Sequence[Message]) -> None:
        if made.result_id != key.result_id:
            # Two parts of this program disagree on what was asked: a bug, and no answer to keep.
            _log.error("an answer has another id than its question", extra={"fields": vars(key)})
            return
        size = sum(message.ByteSize() for message in sent)
        if size > MAX_VALUE_BYTES:
            self.cache.counters.too_large += 1
            return
        await self.cache.put(key.text, await _off_loop(size, lambda: _value(sent)))


def key_of(asked: manifest.Question, model: Model, kind: type[Message]) -> Key:
    """Everything that decides a byte of the answer, timings left aside."""
    parts = (
        asked.result_id,
        model.identity.revision,
        model.vocabulary.files_hash,
        *(
            f"{each.header.site_in!r} {each.header.site_out!r} {each.header.activation} "
            f"{each.warning}"
            for each in asked.dictionaries
        ),
        _device(model.device),
        torch.__version__,
        _schema(kind.DESCRIPTOR.file.name),
    )
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    return Key(f"{asked.method}:{digest}", asked.result_id)


@functools.cache
def _device(device: torch.device) -> str:
    """Its kind: two of one kind give the same bits."""
    match device.type:
        case "cuda":
            return f"cuda {torch.cuda.get_device_name(device)}"
        case "cpu":
            return f"cpu {torch.backends.cpu.get_cpu_capability()}"
        case other:
            return other


@functools.cache
def _schema(file: str) -> str:
    """Of a proto file with all it imports: an answer that lacks a new field is none."""
    digest = hashlib.sha256()
    seen: set[str] = set()
    found = [file]
    while found:
        if (name := found.pop()) not in seen:
            seen.add(name)
            described = descriptor_pool.Default().FindFileByName(name)
            digest.update(described.serialized_pb)
            found += [each.name for each in described.dependencies]
    return digest.hexdigest()


def _manifest(message: Message) -> manifest_pb2.Manifest | None:
    """Of an answer, or of the summary that ends a stream."""
    found: Message = message
    if "event" in message.DESCRIPTOR.oneofs_by_name:
        if message.WhichOneof("event") != "summary":
            return None
        found = message.summary  # type: ignore[attr-defined]
    made: manifest_pb2.Manifest = found.manifest  # type: ignore[attr-defined]
    return made


def _id_of(message: Message) -> str:
    found = _manifest(message)
    return found.result_id if found is not None else ""


def _value(sent: Sequence[Message]) -> bytes:
    """The messages as they will be sent another time, each behind its length in four bytes."""
    parts: list[bytes] = []
    last: Message | None = None
    for message in sent:
        again = _again(message)
        if again == last:
            continue  # only its place in the queue was new
        last = again
        data = again.SerializeToString()
        parts += [len(data).to_bytes(4, "big"), data]
    return b"".join(parts)


def _again(message: Message) -> Message:
    """A message as the cache gives it: without what was so only when it was computed."""
    again = type(message)()
    again.CopyFrom(message)
    if (made := _manifest(again)) is not None:
        made.cached = True
        made.timings.Clear()
    elif again.WhichOneof("event") == "progress":
        again.progress.ClearField("queue")  # type: ignore[attr-defined]
    return again


def _messages(value: bytes, kind: type[Answer]) -> Iterator[Answer]:
    """Raises DecodeError."""
    at = 0
    while at < len(value):
        end = at + 4 + int.from_bytes(value[at : at + 4], "big")
        if end > len(value):
            raise DecodeError
        yield kind.FromString(value[at + 4 : end])
        at = end


async def _off_loop(size: int, work: Callable[[], Value]) -> Value:
    return await asyncio.to_thread(work) if size > LONG_BYTES else work()
