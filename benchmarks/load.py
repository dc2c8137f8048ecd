"""Sixteen users at once, one of them sweeping thousands of nodes: what the others wait.

    python -m benchmarks.load [--users 16] [--seconds 120] [--think 2] [--model FOLDER]

The service runs in a process of its own with a token for each user and without a cache. One user
verifies thousands of nodes, sweep after sweep; the others click: `Attribute` with 50 rows, a third
with read-outs, and `Run` with a logit lens, each on another prompt, with a pause for thought drawn
between half and one and a half of `--think` seconds. Then, for as long again, nobody thinks: the
device cannot keep up, and each user's fair share is the same.

Printed: what clicks took and how much longer than the same click alone; how long a slice of a sweep
is; device time of each user against the fair share; and answers lost or wrong. Every answer is
compared with the same request's alone. Health is asked all the while.
"""

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tdb.inference.v1 import attribute_pb2, model_pb2, run_pb2, service_pb2_grpc, verify_pb2

Stub = service_pb2_grpc.InferenceServiceStub
DEMO = Path(__file__).parent.parent / "demo" / "model"
SWEEPER = "sweeper"
KINDS = ("Attribute", "Run", "Verify", "Verify.chunk")
HEALTH_EVERY_S = 0.05
TOLERANCE = 1e-4
"""Of the largest effect of an answer: padded passes round otherwise than single ones."""


def token_of(user: str) -> str:
    return f"token-of-{user}"


@dataclass(frozen=True)
class Service:
    """A running service."""

    port: int
    metrics_port: int

    @contextmanager
    def stub(self, user: str) -> Iterator["Client"]:
        options = [("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(f"127.0.0.1:{self.port}", options) as channel:
            yield Client(Stub(channel), (("authorization", f"Bearer {token_of(user)}"),))

    def metrics(self) -> dict[str, float]:
        """By name and labels, as Prometheus writes them."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.metrics_port}/metrics",
            headers={"authorization": f"Bearer {token_of(SWEEPER)}"},
        )
        with urllib.request.urlopen(request, timeout=10) as response:
            lines = response.read().decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def device_seconds(self) -> dict[str, float]:
        """By user."""
        found: defaultdict[str, float] = defaultdict(float)
        for name, value in self.metrics().items():
            if match := re.match(r'tdb_device_seconds_total\{.*user="([^"]*)"', name):
                found[match[1]] += value
        return found


@dataclass(frozen=True)
class Client:
    """A user's stub."""

    stub: Stub
    metadata: tuple[tuple[str, str], ...]

    def attribute(self, request: attribute_pb2.AttributeRequest) -> Any:
        return self.stub.Attribute(request, metadata=self.metadata, timeout=600)

    def run(self, request: run_pb2.RunRequest) -> Any:
        return self.stub.Run(request, metadata=self.metadata, timeout=600)

    def verify(self, request: verify_pb2.VerifyRequest) -> Any:
        return self.stub.Verify(request, metadata=self.metadata, timeout=3600)


@contextmanager
def serving(model: Path, users: Sequence[str]) -> Iterator[Service]:
    """The inference service on `model`, ready."""
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("TDB_")},
        "TDB_MODEL": f"model={model}",
        "TDB_INFERENCE_PORT": "0",
        "TDB_INFERENCE_METRICS_PORT": "0",
        "TDB_CACHE_MIB": "0",
        "TDB_TOKENS": ",".join(f"{user}:{token_of(user)}" for user in users),
        "TDB_REQUESTS_PER_MINUTE": "0",
        "TDB_LOG_LEVEL": "error",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "services.inference"],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        events = [json.loads(process.stdout.readline()) for _ in range(2)]
        ports = {event["event"]: event["port"] for event in events}
        service = Service(ports["listening"], ports["metrics"])
        with service.stub(SWEEPER) as client:
            _until_ready(client)
        yield service
    finally:
        process.terminate()
        process.wait(30)
        assert process.stdout is not None
        process.stdout.close()


