"""A tiny random model of every variant of every family, the engine on it, and the same model as
Hugging Face runs it, with plain PyTorch hooks.

`Reference` shares nothing with the engine but the weights: it hooks the modules by their Hugging
Face names. `site(kind, layer, values)` may return other values:

    embed [B, T, d]     probabilities [B, H, T, T]     z [B, T, H, dh]     neurons [B, T, F]
    mlp_in [B, T, d]    attn_out, mlp_out [B, T, d]: what attention and MLP return
    attn, mlp [B, T, d]: the writes into the stream, behind a post-norm where there is one
    final [B, T, d]: input of the final norm
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from services.inference.engine import attention
from services.inference.engine.architecture import resolve
from services.inference.engine.attribution import NormMode
from services.inference.engine.families import FAMILIES
from services.inference.engine.forward import Hooks
from tests.inference.helpers import Engine

ALL_VARIANTS = {
    f"{model_type}/{variant}": family
    for model_type, family in FAMILIES.items()
    for variant in family.variants
}
VARIANTS = [variant for variant, family in ALL_VARIANTS.items() if not family.experts]
EXPERT_VARIANTS = [variant for variant, family in ALL_VARIANTS.items() if family.experts]
VOCABULARY, LAYERS, HEADS, WIDTH, NEURONS, WINDOW = 61, 3, 4, 32, 48, 4
IDS = (3, 17, 4, 4, 25, 60, 8, 1, 30)
LAST = len(IDS) - 1

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "hidden_size": WIDTH,
    "intermediate_size": NEURONS,
    "max_position_embeddings": 24,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2}
_GEMMA = {
    **_GROUPED,
    "head_dim": 12,
    "query_pre_attn_scalar": 10,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
_OPT = {name: value for name, value in _COMMON.items() if name != "intermediate_size"}
_OPT["ffn_dim"] = NEURONS
_CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "gpt2/tied": lambda: GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=24,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        n_inner=NEURONS,
    ),
    "gpt2/by layer": lambda: GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=24,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        n_inner=NEURONS,
        scale_attn_by_inverse_layer_idx=True,
        tie_word_embeddings=False,
    ),
    "gpt_neox/parallel": lambda: GPTNeoXConfig(**_COMMON, rotary_pct=0.5),
    "gpt_neox/sequential": lambda: GPTNeoXConfig(
        **_COMMON, rotary_pct=0.25, use_parallel_residual=False, attention_bias=False
    ),
    "llama/grouped": lambda: LlamaConfig(**_GROUPED),
    "llama/biased": lambda: LlamaConfig(
        **_COMMON, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    "mistral/window": lambda: MistralConfig(**_GROUPED, head_dim=12, sliding_window=WINDOW),
    "qwen2/window": lambda: Qwen2Config(
        **_GROUPED, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "qwen3/qk-norm": lambda: Qwen3Config(**_GROUPED, head_dim=12),
    "gemma2/softcap": lambda: Gemma2Config(
        **_GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=6.0, attention_bias=True
    ),
    "gemma3_text/qk-norm": lambda: Gemma3TextConfig(**_GEMMA),
    "mixtral/window": lambda: MixtralConfig(
        **_GROUPED, sliding_window=WINDOW, num_local_experts=4, num_experts_per_tok=2
    ),
    "qwen3_moe/mixed": lambda: Qwen3MoeConfig(
        **_GROUPED,
        head_dim=12,
        moe_intermediate_size=24,
        num_experts=6,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        mlp_only_layers=[1],
    ),
    "opt/relu": lambda: OPTConfig(**_OPT),
    "opt/bare": lambda: OPTConfig(**_OPT, enable_bias=False, layer_norm_elementwise_affine=False),
}


def config_of(variant: str) -> PretrainedConfig:
    return _CONFIGS[variant]()


def random_model(variant: str, dtype: torch.dtype, implementation: str) -> PreTrainedModel:
    """The same weights each time; biases and norms random too: no term can hide in a zero."""
    config = config_of(variant)
    config._attn_implementation = implementation
    if dtype is torch.float64:  # the default one of experts has no double precision
        config._experts_implementation = "eager"
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(11)
    gain_of_zero = 0.0 if variant.startswith("gemma") else 1.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_gain = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(gain_of_zero + 0.3 * noise if is_gain else 0.3 * noise)
    model.to(dtype).eval().requires_grad_(False)
    return model


@cache
def engine_of(variant: str, dtype: torch.dtype = torch.float32) -> Engine:
    model = random_model(variant, dtype, attention.IMPLEMENTATION)
    architecture = resolve(model)
    return Engine(Hooks(model, architecture), architecture)


class KeepDouble(TorchFunctionMode):
    """Lifts the casts to float32 inside Hugging Face's norms and softmax of float64 tensors."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], Tensor) and args[0].dtype is torch.float64:
            if func is Tensor.float or (func is Tensor.to and args[1:] == (torch.float32,)):
                return args[0]
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


