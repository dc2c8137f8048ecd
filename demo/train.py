"""Trains the demo model: `python -m demo.train --out demo/model`.

Step `s` reads documents that depend on the seed and `s` alone, so training has no data state: a
checkpoint is the step number, the weights and the optimiser, and a run that was interrupted ends
with the same weights as one that was not. Every document is new; nothing is seen twice.

The first steps read many short rows, the last ones few long rows. Attention learns to copy a name
much sooner among thirty tokens than among a hundred, where each token weighs less.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from demo import card, corpus
from demo.behaviours import evaluation_prompts
from demo.measure import score, summarise
from demo.tokenizer import END_OF_TEXT, save_tokenizer, train_tokenizer

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Settings:
    seed: int = 0
    steps: int = 2700
    tokens: int = 2048
    """Per step, in rows of `short` tokens and, for the second half, of `context` tokens."""
    short: int = 40
    context: int = 128
    layers: int = 4
    heads: int = 8
    width: int = 128
    scale: float = 0.06
    peak: float = 2e-3
    warmup: int = 100
    decay: float = 0.05
    report: int = 100
    prompts: int = 600


def rate(settings: Settings, step: int) -> float:
    """Linear warm-up, the peak, and in the last third a cosine down to a fiftieth of the peak."""
    if step < settings.warmup:
        return settings.peak * (step + 1) / settings.warmup
    done = max(0.0, 3 * (step + 1) / settings.steps - 2)
    return settings.peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def batch(settings: Settings, step: int, tokenizer: Any) -> torch.Tensor:
    """Rows of documents. Half of them open with the end-of-text token, as a document that follows
    another does; the others open with a word, as a prompt does."""
    length = settings.short if step < settings.steps // 2 else settings.context
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    texts = corpus.documents(f"{settings.seed}/{step}")
    rows = []
    for i in range(settings.tokens // length):
        row: list[int] = [end] * (i % 2)
        while len(row) < length:
            row += [*tokenizer.backend_tokenizer.encode(next(texts)).ids, end]
        rows.append(row[:length])
    return torch.tensor(rows)


def new_model(settings: Settings, tokenizer: Any) -> Any:
    torch.manual_seed(settings.seed)
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=settings.context,
            n_embd=settings.width,
            n_layer=settings.layers,
            n_head=settings.heads,
            initializer_range=settings.scale,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=end,
            eos_token_id=end,
        )
    )


def optimiser(model: Any, settings: Settings) -> torch.optim.AdamW:
    """Decay for matrices only: biases, layer norms and embeddings keep their scale."""
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and ".h." in n]
    rest = [p for n, p in model.named_parameters() if not (p.dim() == 2 and ".h." in n)]
    groups = [
        {"params": matrices, "weight_decay": settings.decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.peak, betas=(0.9, 0.98))


def ready_tokenizer(folder: Path, settings: Settings) -> Any:
    if not (folder / "tokenizer.json").exists():
        save_tokenizer(train_tokenizer(), folder, settings.context)
    return AutoTokenizer.from_pretrained(folder)


def train(settings: Settings, checkpoint: Path, stop: int | None = None) -> tuple[Any, Any, float]:
    """Trains up to `settings.steps`, or `stop` if that is nearer, from the last checkpoint if
    `checkpoint` holds one. Gives the model, its tokenizer and the seconds spent so far."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    tokenizer = ready_tokenizer(checkpoint, settings)
    model = new_model(settings, tokenizer)
    optimise = optimiser(model, settings)
    saved, step, seconds = checkpoint / "state.pt", 0, 0.0
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        if state["settings"] != asdict(settings):
            raise ValueError(
                f"{saved} was made with other settings ({state['settings']}); remove it to start"
                " again, or give the settings it was made with."
            )
        model.load_state_dict(state["model"])
        optimise.load_state_dict(state["optimiser"])
        step, seconds = state["step"], state["seconds"]
        print(f"resuming at step {step}", flush=True)
    prompts = evaluation_prompts(min(settings.prompts, 120))
    last = min(settings.steps, stop if stop is not None else settings.steps)
    started = time.monotonic() - seconds
    model.train()
    for now in range(step, last):
        rows = batch(settings, now, tokenizer)
        for group in optimise.param_groups:
            group["lr"] = rate(settings, now)
        logits = model(rows[:, :-1]).logits
        loss = cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimise.step()
        optimise.zero_grad()
        if (now + 1) % settings.report == 0 or now + 1 == last:
            model.eval()
            found = {name: summarise(score(model, tokenizer, p)) for name, p in prompts.items()}
            model.train()
            seconds = time.monotonic() - started
            accuracies = "  ".join(f"{name} {s.accuracy:.0%}" for name, s in found.items())
            print(
                f"{now + 1:5d}  {seconds:5.0f} s  loss {loss.item():.3f}  {accuracies}", flush=True
            )
            state = {
                "settings": asdict(settings),
                "model": model.state_dict(),
                "optimiser": optimise.state_dict(),
                "step": now + 1,
                "seconds": seconds,
            }
            torch.save(state, saved.with_suffix(".new"))
            os.replace(saved.with_suffix(".new"), saved)
    model.eval()
    return model, tokenizer, seconds


def options(argv: list[str] | None) -> argparse.Namespace:
    usual = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m demo.train", description="Train the demo model."
    )
    parser.add_argument("--out", type=Path, default=HERE / "model")
    parser.add_argument("--checkpoint", type=Path, default=HERE / ".checkpoint")
    parser.add_argument("--threads", type=int, default=2)
    for name in ("seed", "steps", "tokens", "report", "prompts"):
        parser.add_argument(f"--{name}", type=int, default=getattr(usual, name))
    return parser.parse_args(argv)


def _named(found: argparse.Namespace) -> Iterator[tuple[str, int]]:
    for name in ("seed", "steps", "tokens", "report", "prompts"):
        yield name, getattr(found, name)


def main(argv: list[str] | None = None) -> None:
    given = options(argv)
    torch.set_num_threads(given.threads)
    settings = Settings(**dict(_named(given)))
    model, tokenizer, seconds = train(settings, given.checkpoint)
    card.write(model, tokenizer, given.out, settings, seconds)
    print(f"wrote {given.out}", flush=True)


if __name__ == "__main__":
    main()