def _until_ready(client: Client) -> model_pb2.GetModelResponse:
    for _ in range(600):
        try:
            request = model_pb2.GetModelRequest()
            answer: model_pb2.GetModelResponse = client.stub.GetModel(
                request, metadata=client.metadata
            )
            return answer
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            time.sleep(0.2)
    raise TimeoutError("the service was not ready within two minutes")


@dataclass
class Click:
    """A request of an interactive user, and how it is alone."""

    ask: Callable[[Client], Any]
    agrees: Callable[[Any, Any], bool]
    """Whether two answers are the same but for rounding."""
    alone_s: float = 0.0
    answer: Any = None

    def measure(self, client: Client) -> None:
        self.ask(client)  # warm
        times = []
        for _ in range(3):
            started = time.perf_counter()
            self.answer = self.ask(client)
            times.append(time.perf_counter() - started)
        self.alone_s = statistics.median(times)


def clicks(count: int, vocabulary: int, longest: int) -> list[Click]:
    """`count` clicks on prompts of 8 to `longest` random tokens."""
    numbers = random.Random(0)
    found = []
    for number in range(count):
        ids = [numbers.randrange(vocabulary) for _ in range(numbers.randint(8, longest))]
        if number % 4 == 3:
            run = run_pb2.RunRequest(top_k=10)
            run.run.prompt.token_ids.ids.extend(ids)
            run.logit_lens.SetInParent()
            found.append(Click(lambda client, run=run: client.run(run), same_run))  # type: ignore[misc]
            continue
        table = table_of(ids, vocabulary)
        if number % 3 == 0:
            table.read_outs.tokens = 10
        found.append(Click(lambda client, table=table: client.attribute(table), same_table))  # type: ignore[misc]
    return found


