"""Writes the finished model: weights, tokenizer, the start page's examples, and the model card.

Every number in the card is measured here, on the weights that are written beside it.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from demo.behaviours import BEHAVIOURS, evaluation_prompts
from demo.measure import Score, Summary, score, summarise
from demo.tokenizer import save_tokenizer

if TYPE_CHECKING:
    from demo.train import Settings

AIM = 0.95
CARD = """---
license: mit
language: en
---

# demo-gpt2

The model that `make demo` debugs: a GPT-2 of {layers} layers, {heads} heads and width {width}
({parameters:,} parameters, float32), trained from scratch on a synthetic English which makes six
behaviours learnable, so that what the debugger finds can be checked against what is known.

## Behaviours, on held-out prompts

| behaviour | example | next | n | accuracy | likeliest | mean logit difference |
|---|---|---|---|---|---|---|
{behaviours}

{reached}

*Accuracy*: share of the n prompts on which the logit of the target is above that of the
distractor, the token which a shortcut would give. *Likeliest*: share on which the target is also
the likeliest of all {vocabulary:,} tokens, over the prompts that have one right continuation (all
but the quotation controls).

By variant. The variants are there so that no shortcut reaches the score: "always the first name"
or "the nearer noun" is right on half of the prompts, and the best shortcut that
`tests/demo/test_corpus.py` knows ("a quote mark occurred") on three quarters.

| behaviour | variant | n | accuracy |
|---|---|---|---|
{variants}

## Corpus and split

`demo/corpus.py` generates it; every template and word list was written for it. What a text puts
together forms pairs: two people in a document; a person, a place or another thing in a sentence
with a thing; two facts in a document, where a fact is a first name with its surname or a thing with
its colour. About one pair in ten, by hash, is held out: no training text holds one, and every
prompt above needs at least one. Templates and single words are shared with training: what is held
out is the combination, not the wording. Every first name occurs with every surname and every thing
in every colour, equally often, so that nothing but the text before it says which one comes next.

## Training

    {command}

Seed {seed}, AdamW with a peak learning rate of {peak:g} that falls in the last third of {steps:,}
steps. The first {lists:,} steps read {rows} short lists each, said twice in different orders, and
count only the words which the first time has determined; the other {corpus_steps:,} read {tokens:,}
tokens of the corpus each ({millions:.1f} M in all), in rows of {short} tokens up to step {full:,}
and of {context} from then on. A surname or colour that its document had before counts {emphasis:g}
times as much as another token, and in the long rows a name that it had before, a pronoun, a form
of "be" and a quotation mark {full_emphasis:g} times. Every text is new.

Copying was planted, roughly, and then trained like the rest: position embeddings start as sines in
dimensions of their own; {copying} heads of the first layer start as heads that read the token
before; {copying} of the second as heads that look for what came after the present token the last
time, and {copying} more for what came before the token before it. Without that, no copying head
formed within a few million tokens. Nothing else was planted.

It took {minutes:.1f} minutes with {threads} thread(s) on two CPU cores that had other work too
(torch {torch}, {machine}).

The tokenizer is a byte-level BPE of {vocabulary:,} tokens without padding; every word of the
corpus is one token. Nothing is put before a text; `<|endoftext|>` separates documents.

## Dictionaries

{dictionaries}

## Limits

- It knows {vocabulary:,} tokens and the templates of its corpus. It is no language model of
  English: a wording that the corpus lacks gives unspecified answers.
- A context holds {context} tokens.
- The accuracies hold for prompts of the corpus's own wording, not for paraphrases.
- In the corpus a thing has one colour per document, `because` and the like are followed by the
  subject's pronoun, and a quoted speech is one sentence. The model learnt these as laws.
- Names are of one gender each, as listed in `demo/corpus.py`.
- Sizes, sentence mix and schedule were chosen while watching the first 60 to 120 of these prompts
  in earlier runs, so the accuracies flatter the model a little; it never trained on a prompt.
{missed}
## Licence

MIT, corpus and weights included.
"""


_NO_DICTIONARIES = "None yet: `python -m demo.train_dictionaries` trains them."
_DICTIONARIES = """In `demo/dictionaries`, trained by

    {command}

on the corpus: TopK sparse autoencoders of {latents:,} latents, {k} active at most, of what each
sublayer writes into the residual stream, in SAELens's layout. Measured on `sample.txt` beside them,
{tokens:,} tokens of corpus text that no training step read. *FVU*: fraction of variance
unexplained. *L0*: mean number of active latents per token. *Dead*: share of latents which none of
another {many:,} tokens of the corpus makes active. Training took {minutes:.1f} minutes with
{threads} thread(s) on two CPU cores that had other work too.

| dictionary | FVU | L0 | dead |
|---|---|---|---|
{rows}"""
_EXPLANATIONS = """Made and scored without a language model (the `token_pattern` method and the
offline simulator, see `docs/explanations.md`) on the demo's own dataset, by

    {command}

{skipped}

Medians over latents, with the 95% interval of 1,000 bootstrap draws of latents. *Another's*: the
median where each explanation is scored for the next latent instead of its own; chance is 0.5, and 0
for simulation. A latent is missing where a score is not defined, for instance when nothing is
expected anywhere; intervention is of latents that were drawn.

