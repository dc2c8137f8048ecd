"""Tiny models with every weight random, the engine on them, and views of what it found."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.models.llama import modeling_llama

from services.common.addresses import Shape
from services.inference.engine import attention
from services.inference.engine.architecture import Architecture, resolve
from services.inference.engine.attribution import ExplainedRun, Explanation, NormMode, explain
from services.inference.engine.cancellation import CancelToken
from services.inference.engine.columns import Column, EmbedNodes, HeadNodes, NeuronNodes
from services.inference.engine.dictionaries.dictionary import Dictionary
from services.inference.engine.dictionaries.sites import Header
from services.inference.engine.dictionaries.sources import Registered
from services.inference.engine.dictionaries.store import Store
from services.inference.engine.forward import Hooks
from services.inference.engine.interventions import Edit, Intervention
from services.inference.engine.objectives import LogitDiff, Objective
from services.inference.engine.resolution import resolve as resolve_edits
from services.inference.engine.shelf import Served, Shelf

VOCABULARY = 61
LAYERS, HEADS, WIDTH, HEAD_WIDTH, NEURONS = 3, 4, 16, 4, 64
FAMILIES = ("gpt2", "llama", "llama-tied")
"""`llama` has grouped-query attention and an unembedding of its own; `llama-tied` has neither."""

# The model folder of conftest.py: more vocabulary rows than its tokenizer has tokens.
SENTENCE = "When Mary and John went to the store, John gave a drink to Mary."
PADDED_VOCABULARY = 400
CONTEXT = 32


def random_model(
    family: str = "gpt2", dtype: torch.dtype = torch.float32, *, implementation: str = "eager"
) -> PreTrainedModel:
    """The same weights each time; biases and norms random too: no term can hide in a zero."""
    model: PreTrainedModel
    if family == "gpt2":
        config = GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=24,
            n_embd=WIDTH,
            n_layer=LAYERS,
            n_head=HEADS,
            attn_implementation=implementation,
        )
        model = GPT2LMHeadModel(config)
    else:
        tied = family == "llama-tied"
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                max_position_embeddings=24,
                hidden_size=WIDTH,
                intermediate_size=NEURONS,
                num_hidden_layers=LAYERS,
                num_attention_heads=HEADS,
                num_key_value_heads=HEADS if tied else 2,
                tie_word_embeddings=tied,
                attention_bias=tied,
                mlp_bias=tied,
                attn_implementation=implementation,
            )
        )
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_gain = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.3 * noise if is_gain else 0.4 * noise)
    model.to(dtype).eval().requires_grad_(False)
    return model


@dataclass(frozen=True)
class Engine:
    """A hooked tiny model."""

    hooks: Hooks
    architecture: Architecture

    @property
    def shape(self) -> Shape:
        return replace(self.architecture.shape, dictionaries=self.hooks.shelf.shapes)

    def edits(self, *wanted: Intervention, tokens: int) -> tuple[Edit, ...]:
        return resolve_edits(wanted, self.shape, self.architecture.widths, tokens)

    def explain(
        self,
        *runs: ExplainedRun,
        norm_mode: NormMode = NormMode.FINAL_NORM_FROZEN,
        dictionaries: Sequence[str] = (),
    ) -> tuple[Explanation, ...]:
        cancel = CancelToken()
        modes = [norm_mode] * len(runs)
        return explain(self.hooks, self.architecture, runs, modes, cancel, dictionaries)[0]


def random_engine(
    family: str = "gpt2",
    dtype: torch.dtype = torch.float32,
    dictionaries: Sequence[Dictionary] = (),
) -> Engine:
    model = random_model(family, dtype, implementation=attention.IMPLEMENTATION)
    architecture = resolve(model)
    hooks = Hooks(model, architecture)
    hooks.shelf = shelf_of(dictionaries, architecture, dtype)
    return Engine(hooks, architecture)


def shelf_of(
    dictionaries: Sequence[Dictionary], architecture: Architecture, dtype: torch.dtype
) -> Shelf:
    """A shelf of dictionaries that are in memory already."""
    registered = [
        Registered(each.header, each.id, True, Path(), partial(_itself, each))
        for each in dictionaries
    ]
    store = Store(registered, torch.device("cpu"), 1 << 30, dtype=dtype)
    served = [Served(each.header, each.id, None) for each in dictionaries]
    return Shelf(served, store, of=architecture)


shared_engine = cache(random_engine)
"""One engine for many tests; only for those that leave it as it is."""


@pytest.fixture
def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lifts the casts to float32 inside Hugging Face's RMSNorm and softmax."""

    def norm(self: Any, x: Tensor) -> Tensor:
        scaled: Tensor = (
            self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        )
        return scaled

    def eager(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        key = modeling_llama.repeat_kv(key, module.num_key_value_groups)
        value = modeling_llama.repeat_kv(value, module.num_key_value_groups)
        scores = query @ key.transpose(2, 3) * kwargs["scaling"]
        probabilities = nn.functional.softmax(scores + mask, dim=-1)
        return (probabilities @ value).transpose(1, 2), probabilities

    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", norm)
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", eager)


def explained(
    ids: tuple[int, ...], *edits: Edit, objective: Objective | None = None
) -> ExplainedRun:
    return ExplainedRun(ids, edits, objective or LogitDiff((5,), (9, 11), len(ids) - 1))


def matrices(explanation: Explanation, column: Column) -> list[Tensor]:
    """The column of each group in its own shape: [T], [H, T, T] (0 where masked), [T, F]."""
    found: list[Tensor] = []
    for group in explanation.groups:
        values = group.column(column)
        tokens = explanation.groups[0].size
        match group:
            case EmbedNodes():
                found.append(values)
            case HeadNodes():
                full = values.new_zeros(group.size // (tokens * (tokens + 1) // 2), tokens, tokens)
                rows, keys = torch.tril_indices(tokens, tokens)
                full[:, rows, keys] = values.view(full.shape[0], -1)
                found.append(full)
            case NeuronNodes():
                found.append(values.view(tokens, -1))
    return found


def direct_sums(explanation: Explanation) -> tuple[float, float]:
    """Sum of all direct effects and remainder rows, and the sum of their absolute values."""
    columns = [group.column(Column.DIRECT_EFFECT).double() for group in explanation.groups]
    remainder = explanation.remainder.values()
    total = sum(float(column.sum()) for column in columns) + sum(remainder)
    size = sum(float(column.abs().sum()) for column in columns) + sum(map(abs, remainder))
    return total, size


def _itself(dictionary: Dictionary, header: Header) -> Dictionary:
    return replace(dictionary, header=header)
