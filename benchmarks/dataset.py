"""The dataset service over gRPC: one record from a cold and a warm service, streams, search.

    python -m benchmarks.dataset [--layers 12] [--neurons 3072] [--folder DIR]

Random records of GPT-2-small's neurons: for each 10 top, 5 random and 5 examples by quantile, of 64
tokens with GELU-like activations. The service runs in a process of its own. Cold is the first call
to a service that has just become ready, with the dataset's files out of the page cache.
"""

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tdb.dataset.v1 import dataset_pb2, read_pb2, record_pb2, search_pb2, service_pb2_grpc

from services.common.addresses import Kind
from services.dataset import records
from services.dataset.groups import Group
from services.dataset.store import DatasetWriter

TOKENS, VOCABULARY = 64, 50_257
OPTIONS = (("grpc.max_receive_message_length", 16 * 2**20),)


def example(numbers: np.random.Generator) -> record_pb2.Example:
    normal = numbers.standard_normal(TOKENS, dtype=np.float32)
    return record_pb2.Example(
        token_ids=(numbers.zipf(1.3, TOKENS) % VOCABULARY).tolist(),
        activations=np.where(normal > 0, normal, normal * np.exp(normal) * 0.3).tolist(),
        document_id=str(numbers.integers(1_000_000)),
    )


def record(
    component: str, examples: int, pool: list[record_pb2.Example], numbers: random.Random
) -> record_pb2.ComponentRecord:
    """Examples are drawn from a pool: making them takes longer than all else."""
    drawn, part = numbers.sample(pool, examples), examples // 4
    made = record_pb2.ComponentRecord(component=component, random=drawn[:part])
    made.quantiles.add(lower=0, upper=1, examples=drawn[part : 2 * part])
    made.top.extend(sorted(drawn[2 * part :], key=records.peak, reverse=True))
    made.statistics.max = records.peak(made.top[0])
    made.statistics.mean, made.statistics.variance = numbers.random(), numbers.random()
    made.statistics.skewness, made.statistics.kurtosis = numbers.random(), 3 + numbers.random()
    made.statistics.fraction_active = numbers.random()
    return made


def build(folder: Path, layers: int, neurons: int, examples: int) -> None:
    numbers, drawing = np.random.default_rng(0), random.Random(0)
    pool = [example(numbers) for _ in range(2_000)]
    header = dataset_pb2.DatasetHeader(source=dataset_pb2.SOURCE_BUILT)
    with DatasetWriter(folder, header) as writer:
        for layer in range(layers):
            group = Group(Kind.NEURON, layer)
            components = map(group.component, range(neurons))
            writer.write(group, 0, (record(each, examples, pool, drawing) for each in components))
        writer.finish([f" token{number}" for number in range(VOCABULARY)])


