"""What an answer from the cache takes over gRPC, and what a Redis that fails costs.

    python -m benchmarks.cache [--tokens 64] [--hits 300]

The service runs in a process of its own on random weights of GPT-2-small's shape; one `Attribute`
with 50 rows, without and with read-outs of 10 tokens for each, and one `Run`, are asked again and
again. The first is computed, the others come from the cache: in the service's memory, then in a
real Redis on loopback. Then the cache alone is asked while its Redis is dead, hung or speaks
garbage: what each `get` takes until the breaker opens, and after.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import torch
from tdb.inference.v1 import attribute_pb2, run_pb2
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.attribute import DISTRACTOR, TARGET, Stub, ids_of, service
from services.common.cache.redis import RedisCache
from services.common.cache.redis_url import RedisUrl
from tests.common.cache.redis_server import RedisServer, running

Milliseconds = float


def attribute(ids: list[int], read_out_tokens: int) -> attribute_pb2.AttributeRequest:
    request = attribute_pb2.AttributeRequest(top_k=50)
    request.run.prompt.token_ids.ids.extend(ids)
    request.objective.logit_diff.targets.add(id=TARGET)
    request.objective.logit_diff.distractors.add(id=DISTRACTOR)
    if read_out_tokens:
        request.read_outs.tokens = read_out_tokens
    return request


def run(ids: list[int]) -> run_pb2.RunRequest:
    request = run_pb2.RunRequest()
    request.run.prompt.token_ids.ids.extend(ids)
    return request


def hits(stub: Stub, ids: list[int], repetitions: int) -> None:
    """Prints a line for each kind of request."""
    calls: dict[str, Callable[[], attribute_pb2.AttributeResponse | run_pb2.RunResponse]] = {
        "Run": lambda: stub.Run(run(ids), timeout=120),
        "Attribute": lambda: stub.Attribute(attribute(ids, 0), timeout=120),
        "Attribute, read-outs": lambda: stub.Attribute(attribute(ids, 10), timeout=120),
    }
    for name, call in calls.items():
        started = time.perf_counter()
        response = call()
        computed = (time.perf_counter() - started) * 1e3
        assert not response.manifest.cached
        times = []
        for _ in range(repetitions):
            started = time.perf_counter()
            response = call()
            times.append((time.perf_counter() - started) * 1e3)
            assert response.manifest.cached
        size = response.ByteSize() / 1000
        print(
            f"  {name:22} {size:6.1f} kB   p50 {statistics.median(times):6.2f} ms   "
            f"p95 {_p95(times):6.2f} ms   computed {computed:6.0f} ms"
        )


async def faults() -> None:
    """Prints what a `get` takes, one after another, while Redis fails in some way."""

    async def garbage(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(4096):
            writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    await _failing("dead", RedisServer().address, lambda: None)
    with running() as server:
        await _failing("hung", server.address, server.freeze)
    listener = await asyncio.start_server(garbage, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    await _failing("garbage", RedisUrl.parse(f"redis://127.0.0.1:{port}"), lambda: None)
    listener.close()
    with running() as server:
        cache = RedisCache(server.address)
        for size in (1_000, 50_000, 1_000_000):
            await cache.put(str(size), torch.randn(size // 4).numpy().tobytes())
            before = cache.counters.hits
            times = [await _timed(lambda: cache.get(str(size))) for _ in range(200)]  # noqa: B023
            print(
                f"  alive, {size // 1000} kB: p50 {statistics.median(times):.2f} ms, "
                f"{cache.counters.hits - before} of 200 in time"
            )
        await cache.aclose()


async def _failing(name: str, address: RedisUrl, fail: Callable[[], None]) -> None:
    cache = RedisCache(address)
    fail()
    first = [await _timed(lambda: cache.get("a")) for _ in range(3)]
    after = [await _timed(lambda: cache.get("a")) for _ in range(200)]
    assert cache.counters.hits == 0
    await cache.aclose()
    shown = ", ".join(f"{each:.1f}" for each in first)
    print(f"  {name:10} first three {shown} ms   then p50 {statistics.median(after):.3f} ms")


async def _timed(work: Callable[[], Awaitable[object]]) -> Milliseconds:
    started = time.perf_counter()
    await work()
    return (time.perf_counter() - started) * 1e3


def _p95(times: Sequence[float]) -> float:
    return statistics.quantiles(times, n=20)[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--hits", type=int, default=300)
    options = parser.parse_args()
    ids = ids_of(options.tokens)
    with tempfile.TemporaryDirectory() as name:
        torch.manual_seed(0)
        GPT2LMHeadModel(GPT2Config()).save_pretrained(name)
        print("in memory")
        with service(Path(name), TDB_CACHE_MIB="256") as stub:
            hits(stub, ids, options.hits)
        print("in Redis")
        with running() as redis, service(Path(name), TDB_REDIS_URL=redis.url) as stub:
            hits(stub, ids, options.hits)
    print("the cache alone")
    asyncio.run(faults())


if __name__ == "__main__":
    main()