Site = Callable[[str, int | None, Tensor], Tensor]


Change = tuple[str, int | None, Any, Callable[[Tensor], Tensor]]
"""(kind, layer, index, function of what stands at the index)"""


def edited(*changes: Change) -> Site:
    """A site callback that makes changes."""

    def site(kind: str, layer: int | None, values: Tensor) -> Tensor:
        for at_kind, at_layer, index, change in changes:
            if (at_kind, at_layer) == (kind, layer):
                values = values.clone()
                values[index] = change(values[index])
        return values

    return site


Scales = dict[nn.Module, Tensor]


class Reference:
    """A model as Hugging Face runs it, eagerly, with hooks by its own module names."""

    def __init__(self, variant: str, dtype: torch.dtype) -> None:
        self.model: Any = random_model(variant, dtype, "eager")
        kind = variant.partition("/")[0]
        trunk = {"gpt2": "transformer", "gpt_neox": "gpt_neox", "opt": "model.decoder"}
        self.trunk: Any = self.model.get_submodule(trunk.get(kind, "model"))
        self.blocks: Any = self.trunk.h if kind == "gpt2" else self.trunk.layers
        names: dict[str, tuple[str, str, str, str]] = {
            "gpt2": ("attn", "attn.c_proj", "mlp.c_proj", "ln_f"),
            "gpt_neox": (
                "attention",
                "attention.dense",
                "mlp.dense_4h_to_h",
                "final_layer_norm",
            ),
            "opt": ("self_attn", "self_attn.out_proj", "fc2", "final_layer_norm"),
        }
        usual = ("self_attn", "self_attn.o_proj", "mlp.down_proj", "norm")
        self._attn, self._out, self._down, final = names.get(kind, usual)
        self.final_norm: nn.Module = getattr(self.trunk, final)
        sandwich = kind.startswith("gemma")
        self._attn_write = "post_attention_layernorm" if sandwich else self._out
        self._mlp_norm = FAMILIES[kind].mlp_norm
        self._mlp_write = "post_feedforward_layernorm" if sandwich else self._down
        self.norms = [
            module for module in self.model.modules() if type(module).__name__.endswith("Norm")
        ]

    def run(
        self, ids: Sequence[int] | Sequence[Sequence[int]], site: Site, held: Scales | None = None
    ) -> Tensor:
        """Logits [B, T, V] of one prompt or of several of the same length."""
        batch = torch.tensor(ids if not isinstance(ids[0], int) else [ids])
        with ExitStack() as stack:
            for handle in self._hooks(batch.shape, site):
                stack.callback(handle.remove)
            stack.enter_context(self._patterns(site))
            stack.enter_context(_held(held or {}))
            logits: Tensor = self.model(batch, use_cache=False).logits
        return logits

    def _hooks(self, size: torch.Size, site: Site) -> Iterator[Any]:
        def enter(
            kind: str, layer: int | None, split: int, module: Any, args: tuple[Any, ...]
        ) -> Any:
            values = args[0].view(*size, *((split, -1) if split else (-1,)))
            return (site(kind, layer, values).reshape(args[0].shape), *args[1:])

        def leave(kind: str, layer: int, module: Any, args: Any, output: Tensor) -> Any:
            return site(kind, layer, output.view(*size, -1)).view_as(output)

        yield self.blocks[0].register_forward_pre_hook(partial(enter, "embed", None, 0))
        for layer, block in enumerate(self.blocks):
            out = block.get_submodule(self._out)
            experts = hasattr(getattr(block, "mlp", None), "experts")
            mlp_write = "mlp" if experts else self._mlp_write
            yield out.register_forward_pre_hook(partial(enter, "z", layer, HEADS))
            if not experts:
                down = block.get_submodule(self._down)
                yield down.register_forward_pre_hook(partial(enter, "neurons", layer, 0))
            mlp_out, mlp_norm = ("mlp" if experts else self._down), self._mlp_norm
            for kind, name in (
                ("mlp_in", mlp_norm),
                ("attn_out", self._out),
                ("mlp_out", mlp_out),
                ("attn", self._attn_write),
                ("mlp", mlp_write),
            ):
                yield block.get_submodule(name).register_forward_hook(partial(leave, kind, layer))
        yield self.final_norm.register_forward_pre_hook(partial(enter, "final", None, 0))

    @contextmanager
    def _patterns(self, site: Site) -> Iterator[None]:
        """Replaces the file's attention by itself and a sum over the probabilities of `site`."""
        file = sys.modules[type(self.blocks[0].get_submodule(self._attn)).__module__]
        original = file.eager_attention_forward

        def attend(
            module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            key = site("k", module.layer_idx, key)
            query = site("q", module.layer_idx, query)
            output, before = original(module, query, key, value, mask, **kwargs)
            after = site("probabilities", module.layer_idx, before)
            if after is not before:
                values = value.repeat_interleave(after.shape[1] // value.shape[1], 1)
                output = (after @ values).transpose(1, 2)
            return output, after

        file.eager_attention_forward = attend  # type: ignore[attr-defined]
        try:
            yield
        finally:
            file.eager_attention_forward = original  # type: ignore[attr-defined]

    def scales(self, ids: Sequence[int]) -> Scales:
        """The real scale of every norm on a prompt."""
        found: Scales = {}
        handles = [
            module.register_forward_hook(
                lambda module, args, output: found.update({module: _scale(module, args[0])})
            )
            for module in self.norms
        ]
        self.run(ids, untouched)
        for handle in handles:
            handle.remove()
        return found


@cache
def reference_of(variant: str, dtype: torch.dtype = torch.float32) -> Reference:
    return Reference(variant, dtype)


def scales_held(variant: str, norm_mode: NormMode) -> Scales:
    """The clean scales of the norms that the mode freezes."""
    reference = reference_of(variant, torch.float64)
    scales = reference.scales(IDS)
    match norm_mode:
        case NormMode.LIVE:
            return {}
        case NormMode.FINAL_NORM_FROZEN:
            return {reference.final_norm: scales[reference.final_norm]}
        case NormMode.ALL_NORMS_FROZEN:
            return scales


def untouched(kind: str, layer: int | None, values: Tensor) -> Tensor:
    return values


def _centred(module: nn.Module, x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True) if isinstance(module, nn.LayerNorm) else x


def _scale(module: Any, x: Tensor) -> Tensor:
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    scale: Tensor = (_centred(module, x).square().mean(-1, keepdim=True) + eps).sqrt()
    return scale


@contextmanager
def _held(scales: Scales) -> Iterator[None]:
    """While it lasts these norms divide by the scales given."""

    def forward(module: Any, x: Tensor) -> Tensor:
        gain = 1 if module.weight is None else module.weight
        if type(module).__name__.startswith("Gemma"):
            gain = 1 + gain
        out: Tensor = _centred(module, x) / scales[module] * gain
        bias: Tensor | None = getattr(module, "bias", None)
        return out if bias is None else out + bias

    for module in scales:
        setattr(module, "forward", partial(forward, module))  # noqa: B010
    try:
        yield
    finally:
        for module in scales:
            del module.__dict__["forward"]