@contextmanager
def service(data: Path) -> Iterator[tuple[service_pb2_grpc.DatasetServiceStub, psutil.Process]]:
    """A service that has just become ready."""
    env = {**os.environ, "TDB_DATASET_PORT": "0", "TDB_DATA_DIR": str(data)}
    process = subprocess.Popen(
        [sys.executable, "-m", "services.dataset"],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        port = json.loads(process.stdout.readline())["port"]
        with grpc.insecure_channel(f"127.0.0.1:{port}", options=OPTIONS) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            serving = health_pb2.HealthCheckResponse.SERVING
            check = health_pb2.HealthCheckRequest()
            while health.Check(check, wait_for_ready=True).status != serving:
                time.sleep(0.01)
            yield service_pb2_grpc.DatasetServiceStub(channel), psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(30)


def forget(folder: Path) -> None:
    """Takes the files out of the page cache."""
    for path in folder.iterdir():
        with contextlib.closing(os.fdopen(os.open(path, os.O_RDONLY))) as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed_get(stub: service_pb2_grpc.DatasetServiceStub, component: str) -> float:
    """Milliseconds."""
    started = time.perf_counter()
    stub.GetRecord(read_pb2.GetRecordRequest(dataset="bench", component=component))
    return (time.perf_counter() - started) * 1e3


def stream(stub: service_pb2_grpc.DatasetServiceStub, *, texts: bool) -> tuple[int, int, float]:
    """Records, bytes and seconds of a stream of everything."""
    started = time.perf_counter()
    count = size = 0
    request = read_pb2.StreamRecordsRequest(dataset="bench", token_texts=texts)
    for response in stub.StreamRecords(request):
        count += len(response.batch.records)
        size += response.ByteSize()
    return count, size, time.perf_counter() - started


def quantiles(name: str, times: list[float]) -> None:
    ordered = sorted(times)
    p99 = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
    print(f"{name:>34}  p50 {statistics.median(times):8.2f} ms  p99 {p99:8.2f} ms  ({len(times)})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--neurons", type=int, default=3072)
    parser.add_argument("--examples", type=int, default=20, help="in each record")
    parser.add_argument("--cold", type=int, default=10, help="services started for the cold figure")
    parser.add_argument("--warm", type=int, default=2000)
    parser.add_argument("--folder", type=Path, help="where to put (and find again) the dataset")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        data = arguments.folder or Path(temporary)
        folder = data / "datasets" / "bench"
        if not (folder / "manifest.json").exists():
            started = time.perf_counter()
            build(folder, arguments.layers, arguments.neurons, arguments.examples)
            print(f"built in {time.perf_counter() - started:.0f} s")
        total = arguments.layers * arguments.neurons
        on_disk = sum(path.stat().st_size for path in folder.iterdir())
        print(
            f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {total} records, "
            f"{on_disk / 2**20:.0f} MiB, {on_disk / total / 1e3:.1f} kB a record"
        )
        numbers = random.Random(1)

        def anywhere() -> str:
            layer, index = divmod(numbers.randrange(total), arguments.neurons)
            return f"neuron.{layer}.{index}"

        cold, next_shard = [], []
        for _ in range(arguments.cold):
            forget(folder)
            with service(data) as (stub, _process):
                cold.append(timed_get(stub, anywhere()))
                next_shard += [timed_get(stub, anywhere()) for _ in range(10)]
        quantiles("first record of a cold service", cold)
        quantiles("the ten after it", next_shard)
        with service(data) as (stub, process):
            times = [timed_get(stub, anywhere()) for _ in range(arguments.warm)]
            quantiles("any record, warm", times[100:])
            for texts in (False, True):
                runs = [stream(stub, texts=texts) for _ in range(3)]
                count, size, seconds = min(runs, key=lambda run: run[2])
                what = "with texts" if texts else "ids only"
                print(
                    f"{'stream, ' + what:>34}  {count / seconds:8.0f} records/s  "
                    f"{size / seconds / 2**20:5.0f} MiB/s"
                )
            for name, request in {
                "search by two statistics, ordered": search_pb2.SearchRequest(
                    dataset="bench",
                    ranges=[
                        search_pb2.StatisticRange(
                            statistic=search_pb2.STATISTIC_FRACTION_ACTIVE, at_most=0.1
                        ),
                        search_pb2.StatisticRange(statistic=search_pb2.STATISTIC_MAX, at_least=2),
                    ],
                    order_by=search_pb2.STATISTIC_SKEWNESS,
                ),
                "search by text, 5,000 records read": search_pb2.SearchRequest(
                    dataset="bench", text="no such text anywhere"
                ),
            }.items():
                times = []
                for _ in range(5):
                    started = time.perf_counter()
                    stub.Search(request)
                    times.append((time.perf_counter() - started) * 1e3)
                quantiles(name, times)
            memory = process.memory_info().rss / 2**20
            print(f"{'resident memory at the end':>34}  {memory:8.0f} MiB")


if __name__ == "__main__":
    main()
