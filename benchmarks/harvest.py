"""`Harvest` of every neuron of a GPT-2-small shape, against the model alone and TransformerLens.

    python -m benchmarks.harvest [--batches 32] [--sequences 8] [--tokens 64] [--top 20]

Random weights and tokens. Of every batch, one after another: Hugging Face's body without the
unembedding (eager attention); the engine's harvest of all 36,864 neurons (top k with the
activations of their sequences, 10 draws, draws by stratum, moments, histograms), and the same
without the draws; TransformerLens 3.9's HookedTransformer stopped before the unembedding, with
`torch.topk`, in a process and an environment of its own: it keeps values alone. All get as many
threads. Medians of the batches are compared, by the clock and in processor time, which other load
on the machine moves less; the sums of the top values must agree.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.peers.install import python_of
from services.common.harvest import keys
from services.common.harvest.state import Keep, State
from services.common.settings import ModelSource
from services.inference.engine.cancellation import CancelToken
from services.inference.engine.harvesting import groups
from services.inference.engine.harvesting.harvest import AskedHarvest, CorpusSequence, Harvest
from services.inference.server import load_model

LAYERS = 12


class Peer:
    """A running TransformerLens."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self.read()

    def ask(self, batch: Any) -> Any:
        assert self._process.stdin is not None
        print(json.dumps(batch), file=self._process.stdin, flush=True)
        return self.read()

    def read(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())


@contextmanager
def peer(folder: Path, top: int, threads: int) -> Iterator[Peer]:
    script = Path(__file__).parent / "peers" / "transformer_lens_top_k.py"
    process = subprocess.Popen(
        [python_of("transformer-lens"), script, folder, str(top)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )
    try:
        yield Peer(process)
    finally:
        process.terminate()
        process.wait(30)


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """On the clock, and of processors."""
    started, begun = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - started, time.process_time() - begun


def _apart(states: Sequence[State], theirs: Sequence[float]) -> float:
    """By how much the sums of the top values of a layer differ at most."""
    ours = [float(keys.values(each["top_keys"]).astype(float).sum()) for each in states]
    return max(abs(one / other - 1) for one, other in zip(ours, theirs, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batches", type=int, default=32)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--top", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    size, length = arguments.sequences, arguments.tokens
    generator = torch.Generator().manual_seed(0)
    corpus = torch.randint(50257, (arguments.batches, size, length), generator=generator)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "gpt2-small-random"
        torch.manual_seed(0)
        GPT2LMHeadModel(GPT2Config()).save_pretrained(folder)
        plain = GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager").eval()
        body = plain.transformer
        model = load_model(ModelSource("random", str(folder)), None)
        names = [f"neuron.{layer}" for layer in range(LAYERS)]
        sequences = [
            CorpusSequence(number, tuple(ids))
            for number, ids in enumerate(corpus.flatten(0, 1).tolist())
        ]
        keeps = {
            "harvest": Keep(top=arguments.top),
            "without draws": Keep(top=arguments.top, random=0, strata=0),
        }
        asked = {
            name: AskedHarvest(groups.all_of(names, model.shape), keep, tuple(sequences))
            for name, keep in keeps.items()
        }
        harvests = {name: Harvest(model.hooks, each) for name, each in asked.items()}
        for harvest in harvests.values():
            assert [len(batch) for batch in harvest.batches] == [size] * arguments.batches
        times: dict[str, list[tuple[float, float]]] = {
            name: [] for name in ("body", *harvests, "TransformerLens")
        }
        with torch.no_grad(), peer(folder, arguments.top, arguments.threads) as lens:
            body(corpus[0], use_cache=False)
            for number, ids in enumerate(corpus):
                times["body"].append(seconds(partial(body, ids, use_cache=False)))
                for name, harvest in harvests.items():
                    times[name].append(seconds(partial(harvest.batch, number, CancelToken())))
                taken = lens.ask(ids.tolist())
                times["TransformerLens"].append((taken["seconds"], taken["processor_seconds"]))
            theirs = lens.ask(None)
        apart = max(
            _apart([harvest.finish(group, CancelToken()) for group in asked[name].groups], theirs)
            for name, harvest in harvests.items()
        )
    assert apart < 1e-4, apart
    print(
        f"{os.cpu_count()} cores, {arguments.threads} threads, torch {torch.__version__}, "
        f"{arguments.batches} batches of {size} x {length}, load {os.getloadavg()[0]:.1f}; "
        f"sums of the top {arguments.top} differ by {apart:.0e} at most"
    )
    for column, clock in enumerate(("by the clock", "in processor time")):
        least = statistics.median(each[column] for each in times["body"])
        print(clock)
        for name, every in times.items():
            median = statistics.median(each[column] for each in every)
            whole = sum(each[column] for each in times["body"]) / sum(
                each[column] for each in every
            )
            print(
                f"{name:>16} {median:6.2f} s a batch  {size * length / median:6.0f} tokens/s  "
                f"{least / median:.2f} x the body, {whole:.2f} x over all batches"
            )


if __name__ == "__main__":
    main()
