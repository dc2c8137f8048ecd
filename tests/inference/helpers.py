"""Tiny GPT-2s with every weight random, and forward passes written here with plain hooks.

The plain passes share no code with the engine: they are what the engine is compared with.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention

from services.inference.engine import attention
from services.inference.engine.architecture import Architecture, resolve
from services.inference.engine.attribution import ExplainedRun, Explanation, NormMode, explain
from services.inference.engine.cancellation import CancelToken
from services.inference.engine.columns import Column, EmbedNodes, HeadNodes, NeuronNodes
from services.inference.engine.forward import Hooks
from services.inference.engine.interventions import Edit
from services.inference.engine.objectives import LogitDiff

VOCABULARY = 61

# The model folder of conftest.py: more vocabulary rows than its tokenizer has tokens.
SENTENCE = "When Mary and John went to the store, John gave a drink to Mary."
PADDED_VOCABULARY = 400
CONTEXT = 32


def random_model(
    dtype: torch.dtype = torch.float32, *, implementation: str = "eager", layers: int = 3
) -> GPT2LMHeadModel:
    """The same weights each time; biases and norms random too: no term can hide in a zero."""
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=24,
        n_embd=16,
        n_layer=layers,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        attn_implementation=implementation,
    )
    model = GPT2LMHeadModel(config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_gain = name.endswith("weight") and ".ln_" in name
            parameter.copy_(1 + 0.3 * noise if is_gain else 0.4 * noise)
    model.to(dtype).eval().requires_grad_(False)
    return model


@dataclass(frozen=True)
class Engine:
    """A hooked tiny model."""

    hooks: Hooks
    architecture: Architecture

    def explain(
        self,
        *runs: ExplainedRun,
        norm_mode: NormMode = NormMode.FINAL_NORM_FROZEN,
    ) -> tuple[Explanation, ...]:
        return explain(self.hooks, self.architecture, runs, norm_mode, CancelToken())[0]


def random_engine(dtype: torch.dtype = torch.float32, *, layers: int = 3) -> Engine:
    model = random_model(dtype, implementation=attention.IMPLEMENTATION, layers=layers)
    architecture = resolve(model)
    return Engine(Hooks(model, architecture), architecture)


def explained(
    ids: tuple[int, ...],
    *edits: Edit,
    targets: tuple[int, ...] = (5,),
    distractors: tuple[int, ...] = (9, 11),
    position: int | None = None,
) -> ExplainedRun:
    position = len(ids) - 1 if position is None else position
    return ExplainedRun(ids, edits, LogitDiff(targets, distractors, position))


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


Site = Callable[[Tensor], Tensor]


@contextmanager
def plain_edits(
    model: GPT2LMHeadModel,
    *,
    neurons: dict[int, Site] | None = None,
    probabilities: dict[int, Site] | None = None,
    final_scale: Tensor | None = None,
) -> Iterator[None]:
    """Edits an eager Hugging Face GPT-2 by hand.

    `neurons[l]` maps [B, T, F]; `probabilities[l]` maps [B, H, T, T]; `final_scale` [B, T, 1] is
    what the final norm divides by instead of its own scale.
    """
    with ExitStack() as stack:
        for layer, site in (neurons or {}).items():
            stack.enter_context(_neurons_edited(model.transformer.h[layer].mlp.c_proj, site))
        for layer, site in (probabilities or {}).items():
            stack.enter_context(_attention_edited(model.transformer.h[layer].attn, site))
        if final_scale is not None:
            stack.enter_context(_final_norm_held(model.transformer.ln_f, final_scale))
        yield


@contextmanager
def _neurons_edited(projection: nn.Module, site: Site) -> Iterator[None]:
    handle = projection.register_forward_pre_hook(lambda module, args: (site(args[0]), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _attention_edited(module: GPT2Attention, site: Site) -> Iterator[None]:
    """Replaces the output projection's input by probs' @ v, from q, k, v taken by hand."""
    seen: dict[str, Tensor] = {}

    def remember(owner: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen["qkv"] = output

    def rewrite(owner: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        batch, tokens, width = args[0].shape
        heads = module.num_heads
        parts = seen["qkv"].view(batch, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        query, key, value = parts[0], parts[1], parts[2]
        scores = query @ key.transpose(-1, -2) / (width // heads) ** 0.5
        causal = torch.ones(tokens, tokens).triu(1).bool()
        probabilities = site(scores.masked_fill(causal, float("-inf")).softmax(-1))
        return ((probabilities @ value).transpose(1, 2).reshape(batch, tokens, width),)

    handles = [
        module.c_attn.register_forward_hook(remember),
        module.c_proj.register_forward_pre_hook(rewrite),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _final_norm_held(norm: nn.LayerNorm, scale: Tensor) -> Iterator[None]:
    def held(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        centred = args[0] - args[0].mean(-1, keepdim=True)
        return centred / scale * norm.weight + norm.bias

    handle = norm.register_forward_hook(held)
    try:
        yield
    finally:
        handle.remove()


def final_scale(model: GPT2LMHeadModel, ids: tuple[int, ...]) -> Tensor:
    """[1, T, 1]: the final norm's scale in the clean run."""
    seen: list[Tensor] = []
    handle = model.transformer.ln_f.register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    model(torch.tensor([ids]))
    handle.remove()
    variance: Tensor = seen[0].var(-1, keepdim=True, correction=0)
    return (variance + float(model.transformer.ln_f.eps)).sqrt()


def plain_objective(model: GPT2LMHeadModel, run: ExplainedRun) -> float:
    """J by the model's own forward pass, as it stands (under whatever `plain_edits`)."""
    logits = model(torch.tensor([run.token_ids])).logits[0, run.objective.position].double()
    value = logits[list(run.objective.targets)].mean()
    if run.objective.distractors:
        value = value - logits[list(run.objective.distractors)].mean()
    return float(value)