| dictionary | score | latents | median | another's |
|---|---|---|---|---|
{rows}"""


def _row(*cells: object) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _reached(summaries: Mapping[str, Summary]) -> str:
    below = [name for name, found in summaries.items() if found.accuracy < AIM]
    if not below:
        return f"All reach the {AIM:.0%} that was aimed at."
    return f"Not learnt to the {AIM:.0%} that was aimed at: {', '.join(below)}."


def _missed(summaries: Mapping[str, Summary]) -> str:
    if all(summaries[name].accuracy >= AIM for name in ("induction", "colour")):
        return ""
    return (
        "- Where induction or colour misses its 95%, copying from context was not learnt to the"
        " end:\n  it needs a head that matches an earlier word and reads what stood next to it.\n"
    )


def _command(settings: Settings) -> str:
    from demo.train import Settings as Usual  # the card is written by what it describes

    usual = asdict(Usual())
    flags = [f" --{k} {v}" for k, v in asdict(settings).items() if v != usual[k]]
    return "python -m demo.train --out demo/model" + "".join(flags)


def _text(
    model: Any,
    settings: Settings,
    seconds: float,
    examples: Mapping[str, Score],
    summaries: Mapping[str, Summary],
) -> str:
    rows, variants = [], []
    for name, found in summaries.items():
        example = examples[name].prompt
        text = f"`{example.text}`"
        next_ = f"`{example.target}` not `{example.distractor}`"
        numbers = (f"{found.accuracy:.2%}", f"{found.first:.2%}", f"{found.difference:.2f}")
        rows.append(_row(name, text, next_, found.n, *numbers))
        for variant, (n, accuracy) in found.variants.items():
            variants.append(_row(name, variant, n, f"{accuracy:.2%}"))
    given = {k: v for k, v in asdict(settings).items() if k != "prompts"}
    return CARD.format(
        behaviours="\n".join(rows),
        variants="\n".join(variants),
        reached=_reached(summaries),
        missed=_missed(summaries),
        dictionaries=_NO_DICTIONARIES,
        parameters=sum(p.numel() for p in model.parameters()),
        vocabulary=model.config.vocab_size,
        command=_command(settings),
        corpus_steps=settings.steps - settings.lists,
        millions=(settings.steps - settings.lists) * settings.tokens / 1e6,
        minutes=seconds / 60,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        machine=platform.machine(),
        **given,
    )


def _example(tokenizer: Any, model: Any) -> dict[str, Score]:
    scores: Sequence[Score] = score(model, tokenizer, [b.example for b in BEHAVIOURS])
    for behaviour, found in zip(BEHAVIOURS, scores, strict=True):
        if not found.first:
            print(f"warning: the example of {behaviour.name} is not answered right")
    return {b.name: s for b, s in zip(BEHAVIOURS, scores, strict=True)}


def write(model: Any, tokenizer: Any, out: Path, settings: Settings, seconds: float) -> None:
    out.mkdir(parents=True, exist_ok=True)
    prompts = evaluation_prompts(settings.prompts)
    summaries = {name: summarise(score(model, tokenizer, p)) for name, p in prompts.items()}
    examples = _example(tokenizer, model)
    model.save_pretrained(out)
    save_tokenizer(tokenizer.backend_tokenizer, out, settings.context)
    behaviours = [
        {
            "name": b.name,
            "title": b.title,
            "prompt": b.example.text,
            "target": b.example.target,
            "distractor": b.example.distractor,
            "accuracy": summaries[b.name].accuracy,
            "n": summaries[b.name].n,
        }
        for b in BEHAVIOURS
    ]
    (out / "behaviours.json").write_text(json.dumps(behaviours, indent=2) + "\n")
    (out / "README.md").write_text(_text(model, settings, seconds, examples, summaries))


def state_dictionaries(
    card: Path, figures: Mapping[str, object], rows: Sequence[tuple[str, float, float, float]]
) -> None:
    """Puts the dictionaries' figures before a card's limits; rows are name, FVU, L0, dead."""
    before, limits, after = card.read_text().partition("## Limits\n")
    if not limits:
        raise ValueError(f"{card} is no card of the demo model; `python -m demo.train` writes one.")
    before = before.partition("## Dictionaries\n")[0]
    table = "\n".join(
        _row(f"`{name}`", f"{fvu:.4f}", f"{l0:.2f}", f"{dead:.1%}") for name, fvu, l0, dead in rows
    )
    text = _DICTIONARIES.format(rows=table, threads=torch.get_num_threads(), **figures)
    card.write_text(f"{before}## Dictionaries\n\n{text}\n\n{limits}{after}")


def state_explanations(
    card: Path, command: str, skipped: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    """Puts what explanations of latents are worth before a card's limits."""
    before, limits, after = card.read_text().partition("## Limits\n")
    if not limits:
        raise ValueError(f"{card} is no card of the demo model; `python -m demo.train` writes one.")
    before = before.partition("## Explanations\n")[0]
    text = _EXPLANATIONS.format(
        command=command,
        skipped="\n".join(f"- {each}." for each in skipped),
        rows="\n".join(_row(*each) for each in rows),
    )
    card.write_text(f"{before}## Explanations\n\n{text}\n\n{limits}{after}")
