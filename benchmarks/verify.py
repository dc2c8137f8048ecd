"""`Verify` of every head over gRPC, against TransformerLens on the same weights, in one run.

    python -m benchmarks.verify [--tokens 16] [--repetitions 5] [--loop-repetitions 1]

Random weights of GPT-2-small's shape; the logit difference at the last token with each of the 144
heads zeroed at every token. Ours is the service in a process of its own, called over gRPC with
`all_heads` (its estimates and correlations are part of the call). The peer is TransformerLens 3.9's
HookedTransformer in a process and an environment of its own, batched by 24 heads and as a loop.
Repetitions are interleaved and medians compared; both give the same 144 effects, which is checked.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tdb.inference.v1 import service_pb2_grpc, verify_pb2
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.attribute import DISTRACTOR, TARGET, ids_of, service
from benchmarks.peers.install import python_of

BATCH = 24


class Peer:
    """A running TransformerLens that sweeps on request."""

    def __init__(self, process: "subprocess.Popen[str]", ids: list[int]) -> None:
        self._process = process
        self._ids = ids
        self.threads = self._read()["threads"]

    def sweep(self, batch: int) -> tuple[float, list[float]]:
        """Seconds and effects."""
        request = {"ids": self._ids, "target": TARGET, "distractor": DISTRACTOR, "batch": batch}
        assert self._process.stdin is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = self._read()
        return answer["seconds"], answer["effects"]

    def _read(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())


@contextmanager
def peer(folder: Path, ids: list[int]) -> Iterator[Peer]:
    script = Path(__file__).parent / "peers" / "transformer_lens_sweep.py"
    process = subprocess.Popen(
        [python_of("transformer-lens"), script, folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        yield Peer(process, ids)
    finally:
        process.terminate()
        process.wait(30)


def ours(
    stub: service_pb2_grpc.InferenceServiceStub, ids: list[int]
) -> tuple[float, list[float], float]:
    """Seconds, effects in the order of layers and heads, and milliseconds queued."""
    request = verify_pb2.VerifyRequest(all_heads=True)
    request.table.run.prompt.token_ids.ids.extend(ids)
    request.table.objective.logit_diff.targets.add(id=TARGET)
    request.table.objective.logit_diff.distractors.add(id=DISTRACTOR)
    started = time.perf_counter()
    effects: dict[tuple[int, int], float] = {}
    queued = 0.0
    for response in stub.Verify(request, timeout=600):
        if response.HasField("node"):
            _, layer, head = response.node.node.split(".")
            effects[int(layer), int(head)] = response.node.verified_effect
        if response.HasField("summary"):
            queued = response.summary.manifest.timings.queue_ms
    return time.perf_counter() - started, [effects[each] for each in sorted(effects)], queued


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--loop-repetitions", type=int, default=1)
    arguments = parser.parse_args()
    ids = ids_of(arguments.tokens)
    times: dict[str, list[float]] = {"ours": [], f"batched by {BATCH}": [], "loop": []}
    effects: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "gpt2-small-random"
        torch.manual_seed(0)
        GPT2LMHeadModel(GPT2Config()).save_pretrained(folder)
        with service(folder) as stub, peer(folder, ids) as lens:
            ours(stub, ids)
            lens.sweep(BATCH)
            for repetition in range(arguments.repetitions):
                seconds, effects["ours"], _ = ours(stub, ids)
                times["ours"].append(seconds)
                seconds, effects["lens"] = lens.sweep(BATCH)
                times[f"batched by {BATCH}"].append(seconds)
                if repetition < arguments.loop_repetitions:
                    times["loop"].append(lens.sweep(1)[0])
            print(
                f"{os.cpu_count()} cores, torch {torch.__version__}, {lens.threads} threads, "
                f"{arguments.tokens} tokens, load {os.getloadavg()[0]:.1f}"
            )
    largest = max(map(abs, effects["lens"]))
    apart = max(abs(a - b) for a, b in zip(effects["ours"], effects["lens"], strict=True))
    print(f"144 effects, the largest {largest:.3f}; the two differ by at most {apart:.1e}")
    assert apart < 1e-4 * largest
    least = statistics.median(times["ours"])
    for name, seconds_each in times.items():
        if seconds_each:
            median = statistics.median(seconds_each)
            print(
                f"{name:>14} {median:7.2f} s  {median / least:6.2f} x ours  "
                f"({min(seconds_each):.2f} .. {max(seconds_each):.2f})"
            )


if __name__ == "__main__":
    main()