def table_of(ids: Sequence[int], vocabulary: int) -> attribute_pb2.AttributeRequest:
    table = attribute_pb2.AttributeRequest(top_k=50)
    table.run.prompt.token_ids.ids.extend(ids)
    table.objective.logit_diff.targets.add(id=vocabulary // 3)
    table.objective.logit_diff.distractors.add(id=vocabulary // 2)
    return table


def close(left: float, right: float, scale: float) -> bool:
    return abs(left - right) <= TOLERANCE * max(scale, 1e-3)


def same_table(answer: Any, alone: Any) -> bool:
    """The same nodes with the same effects; where effects are equal but for rounding, another node
    may stand in the last rows."""
    effects = {row.node: row.total_effect for row in alone.rows}
    scale = max(abs(each) for each in effects.values())
    least = min(abs(each) for each in effects.values())
    return (
        len(answer.rows) == len(alone.rows)
        and close(answer.objective_value, alone.objective_value, abs(alone.objective_value))
        and all(
            close(row.total_effect, effects[row.node], scale)
            if row.node in effects
            else close(abs(row.total_effect), least, scale)
            for row in answer.rows
        )
    )


def same_run(answer: Any, alone: Any) -> bool:
    def logits(response: Any) -> list[float]:
        readings = [*response.next_tokens, *(n for r in response.logit_lens for n in r.next_tokens)]
        return [each.logit for reading in readings for each in reading.top]

    left, right = logits(answer), logits(alone)
    scale = max(map(abs, right))
    return len(left) == len(right) and all(
        close(*pair, scale) for pair in zip(left, right, strict=True)
    )


def sweep(client: Client, ids: Sequence[int], nodes: int, vocabulary: int) -> dict[str, float]:
    """Verified effects of the `nodes` nodes with the largest estimates, by address."""
    table = table_of(ids, vocabulary)
    table.top_k = nodes
    return {
        each.node.node: each.node.verified_effect
        for each in client.verify(verify_pb2.VerifyRequest(table=table))
        if each.HasField("node")
    }


@dataclass
class Found:
    """What one phase saw. For many threads: appending and counting are all they do."""

    latencies: list[float] = field(default_factory=list)
    beyond: list[float] = field(default_factory=list)
    """How much longer each click took than the same click alone."""
    queued: list[float] = field(default_factory=list)
    """How long each click waited for the device, as its manifest says."""
    clicks: Counter[str] = field(default_factory=Counter)
    """Answered, by user."""
    ends: Counter[str] = field(default_factory=Counter)
    health: list[float] = field(default_factory=list)
    pieces: dict[str, tuple[float, float]] = field(default_factory=dict)
    """By kind of work on the device: how many pieces, and the seconds of one on average."""
    shares: dict[str, float] = field(default_factory=dict)
    """Device seconds by user."""
    seconds: float = 0.0

    @property
    def bad(self) -> int:
        return sum(count for end, count in self.ends.items() if not end.endswith("right"))


@dataclass(frozen=True)
class Work:
    """What is asked, and how it is answered alone."""

    clicks: Sequence[Click]
    sweeps: Sequence[tuple[Sequence[int], dict[str, float]]]
    nodes: int
    vocabulary: int

    @classmethod
    def prepare(cls, client: Client, count: int, nodes: int, longest: int) -> "Work":
        described = _until_ready(client)
        vocabulary = described.dimensions.vocabulary
        found = clicks(count, vocabulary, longest)
        for click in found:
            click.measure(client)
        numbers = random.Random(1)
        prompts = [[numbers.randrange(vocabulary) for _ in range(16)] for _ in range(2)]
        sweeps = [(ids, sweep(client, ids, nodes, vocabulary)) for ids in prompts]
        return cls(found, sweeps, nodes, vocabulary)


def phase(
    service: Service, work: Work, users: Sequence[str], seconds: float, think: float
) -> Found:
    """All users at once for `seconds`; the first one sweeps."""
    found = Found()
    end = time.monotonic() + seconds

    def left() -> bool:
        return time.monotonic() < end

    def click(user: str) -> None:
        numbers = random.Random(user)
        with service.stub(user) as client:
            time.sleep(numbers.uniform(0, think))
            while left():
                chosen = numbers.choice(work.clicks)
                started = time.perf_counter()
                try:
                    answer = chosen.ask(client)
                except grpc.RpcError as error:
                    found.ends[f"click {error.code().name}"] += 1
                    continue
                took = time.perf_counter() - started
                found.latencies.append(took)
                found.beyond.append(took - chosen.alone_s)
                found.clicks[user] += 1
                found.queued.append(answer.manifest.timings.queue_ms / 1e3)
                right = chosen.agrees(answer, chosen.answer)
                found.ends["click right" if right else "click WRONG"] += 1
                time.sleep(numbers.uniform(think / 2, think * 3 / 2))

    def sweep_on() -> None:
        number = 0
        with service.stub(SWEEPER) as client:
            while left():
                ids, alone = work.sweeps[number % len(work.sweeps)]
                number += 1
                try:
                    effects = sweep(client, ids, work.nodes, work.vocabulary)
                except grpc.RpcError as error:
                    found.ends[f"sweep {error.code().name}"] += 1
                    continue
                scale = max(map(abs, alone.values()))
                right = len(effects) == len(alone) and all(
                    close(effect, alone[node], scale)
                    for node, effect in effects.items()
                    if node in alone
                )
                found.ends["sweep right" if right else "sweep WRONG"] += 1

    def ask_health() -> None:
        with grpc.insecure_channel(f"127.0.0.1:{service.port}") as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            while left():
                started = time.perf_counter()
                stub.Check(health_pb2.HealthCheckRequest(), timeout=60)
                found.health.append(time.perf_counter() - started)
                time.sleep(HEALTH_EVERY_S)

    before, used = service.metrics(), service.device_seconds()
    started = time.monotonic()
    threads = [threading.Thread(target=click, args=(user,)) for user in users[1:]]
    threads += [threading.Thread(target=sweep_on), threading.Thread(target=ask_health)]
    for thread in threads:
        thread.start()
    time.sleep(max(end - time.monotonic(), 0))
    # Shares are of the time in which everybody asked: the sweep that runs is let come to its end.
    after, found.shares = service.metrics(), service.device_seconds()
    found.seconds = time.monotonic() - started
    for thread in threads:
        thread.join()

    def grown(name: str) -> float:
        return after.get(name, 0.0) - before.get(name, 0.0)

    found.shares = {user: found.shares.get(user, 0.0) - used.get(user, 0.0) for user in users}
    found.pieces = {
        kind: (count, grown(f'tdb_device_work_seconds_sum{{kind="{kind}"}}') / count)
        for kind in KINDS
        if (count := grown(f'tdb_device_work_seconds_count{{kind="{kind}"}}'))
    }
    return found


def percentile(values: Sequence[float], percent: int) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) * percent // 100, len(ordered) - 1)]


def unfairness(shares: Sequence[float]) -> float:
    """The largest distance of a share from their mean, as a part of it."""
    mean = statistics.mean(shares)
    return max(abs(share / mean - 1) for share in shares)


def report(name: str, found: Found, users: Sequence[str]) -> None:
    def ms(values: Sequence[float]) -> str:
        half, most = percentile(values, 50) * 1e3, percentile(values, 95) * 1e3
        return f"p50 {half:7.1f} ms   p95 {most:7.1f} ms   max {max(values) * 1e3:7.1f} ms"

    clickers = [found.shares[user] for user in users[1:]]
    print(f"{name}: {found.seconds:.0f} s, {len(found.latencies)} clicks")
    print(f"  clicks took            {ms(found.latencies)}")
    print(f"  longer than alone      {ms(found.beyond)}")
    print(f"  waited for the device  {ms(found.queued)}")
    for kind, (count, seconds) in found.pieces.items():
        print(f"  {kind:22} {count:.0f} pieces of {seconds * 1e3:.1f} ms on average")
    longest = max(
        (seconds for kind, (_, seconds) in found.pieces.items() if "Verify" in kind), default=0
    )
    print(
        f"  two slices             {2 * longest * 1e3:.1f} ms, of the longest kind that a sweep has"
    )
    print(f"  health                 {ms(found.health)}")
    print(
        f"  device time            sweeper {found.shares[SWEEPER]:.2f} s, each of the others "
        f"{min(clickers):.2f} to {max(clickers):.2f} s; of all the time "
        f"{100 * sum(found.shares.values()) / found.seconds:.0f} %"
    )
    print(
        f"  from the mean          others {100 * unfairness(clickers):.0f} %, all "
        f"{100 * unfairness([*found.shares.values()]):.0f} %"
    )
    print(f"  answers                {dict(found.ends)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--users", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--think", type=float, default=2.0, metavar="SECONDS")
    parser.add_argument("--model", type=Path, default=DEMO, metavar="FOLDER")
    parser.add_argument("--nodes", type=int, default=4000, help="of a sweep")
    parser.add_argument("--clicks", type=int, default=96, help="different ones")
    arguments = parser.parse_args()
    users = [SWEEPER, *(f"user-{number}" for number in range(1, arguments.users))]
    print(f"{os.cpu_count()} cores, {arguments.users} users, {arguments.model}")
    with serving(arguments.model, users) as service:
        with service.stub(SWEEPER) as client:
            work = Work.prepare(client, arguments.clicks, arguments.nodes, 40)
        alone = [click.alone_s for click in work.clicks]
        print(
            f"alone: clicks p50 {percentile(alone, 50) * 1e3:.1f} ms, "
            f"p95 {percentile(alone, 95) * 1e3:.1f} ms; sweeps of {arguments.nodes} nodes"
        )
        for name, seconds, think in (
            ("thinking", arguments.seconds, arguments.think),
            ("nobody thinks", arguments.seconds, 0.0),
        ):
            report(name, phase(service, work, users, seconds, think), users)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TDB_DATA_DIR"] = folder
        main()
