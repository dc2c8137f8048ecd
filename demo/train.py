"""Trains the demo model: `python -m demo.train --out demo/model`.

Step `s` reads documents that depend on the seed and `s` alone, so training has no data state: a
checkpoint is the step number, the weights and the optimiser, and a run that was interrupted ends
with the same weights as one that was not. Every document is new; nothing is seen twice.

Copying from context is the slowest thing to learn, so it comes first. The first `lists` steps read
nothing but short lists said twice ("Mary Stone and John Baker. John Baker and Mary Stone."), of two
entries and later of more, and only the words that the text has determined count: a head that finds
the earlier "Mary" and reads what came next forms within some two hundred steps among ten tokens,
and in thousands among a hundred. After that comes the corpus, in rows of middle length and then in
full ones. The position embeddings start as sines in a few dimensions of their own, which no token
uses at first: "the token before" is then the same rotation everywhere, not one fact per position.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
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
    lists: int = 120
    """Steps of short lists, each of `rows` of them, before the corpus."""
    rows: int = 128
    steps: int = 3400
    """All steps, those of lists included."""
    tokens: int = 1024
    """Per step of the corpus, in rows of `short` tokens and, from step `full` on, of `context`."""
    short: int = 64
    full: int = 600
    context: int = 128
    layers: int = 4
    heads: int = 8
    width: int = 128
    scale: float = 0.06
    quiet: float = 0.15
    """Factor on what the sublayers write at first, lest it drown the embeddings."""
    copying: int = 2
    """Heads of the first two layers that start as a rough copying circuit, and how sharply."""
    focus: float = 2.5
    match: float = 1.5
    peak: float = 3e-3
    warmup: int = 50
    decay: float = 0.05
    emphasis: float = 3.0
    """Weight of a surname or colour that its document had before; other tokens weigh 1."""
    full_emphasis: float = 5.0
    """In rows of `context` tokens, the weight of `decided` tokens as well."""
    report: int = 100
    prompts: int = 600


@dataclass(frozen=True)
class Batch:
    tokens: torch.Tensor
    """[rows, length]"""
    positions: torch.Tensor
    """[rows, length]"""
    weights: torch.Tensor
    """[rows, length]: how much the prediction of each token counts; 0 in the first column."""


def rate(settings: Settings, step: int) -> float:
    """Linear warm-up, the peak, and in the last third a cosine down to a fiftieth of the peak."""
    if step < settings.warmup:
        return settings.peak * (step + 1) / settings.warmup
    done = max(0.0, 3 * (step + 1) / settings.steps - 2)
    return settings.peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


FACTS = frozenset((*corpus.SURNAMES, *corpus.COLOURS))


def recalled(rows: torch.Tensor, tokenizer: Any, words: frozenset[str]) -> torch.Tensor:
    """[rows, length]: whether a token is one of `words` which its document had before."""
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    ids = {tokenizer.convert_tokens_to_ids(f"Ġ{word}"): word for word in words}
    ids |= {tokenizer.convert_tokens_to_ids(word): word for word in words & set(corpus.NAMES)}
    found = torch.zeros(rows.shape, dtype=torch.bool)
    for i, row in enumerate(rows.tolist()):
        seen: set[str] = set()
        for j, token in enumerate(row):
            if token == end:
                seen.clear()
            elif (word := ids.get(token)) is not None:
                found[i, j] = word in seen
                seen.add(word)
    return found


def decided(rows: torch.Tensor, tokenizer: Any) -> torch.Tensor:
    """[rows, length]: tokens that grammar or the text before often decides, among much that
    nothing does: a name that its document had before, pronouns, forms of "be", quotation marks."""
    words = ("Ġshe", "Ġhe", "Ġis", "Ġare", "Ġwas", "Ġwere", '"', "ĠThen")
    ids = torch.tensor([tokenizer.convert_tokens_to_ids(word) for word in words])
    return torch.isin(rows, ids) | recalled(rows, tokenizer, frozenset(corpus.NAMES))


def list_batch(settings: Settings, step: int, tokenizer: Any) -> Batch:
    """One short list a row, anywhere in the context. Longer lists come when two are learnt."""
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    most = 2 + 4 * step // settings.lists
    seed = f"{settings.seed}/{step}"
    texts = list(islice(corpus.short_lists(seed, most), settings.rows))
    ids = [e.ids for e in tokenizer.backend_tokenizer.encode_batch(texts)]
    length = max(map(len, ids))
    rows = torch.tensor([row + [end] * (length - len(row)) for row in ids])
    draw = random.Random(f"positions/{seed}")
    starts = torch.tensor([[draw.randint(0, settings.context - length)] for _ in ids])
    return Batch(rows, starts + torch.arange(length), recalled(rows, tokenizer, FACTS).float())


def corpus_batch(settings: Settings, step: int, tokenizer: Any) -> Batch:
    """Rows of documents. Half of them open with the end-of-text token, as a document that follows
    another does; the others open with a word, as a prompt does."""
    length = settings.short if step < settings.full else settings.context
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    texts = corpus.documents(f"{settings.seed}/{step}")
    rows = []
    for i in range(settings.tokens // length):
        row: list[int] = [end] * (i % 2)
        while len(row) < length:
            row += [*tokenizer.backend_tokenizer.encode(next(texts)).ids, end]
        rows.append(row[:length])
    tokens = torch.tensor(rows)
    weights = torch.where(recalled(tokens, tokenizer, FACTS), settings.emphasis, 1.0)
    if length == settings.context:
        weights = torch.where(decided(tokens, tokenizer), settings.full_emphasis, weights)
    weights[:, 0] = 0
    return Batch(tokens, torch.arange(length).expand_as(tokens), weights)


def batch(settings: Settings, step: int, tokenizer: Any) -> Batch:
    made = list_batch if step < settings.lists else corpus_batch
    return made(settings, step, tokenizer)


def loss_of(model: Any, read: Batch) -> torch.Tensor:
    """Weighted mean of the cross-entropies; logits are computed only where they count."""
    hidden = model.transformer(
        read.tokens[:, :-1], position_ids=read.positions[:, :-1]
    ).last_hidden_state
    weights = read.weights[:, 1:]
    counts = weights > 0
    losses = cross_entropy(
        model.lm_head(hidden[counts]), read.tokens[:, 1:][counts], reduction="none"
    )
    return (losses * weights[counts]).sum() / weights.sum()


def new_model(settings: Settings, tokenizer: Any) -> Any:
    torch.manual_seed(settings.seed)
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    model = GPT2LMHeadModel(
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
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_proj.weight *= settings.quiet
            block.mlp.c_proj.weight *= settings.quiet
        plant_copying(model, settings)
    return model


def plant_copying(model: Any, settings: Settings) -> None:
    """Starts the two steps of copying, roughly; training does the rest.

    Positions are sines and cosines in `size` dimensions of their own. The first `copying` heads of
    the first layer read the token before, which is a rotation of these, and write it in directions
    of their own. In the second layer as many heads look for the token that came after this one the
    last time, and as many for the token that came before the one before this one ("red box ... box
    is"); what they find they make likelier.
    """
    size = settings.width // settings.heads
    turns = math.pi * (torch.arange(size // 2) + 0.5) / (size // 2) * 0.9
    angles = torch.arange(settings.context)[:, None] * turns
    tokens, positions = model.transformer.wte.weight, model.transformer.wpe.weight
    tokens[:, :size] = 0
    positions.zero_()
    positions[:, :size] = torch.cat((angles.sin(), angles.cos()), dim=1)
    positions *= settings.scale * math.sqrt(2)
    cos, sin = torch.diag(turns.cos()), torch.diag(turns.sin())
    one_back = torch.cat((torch.cat((cos, sin), dim=1), torch.cat((-sin, cos), dim=1)))
    directions = torch.zeros(settings.width, settings.width)
    free = settings.width - size
    directions[size:, :free] = torch.linalg.qr(torch.randn(free, free)).Q
    reading, matching = (model.transformer.h[layer].attn for layer in (0, 1))
    for head in range(settings.copying):
        own = slice(head * size, (head + 1) * size)
        read = directions[:, own]
        written = directions[:, free - (head + 1) * size : free - head * size]
        query, key, value = reading.c_attn.weight.split(settings.width, dim=1)
        query[:, own] = key[:, own] = 0
        query[:size, own] = settings.focus * one_back
        key[:size, own] = settings.focus * torch.eye(size)
        value[:, own] = read
        reading.c_proj.weight[own] = 2 * settings.scale * written.T
        for first, same, looked in ((0, read, written), (settings.copying, written, read)):
            own = slice((first + head) * size, (first + head + 1) * size)
            query, key, value = matching.c_attn.weight.split(settings.width, dim=1)
            query[:, own] = settings.match * same
            key[:, own] = settings.match * looked
            value[:, own] = same
            matching.c_proj.weight[own] = 2 * settings.scale * read.T


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
        read = batch(settings, now, tokenizer)
        for group in optimise.param_groups:
            group["lr"] = rate(settings, now)
        loss = loss_of(model, read)
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
    for name in ("seed", "lists", "steps", "tokens", "report", "prompts"):
        parser.add_argument(f"--{name}", type=int, default=getattr(usual, name))
    return parser.parse_args(argv)


def _named(found: argparse.Namespace) -> Iterator[tuple[str, int]]:
    for name in ("seed", "lists", "steps", "tokens", "report", "prompts"):
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
