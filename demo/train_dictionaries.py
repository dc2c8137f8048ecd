"""Trains the demo's dictionaries: `python -m demo.train_dictionaries`.

One sparse autoencoder for what each sublayer writes into the residual stream, `attn_out` and
`mlp_out` of every layer, bias included:

    pre = (x - b_dec) W_enc + b_enc,    f = relu of the k largest pre,    x ~ f W_dec + b_dec

All are trained side by side, as one stack, on the same rows of corpus text. x is scaled to a mean
square of 1 per channel while training and the scale is folded into the weights in the end. Latents
that no token has used for a while start again at what is reconstructed worst.

Step `s` reads documents that depend on the seed and `s` alone, as in `demo.train`, so a run that
was interrupted ends with the same weights as one that was not.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo import card, corpus
from demo.autoencoders import (
    SAMPLE,
    Stack,
    activations,
    measure,
    name,
    sample_rows,
    sample_text,
    save,
    sites,
    unscaled,
)
from demo.tokenizer import END_OF_TEXT

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Settings:
    seed: int = 0
    steps: int = 600
    rows: int = 16
    """Per step, each of as many tokens as the model's context holds."""
    latents: int = 512
    k: int = 16
    peak: float = 2e-3
    warmup: int = 50
    rest: int = 100
    """Steps without use after which a latent starts again, until two thirds of the training."""
    report: int = 100


def new_stack(x: Tensor, settings: Settings) -> Stack:
    """Decoders at random, encoders their transposes, biases at the mean of `x`."""
    torch.manual_seed(settings.seed)
    count, _, d = x.shape
    w_dec = torch.nn.functional.normalize(torch.randn(count, settings.latents, d), dim=-1)
    stack = Stack(
        w_enc=w_dec.mT.contiguous(),
        w_dec=w_dec,
        b_enc=torch.zeros(count, 1, settings.latents),
        b_dec=x.mean(dim=1, keepdim=True),
    )
    for tensor in stack.parameters:
        tensor.requires_grad_()
    return stack


def batch(settings: Settings, step: int, tokenizer: Any, context: int) -> Tensor:
    """Rows of documents; in half of them a new line stands between two, as in plain text files."""
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    line = tokenizer.convert_tokens_to_ids("Ċ")
    seed = f"dictionaries/{settings.seed}/{step}"
    texts, draw = corpus.documents(seed), random.Random(seed)
    rows = []
    for i in range(settings.rows):
        skipped = draw.randrange(context)  # rows open anywhere in a document
        row: list[int] = []
        while len(row) < skipped + context:
            row += [*tokenizer.backend_tokenizer.encode(next(texts)).ids, line if i % 2 else end]
        start = skipped if i % 4 > 1 else 0
        rows.append(row[start : start + context])
    return torch.tensor(rows)


def rate(settings: Settings, step: int) -> float:
    """Linear warm-up, the peak, and in the last third a line down to zero."""
    left = 3 * (settings.steps - step) / settings.steps
    return settings.peak * min(1.0, (step + 1) / settings.warmup, left)


@torch.no_grad()
def start_again(stack: Stack, optimise: torch.optim.Adam, error: Tensor, idle: Tensor) -> None:
    """Points each idle latent at a badly reconstructed token, with a weak encoder."""
    for d, latents in enumerate(idle):
        where = latents.nonzero().flatten()
        if not len(where):
            continue
        worst = torch.multinomial(error[d].square().sum(-1), len(where))
        direction = torch.nn.functional.normalize(error[d, worst], dim=-1)
        stack.w_dec[d, where] = direction
        stack.w_enc[d][:, where] = direction.T
        stack.b_enc[d, 0, where] = 0
        for tensor, index in (
            (stack.w_dec, (d, where)),
            (stack.w_enc, (d, slice(None), where)),
            (stack.b_enc, (d, 0, where)),
        ):
            for moment in ("exp_avg", "exp_avg_sq"):
                optimise.state[tensor][moment][index] = 0


