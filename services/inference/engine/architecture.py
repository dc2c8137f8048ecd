"""Which module is which in a Hugging Face causal LM.

Everything the engine knows about module names comes through here, from
`interp_engine.arch.resolve_arch`, so that the library behind it can be replaced. What a node
writes is read off weights that are already laid out for it: `w_out[n]` is what one unit of neuron
n adds to the residual stream, `w_o[h]` maps head h's output to it.
"""

from dataclasses import dataclass

import torch
from interp_engine.arch import resolve_arch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from services.common.addresses import Shape
from services.common.errors import FailedPrecondition
from services.inference.engine.interventions import Widths
from services.inference.engine.norms import Norm, probe_norm

FAMILIES = ("gpt2", "llama")
"""Values of `config.model_type` whose numbers are tested."""


@dataclass(frozen=True)
class Layer:
    """The modules and write weights of one layer."""

    block: nn.Module
    attention: nn.Module
    mlp: nn.Module
    mlp_down: nn.Module
    norms: tuple[Norm, ...]
    scaling: float
    """What scores are multiplied by."""
    w_q: Tensor
    """[H, dh, d]: query projection per head, before any rotation."""
    w_k: Tensor
    """[Hk, dh, d]: key projection per key/value head, before any rotation."""
    w_in: Tensor
    """[F, d]: what a neuron's pre-activation reads (the gate's where it is gated)."""
    w_o: Tensor
    """[H, dh, d]: output projection per head."""
    b_o: Tensor | None
    """[d]"""
    w_out: Tensor
    """[F, d]: output row per neuron."""
    b_out: Tensor | None
    """[d]"""
    w_o_gram: Tensor
    """[H, dh, dh]: W_O W_O^T per head, for write magnitudes without d-vectors."""
    w_out_norm: Tensor
    """[F]: length of each output row."""


@dataclass(frozen=True)
class Architecture:
    """A model's modules, sizes and write weights."""

    family: str
    layers: tuple[Layer, ...]
    final_norm: Norm
    w_e: Tensor
    """[V, d]: embedding rows."""
    w_u: Tensor
    """[V, d]: unembedding rows."""
    w_u_mean: Tensor
    """[d]: their mean."""
    unembed_bias: Tensor | None
    """[V]"""
    n_heads: int
    n_key_value_heads: int
    head_width: int
    width: int
    neurons: int
    vocabulary: int
    context: int

    @property
    def shape(self) -> Shape:
        return Shape(layers=len(self.layers), heads=self.n_heads, neurons=self.neurons)

    @property
    def widths(self) -> Widths:
        return Widths(residual=self.width, head=self.head_width)


def check_family(config: PretrainedConfig) -> None:
    """Raises FailedPrecondition for a model that would only be half served. Needs no weights."""
    family = str(config.model_type)
    if family not in FAMILIES:
        raise FailedPrecondition(
            f"models of type {family!r} are not supported yet; supported: {', '.join(FAMILIES)}",
            reason="UNSUPPORTED_ARCHITECTURE",
        )
    if getattr(config, "reorder_and_upcast_attn", False):
        raise FailedPrecondition(
            "reorder_and_upcast_attn bypasses the attention interface, so attention could not be "
            "read or edited; set it to false in the model's config.json",
            reason="UNSUPPORTED_ARCHITECTURE",
        )
    if getattr(config, "add_cross_attention", False):
        raise FailedPrecondition(
            "models with cross-attention are not supported: they read a second prompt",
            reason="UNSUPPORTED_ARCHITECTURE",
        )


def resolve(model: PreTrainedModel) -> Architecture:
    """Finds the modules to hook. Raises FailedPrecondition where one is not as assumed."""
    config = model.config
    check_family(config)
    arch = resolve_arch(model, config)
    with torch.no_grad():
        layers = tuple(
            _layer(
                block=arch.block(index),
                attention=arch.attn_module(index),
                attn_out=arch.attn_out_proj(index),
                mlp=arch.mlp_module(index),
                mlp_in=arch.mlp_projection(index, "pre_act"),
                mlp_down=arch.mlp_projection(index, "down"),
                pre_mlp_norm=arch.pre_mlp_norm(index),
                heads=arch.n_heads,
            )
            for index in range(arch.n_layers)
        )
        final_norm = probe_norm(arch.final_norm, arch.d_model)
        w_u = _write_weight(arch.lm_head).T
    return Architecture(
        family=str(config.model_type),
        layers=layers,
        final_norm=final_norm,
        w_e=_weight(arch.embed),
        w_u=w_u,
        w_u_mean=w_u.mean(0),
        unembed_bias=_bias(arch.lm_head),
        n_heads=arch.n_heads,
        n_key_value_heads=arch.n_kv_heads,
        head_width=arch.head_dim,
        width=arch.d_model,
        neurons=layers[0].w_out.shape[0],
        vocabulary=w_u.shape[0],
        context=int(config.max_position_embeddings),
    )


def _layer(
    block: nn.Module,
    attention: nn.Module,
    attn_out: nn.Module,
    mlp: nn.Module,
    mlp_in: nn.Module,
    mlp_down: nn.Module,
    pre_mlp_norm: nn.Module | None,
    heads: int,
) -> Layer:
    w_o = _write_weight(attn_out)
    w_o = w_o.view(heads, w_o.shape[0] // heads, w_o.shape[1])
    w_out = _write_weight(mlp_down)
    norms = [child for child in block.children() if type(child).__name__.endswith("Norm")]
    if len(norms) != 2 or pre_mlp_norm is not norms[1]:
        raise FailedPrecondition(
            f"expected a norm before attention and one before the MLP, found {len(norms)} norms",
            reason="UNSUPPORTED_ARCHITECTURE",
        )
    width = w_out.shape[1]
    w_q, w_k = _query_key(attention, width)
    return Layer(
        block=block,
        attention=attention,
        mlp=mlp,
        mlp_down=mlp_down,
        norms=tuple(probe_norm(norm, width) for norm in norms),
        scaling=_scaling(attention),
        w_q=w_q.view(heads, -1, width),
        w_k=w_k.view(-1, w_q.shape[0] // heads, width),
        w_in=_write_weight(mlp_in).T,
        w_o=w_o,
        b_o=_bias(attn_out),
        w_out=w_out,
        b_out=_bias(mlp_down),
        w_o_gram=w_o @ w_o.transpose(1, 2),
        w_out_norm=torch.linalg.vector_norm(w_out, dim=1),
    )


def _query_key(attention: nn.Module, width: int) -> tuple[Tensor, Tensor]:
    """Rows of the query and of the key projection, [out, d], of a fused or a separate layout."""
    fused = getattr(attention, "c_attn", None)
    if isinstance(fused, nn.Module):
        query, key, _ = torch.split(_write_weight(fused).T, width)
        return query.contiguous(), key.contiguous()
    query, key = (getattr(attention, name) for name in ("q_proj", "k_proj"))
    return _weight(query), _weight(key)


def _scaling(attention: nn.Module) -> float:
    scaling = attention.scaling
    assert isinstance(scaling, float)
    return scaling


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def _write_weight(projection: nn.Module) -> Tensor:
    """[in, out] whichever way the module stores it; a view, never a copy."""
    weight = _weight(projection)
    return weight if isinstance(projection, Conv1D) else weight.T


def _bias(projection: nn.Module) -> Tensor | None:
    bias = getattr(projection, "bias", None)
    return bias.detach() if isinstance(bias, Tensor) else None
