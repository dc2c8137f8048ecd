"""Sixteen clients at once against one: what sharing passes is worth, and whether anyone waits long.

    python -m benchmarks.concurrency [--tokens 64 16] [--clients 16] [--rounds 3] [--seconds 20]

The service runs in a process of its own, without a cache, on random weights of GPT-2-small's shape
(`--model` names others). Every client is a user who asks for `Attribute` with 50 rows over gRPC,
each time on another prompt of random tokens, and again as soon as the answer is there. In a round
one client asks for a while, then all of them do; medians over the rounds are compared.

Printed per length: answers per second of one client and of all together, and their ratio; how many
requests shared a pass on average; the longest that anybody waited in the fair share, which is the
time in which all clients together get one answer each; and the processor time of the service per
answer, whose ratio is the gain on a CPU that other programs use too.
"""

import argparse
import os
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from tdb.inference.v1 import attribute_pb2
from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel

from benchmarks.load import Client, Service, serving


@dataclass(frozen=True)
class Round:
    """What some clients got in one stretch of time."""

    rate: float
    """Answers per second, all clients together."""
    processor_s: float
    """Processor time of the service per answer."""
    shared_by: float
    """Requests in the pass of an answer, on average."""
    worst: float
    """The longest wait in fair shares."""


def request_of(
    numbers: random.Random, tokens: int, vocabulary: int
) -> attribute_pb2.AttributeRequest:
    request = attribute_pb2.AttributeRequest(top_k=50)
    request.run.prompt.token_ids.ids.extend(numbers.randrange(vocabulary) for _ in range(tokens))
    request.objective.logit_diff.targets.add(id=vocabulary // 3)
    request.objective.logit_diff.distractors.add(id=vocabulary // 2)
    return request


def ask_all(
    service: Service, users: Sequence[str], tokens: int, vocabulary: int, seconds: float
) -> Round:
    """Every user asks until the time is over; what is under way then still counts."""
    waits: list[float] = []
    shared: list[int] = []
    finished: list[float] = []

    def ask(client: Client, numbers: random.Random) -> None:
        while time.perf_counter() < end:
            asked = time.perf_counter()
            answer = client.attribute(request_of(numbers, tokens, vocabulary))
            assert len(answer.rows) == 50
            waits.append(time.perf_counter() - asked)
            shared.append(answer.manifest.timings.shared_by)
        finished.append(time.perf_counter())

    def user(name: str) -> None:
        with service.stub(name) as client:
            numbers = random.Random(f"{name} {time.perf_counter()}")
            client.attribute(request_of(numbers, 4, vocabulary))  # connects
            together.wait()
            ask(client, numbers)

    together = threading.Barrier(len(users) + 1)
    threads = [threading.Thread(target=user, args=(name,)) for name in users]
    for thread in threads:
        thread.start()
    began = time.perf_counter() + 1e9
    end = began
    together.wait()
    used = processor_seconds()
    began = time.perf_counter()
    end = began + seconds
    for thread in threads:
        thread.join()
    rate = len(waits) / (max(finished) - began)
    processor_s = (processor_seconds() - used) / len(waits)
    return Round(rate, processor_s, statistics.mean(shared), max(waits) * rate / len(users))


def processor_seconds() -> float:
    """What the service, our only child, has used."""
    times = [child.cpu_times() for child in psutil.Process().children()]
    return sum(each.user + each.system for each in times)


def compare(
    service: Service,
    users: Sequence[str],
    tokens: int,
    vocabulary: int,
    arguments: argparse.Namespace,
) -> None:
    ones, alls = [], []
    for _ in range(arguments.rounds):
        ones.append(ask_all(service, users[:1], tokens, vocabulary, arguments.seconds))
        alls.append(ask_all(service, users, tokens, vocabulary, arguments.seconds))
    one, every = (statistics.median(each.rate for each in rounds) for rounds in (ones, alls))
    alone, together = (
        statistics.median(each.processor_s for each in rounds) for rounds in (ones, alls)
    )
    print(
        f"{tokens:6d} {one:12.2f}/s {every:12.2f}/s {every / one:8.2f} x"
        f" {statistics.mean(each.shared_by for each in alls):12.1f}"
        f" {max(each.worst for each in alls):19.2f}"
        f" {alone:10.2f} s {together:5.2f} s {alone / together:6.2f} x"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 16])
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--model", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.model
        if folder is None:
            folder = Path(temporary) / "gpt2-small-random"
            torch.manual_seed(0)
            GPT2LMHeadModel(GPT2Config()).save_pretrained(folder)
        vocabulary = AutoConfig.from_pretrained(folder).vocab_size
        users = ["sweeper", *(f"user-{number}" for number in range(1, arguments.clients))]
        print(f"{os.cpu_count()} cores, torch {torch.__version__}")
        with serving(folder, users) as service:
            print(
                "tokens   one client  all clients    ratio    shared by   worst / fair share"
                "   processor per answer"
            )
            for tokens in arguments.tokens:
                compare(service, users, tokens, vocabulary, arguments)


if __name__ == "__main__":
    main()