def train(
    model: Any, tokenizer: Any, settings: Settings, checkpoint: Path, stop: int | None = None
) -> tuple[Stack, Tensor, float]:
    """The stack, the scale of each dictionary's input [dictionaries, 1, 1], the seconds spent."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    context = model.config.n_positions
    first = activations(model, batch(settings, -1, tokenizer, context))
    centred = first - first.mean(dim=1, keepdim=True)
    scale = centred.square().mean(dim=(1, 2), keepdim=True).sqrt()
    stack = new_stack(first / scale, settings)
    optimise = torch.optim.Adam(stack.parameters, lr=settings.peak, betas=(0.9, 0.99))
    unused = torch.zeros(len(first), settings.latents, dtype=torch.long)
    saved, step, seconds = checkpoint / "dictionaries.pt", 0, 0.0
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        if state["settings"] != asdict(settings):
            raise ValueError(
                f"{saved} was made with other settings ({state['settings']}); remove it to start"
                " again, or give the settings it was made with."
            )
        with torch.no_grad():
            for tensor, was in zip(stack.parameters, state["stack"], strict=True):
                tensor.copy_(was)
        optimise.load_state_dict(state["optimiser"])
        torch.set_rng_state(state["random"])
        unused, step, seconds = state["unused"], state["step"], state["seconds"]
        print(f"resuming at step {step}", flush=True)
    last = min(settings.steps, stop if stop is not None else settings.steps)
    started = time.monotonic() - seconds
    for now in range(step, last):
        x = activations(model, batch(settings, now, tokenizer, context)) / scale
        for group in optimise.param_groups:
            group["lr"] = rate(settings, now)
        f = stack.encode(x, settings.k)
        error = x - stack.decode(f)
        error.square().mean(dim=(1, 2)).sum().backward()  # type: ignore[no-untyped-call]
        optimise.step()
        optimise.zero_grad()
        with torch.no_grad():
            stack.w_dec.copy_(torch.nn.functional.normalize(stack.w_dec, dim=-1))
            unused = torch.where((f > 0).any(dim=1), 0, unused + 1)
        idle = unused >= settings.rest
        if 3 * now < 2 * settings.steps:
            start_again(stack, optimise, error.detach(), idle)
            unused[idle] = 0
        if (now + 1) % settings.report == 0 or now + 1 == last:
            seconds = time.monotonic() - started
            variance = (x - x.mean(dim=1, keepdim=True)).square().sum(dim=(1, 2))
            fvu = error.detach().square().sum(dim=(1, 2)) / variance
            shown = " ".join(f"{value:.3f}" for value in fvu.tolist())
            print(f"{now + 1:5d}  {seconds:5.0f} s  FVU {shown}", flush=True)
            state = {
                "settings": asdict(settings),
                "stack": [tensor.detach() for tensor in stack.parameters],
                "optimiser": optimise.state_dict(),
                "random": torch.get_rng_state(),
                "unused": unused,
                "step": now + 1,
                "seconds": seconds,
            }
            torch.save(state, saved.with_suffix(".new"))
            os.replace(saved.with_suffix(".new"), saved)
    return stack, scale, seconds


def unseen(settings: Settings, model: Any, tokenizer: Any, batches: int = 10) -> Tensor:
    """Activations of rows that no training step reads: [dictionaries, tokens, d]."""
    steps = range(settings.steps, settings.steps + batches)
    context = model.config.n_positions
    rows = [activations(model, batch(settings, step, tokenizer, context)) for step in steps]
    return torch.cat(rows, dim=1)


def options(argv: list[str] | None) -> argparse.Namespace:
    usual = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m demo.train_dictionaries", description="Train the demo's dictionaries."
    )
    parser.add_argument("--model", type=Path, default=HERE / "model")
    parser.add_argument("--out", type=Path, default=HERE / "dictionaries")
    parser.add_argument("--checkpoint", type=Path, default=HERE / ".checkpoint")
    parser.add_argument("--threads", type=int, default=2)
    for n in NUMBERS:
        parser.add_argument(f"--{n}", type=int, default=getattr(usual, n))
    return parser.parse_args(argv)


NUMBERS = ("seed", "steps", "rows", "latents", "k", "report")


def main(argv: list[str] | None = None) -> None:
    given = options(argv)
    torch.set_num_threads(given.threads)
    settings = Settings(**{n: getattr(given, n) for n in NUMBERS})
    model = AutoModelForCausalLM.from_pretrained(given.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    scaled, scale, seconds = train(model, tokenizer, settings, given.checkpoint)
    stack = unscaled(scaled, scale)
    given.out.mkdir(parents=True, exist_ok=True)
    text = sample_text(tokenizer)
    (given.out / SAMPLE).write_text(text)
    x = activations(model, sample_rows(tokenizer, text, model.config.n_positions))
    qualities = measure(stack, settings.k, x)
    save(stack, settings.k, model, qualities, given.out)
    many = unseen(settings, model, tokenizer)
    used = measure(stack, settings.k, many)
    usual = asdict(Settings())
    flags = "".join(
        f" --{n} {v}" for n, v in asdict(settings).items() if v != usual[n] and n != "report"
    )
    card.state_dictionaries(
        given.model / "README.md",
        {
            "command": f"python -m demo.train_dictionaries{flags}",
            "latents": settings.latents,
            "k": settings.k,
            "tokens": x.shape[1],
            "many": many.shape[1],
            "minutes": seconds / 60,
        },
        [
            (name(*site), q.fvu, q.l0, u.dead)
            for site, q, u in zip(sites(model), qualities, used, strict=True)
        ],
    )
    print(f"wrote {given.out} after {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
