"""`Attribute` over gRPC as a ratio to the floor, in one run on one machine.

    python -m benchmarks.attribute [--tokens 16 64 256] [--repetitions 9]
    python -m benchmarks.attribute --dictionaries 32768 [--tokens 64] [--repetitions 9]

The floor is what no attribution can do without: Hugging Face's eager forward with logits of the
last position, and one backward from the logit difference to the embeddings (activation gradients
only). Ours is the service in a process of its own, called over gRPC, neurons and heads, all
columns, top 50, without and with read-outs of those rows. Both use the same random GPT-2-small
weights; repetitions are interleaved, medians are compared.

With `--dictionaries N`, latents of 12 dictionaries (one on each MLP's output), then of 24 (on each
attention's too), stand in the table. They are random with N latents, their thresholds set so that
about 75 are active per token. Their floor is 1.25 times the floor above and one dense float32
encoder product for each.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import grpc
import torch
from safetensors.torch import save_file
from tdb.inference.v1 import attribute_pb2, service_pb2_grpc
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

TARGET, DISTRACTOR = 5335, 1757
Stub = service_pb2_grpc.InferenceServiceStub


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
    stub: Stub,
    ids: list[int],
    read_out_tokens: int,
    dictionaries: Sequence[str] = (),
) -> Callable[[], None]:
    request = attribute_pb2.AttributeRequest(top_k=50)
    request.dictionaries.extend(dictionaries)
    request.run.prompt.token_ids.ids.extend(ids)
    request.objective.logit_diff.targets.add(id=TARGET)
    request.objective.logit_diff.distractors.add(id=DISTRACTOR)
    if read_out_tokens:
        request.read_outs.tokens = read_out_tokens

    def run() -> None:
        response = stub.Attribute(request, timeout=120)
        assert len(response.rows) == 50

    return run


ACTIVE = 75
"""Latents active per token in the random dictionaries, about."""


def write_dictionaries(folder: Path, latents: int, ids: list[int], model: GPT2LMHeadModel) -> None:
    """A random dictionary in SAELens's layout on each sublayer's output, active where the model's
    own activations on `ids` put their largest projections."""
    outputs: dict[str, torch.Tensor] = {}

    def remember(name: str, module: object, args: object, output: object) -> None:
        first = output[0] if isinstance(output, tuple) else output
        assert isinstance(first, torch.Tensor)
        outputs[name] = first[0]

    hooks = []
    for layer, block in enumerate(model.transformer.h):
        for kind, module in (("mlp_out", block.mlp), ("attn_out", block.attn)):
            hooks.append(module.register_forward_hook(partial(remember, f"{kind}-{layer}")))
    with torch.no_grad():
        model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    for name, values in outputs.items():
        kind, _, number = name.partition("-")
        generator = torch.Generator().manual_seed(int(number))
        w_enc = torch.randn(768, latents, generator=generator) / 768**0.5
        w_dec = torch.randn(latents, 768, generator=generator) / 768**0.5
        threshold = (values @ w_enc).topk(ACTIVE).values[:, -1].mean()
        place = folder / kind / number
        place.mkdir(parents=True)
        (place / "cfg.json").write_text(
            json.dumps(
                {
                    "architecture": "jumprelu",
                    "d_in": 768,
                    "d_sae": latents,
                    "dtype": "float32",
                    "apply_b_dec_to_input": False,
                    "normalize_activations": "none",
                    "reshape_activations": "none",
                    "metadata": {"hook_name": f"blocks.{number}.hook_{kind}"},
                }
            )
        )
        save_file(
            {
                "W_enc": w_enc,
                "W_dec": w_dec,
                "b_enc": torch.zeros(latents),
                "b_dec": torch.zeros(768),
                "threshold": torch.full((latents,), float(threshold)),
            },
            place / "sae_weights.safetensors",
        )


@contextmanager
def service(folder: Path, dictionaries: str = "", **variables: str) -> Iterator[Stub]:
    environment = {
        **os.environ,
        "TDB_MODEL": str(folder),
        "TDB_INFERENCE_PORT": "0",
        "TDB_DICTIONARIES": dictionaries,
        "TDB_CACHE_MIB": "0",  # every repetition is computed
        **variables,
    }
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


def wait_until_served(stub: Stub) -> None:
    probe = ours(stub, ids_of(4), 0)
    for _ in range(600):
        try:
            return probe()
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            time.sleep(0.5)
    raise TimeoutError("the service was not ready within five minutes")


def medians(jobs: dict[str, Callable[[], object]], repetitions: int) -> dict[str, float]:
    """Milliseconds of each job, interleaved, two warm-up rounds left out."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for repetition in range(repetitions + 2):
        for name, job in jobs.items():
            started = time.perf_counter()
            job()
            if repetition >= 2:
                times[name].append((time.perf_counter() - started) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def with_dictionaries(
    temporary: Path, folder: Path, model: GPT2LMHeadModel, arguments: argparse.Namespace
) -> None:
    latents, place = arguments.dictionaries, temporary / "dictionaries"
    write_dictionaries(place, latents, ids_of(64), model)
    sources = ",".join(f"{kind}={place / kind},unchecked" for kind in ("mlp_out", "attn_out"))
    encoder = torch.randn(768, latents)
    print("tokens   floor ms   product ms   12 dictionaries           12 + 12")
    with service(folder, sources) as stub:
        for tokens in arguments.tokens:
            ids = ids_of(tokens)
            activations = torch.randn(tokens, 768)
            jobs: dict[str, Callable[[], object]] = {
                "floor": floor(model, ids),
                "product": lambda x=activations: x @ encoder,  # type: ignore[misc]
                "12": ours(stub, ids, 0, ["mlp_out"]),
                "24": ours(stub, ids, 0, ["mlp_out", "attn_out"]),
            }
            found = medians(jobs, arguments.repetitions)
            least, product = found["floor"], found["product"]
            print(f"{tokens:6d} {least:10.0f} {product:12.1f}", end="")
            for count in (12, 24):
                floor_ms = 1.25 * least + count * product
                print(f" {found[str(count)]:8.0f} ms {found[str(count)] / floor_ms:6.2f} x", end="")
            print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--dictionaries", type=int, metavar="LATENTS")
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
        if arguments.dictionaries:
            with_dictionaries(Path(temporary), folder, model, arguments)
            return
        print("tokens   floor ms   without read-outs       with read-outs of 10")
        with service(folder) as stub:
            for tokens in arguments.tokens:
                ids = ids_of(tokens)
                jobs: dict[str, Callable[[], object]] = {
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
