"""How well a model does the six behaviours: logit differences and accuracies on given prompts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from demo.behaviours import Prompt


@dataclass(frozen=True)
class Score:
    prompt: Prompt
    difference: float
    """logit(target) - logit(distractor) after the prompt's last token."""
    first: bool
    """Whether the target is the most likely token of the whole vocabulary."""

    @property
    def right(self) -> bool:
        return self.difference > 0


@dataclass(frozen=True)
class Summary:
    n: int
    accuracy: float
    first: float
    """Share of prompts with one right continuation where the target is the likeliest token."""
    difference: float
    variants: dict[str, tuple[int, float]]


def token_of(tokenizer: Any, text: str) -> int:
    ids = tokenizer(text).input_ids
    if len(ids) != 1:
        raise ValueError(f"{text!r} is {len(ids)} tokens; a target or distractor must be one.")
    return int(ids[0])


@torch.no_grad()
def score(model: Any, tokenizer: Any, prompts: Sequence[Prompt], batch: int = 100) -> list[Score]:
    """Scores in the order of `prompts`. Prompts of one length share a batch, so none is padded."""
    ids = [tokenizer(prompt.text).input_ids for prompt in prompts]
    by_length: dict[int, list[int]] = defaultdict(list)
    for i, tokens in enumerate(ids):
        by_length[len(tokens)].append(i)
    scores: dict[int, Score] = {}
    for where in by_length.values():
        for start in range(0, len(where), batch):
            part = where[start : start + batch]
            logits = model(torch.tensor([ids[i] for i in part]), logits_to_keep=1).logits[:, -1]
            for i, row in zip(part, logits, strict=True):
                target = token_of(tokenizer, prompts[i].target)
                distractor = token_of(tokenizer, prompts[i].distractor)
                difference = float(row[target] - row[distractor])
                scores[i] = Score(prompts[i], difference, int(row.argmax()) == target)
    return [scores[i] for i in range(len(prompts))]


def summarise(scores: Sequence[Score]) -> Summary:
    by_variant: dict[str, list[bool]] = defaultdict(list)
    for s in scores:
        by_variant[s.prompt.variant].append(s.right)
    determined = [s.first for s in scores if s.prompt.determined]
    return Summary(
        n=len(scores),
        accuracy=sum(s.right for s in scores) / len(scores),
        first=sum(determined) / max(1, len(determined)),
        difference=sum(s.difference for s in scores) / len(scores),
        variants={v: (len(right), sum(right) / len(right)) for v, right in by_variant.items()},
    )
