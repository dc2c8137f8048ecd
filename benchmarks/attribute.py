"""`Attribute` over gRPC as a ratio to the floor, in one run on one machine.

    python -m benchmarks.attribute [--tokens 16 64 256] [--repetitions 9]

The floor is what no attribution can do without: Hugging Face's eager forward with logits of the
last position, and one backward from the logit difference to the embeddings (activation gradients
only). Ours is the service in a process of its own, called over gRPC, neurons and heads, all
columns, top 50, without and with read-outs of those rows. Both use the same random GPT-2-small
weights; repetitions are interleaved, medians are compared.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import torch
from tdb.inference.v1 import attribute_pb2, service_pb2_grpc
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

TARGET, DISTRACTOR = 5335, 1757


def ids_of(tokens: int) -> list[int]:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randint(50257, (tokens,), generator=generator).tolist()


def floor(model: GPT2LMHeadModel, ids: list[int]) -> Callable[[], None]:
    def run() -> None:
        embeds = model.transformer.wte.weight[ids][None].detach().requires_grad_()
        logits = model(inputs_embeds=embeds, logits_to_keep=1, use_cache=False).logits[0, -1]
        torch.autograd.grad(logits[TARGET] - logits[DISTRACTOR], embeds)

    return run


def ours(
    stub: service_pb2_grpc.InferenceServiceStub, ids: list[int], read_out_tokens: int
) -> Callable[[], None]:
    request = attribute_pb2.AttributeRequest(top_k=50)
    request.run.prompt.token_ids.ids.extend(ids)
    request.objective.logit_diff.targets.add(id=TARGET)
    request.objective.logit_diff.distractors.add(id=DISTRACTOR)
    if read_out_tokens:
        request.read_outs.tokens = read_out_tokens

    def run() -> None:
        response = stub.Attribute(request, timeout=120)
        assert len(response.rows) == 50

    return run


@contextmanager
def service(folder: Path) -> Iterator[service_pb2_grpc.InferenceServiceStub]:
    environment = {**os.environ, "TDB_MODEL": str(folder), "TDB_INFERENCE_PORT": "0"}
    process = subprocess.Popen(
        [sys.executable, "-m", "services.inference"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        port = json.loads(process.stdout.readline())["port"]
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = service_pb2_grpc.InferenceServiceStub(channel)
            wait_until_served(stub)
            yield stub
    finally:
        process.terminate()
        process.wait(30)


def wait_until_served(stub: service_pb2_grpc.InferenceServiceStub) -> None:
    probe = ours(stub, ids_of(4), 0)
    for _ in range(120):
        try:
            return probe()
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            time.sleep(0.5)
    raise TimeoutError("the service did not load the model within a minute")


def medians(jobs: dict[str, Callable[[], None]], repetitions: int) -> dict[str, float]:
    """Milliseconds of each job, interleaved, two warm-up rounds left out."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for repetition in range(repetitions + 2):
        for name, job in jobs.items():
            started = time.perf_counter()
            job()
            if repetition >= 2:
                times[name].append((time.perf_counter() - started) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--repetitions", type=int, default=9)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "gpt2-small-random"
        torch.manual_seed(0)
        GPT2LMHeadModel(GPT2Config()).save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        model.eval().requires_grad_(False)
        print(
            f"{os.cpu_count()} cores, torch {torch.__version__}, {torch.get_num_threads()} threads"
        )
        print("tokens   floor ms   without read-outs       with read-outs of 10")
        with service(folder) as stub:
            for tokens in arguments.tokens:
                ids = ids_of(tokens)
                jobs = {
                    "floor": floor(model, ids),
                    "plain": ours(stub, ids, 0),
                    "read": ours(stub, ids, 10),
                }
                found = medians(jobs, arguments.repetitions)
                least, plain, read = (found[name] for name in jobs)
                print(
                    f"{tokens:6d} {least:10.0f} {plain:8.0f} ms {plain / least:6.2f} x"
                    f" {read:11.0f} ms {read / least:6.2f} x"
                )


if __name__ == "__main__":
    main()
