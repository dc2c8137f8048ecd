"""Which module is which in a Hugging Face causal LM, and its weights laid out by component.

Everything the engine knows about module names comes through here, from `families` and from
`interp_engine.arch.resolve_arch`, so that the library behind it can be replaced. What a node writes
is read off weights that are already laid out for it: `w_out[n]` is what one unit of neuron n adds
to the residual stream, `w_o[h]` maps head h's output to it.

Where a norm lies between a sublayer and the stream (a post-norm), its gain is folded into those
weights at load. What is left of it is one scale per token, captured in the pass, that a write is
divided by, and its bias, which is part of the sublayer's bias row.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from interp_engine.arch import ArchSpec, resolve_arch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from services.common.addresses import Kind, Shape
from services.inference.engine.families import Family, family_of, unsupported
from services.inference.engine.norms import Norm, NormPlace, probe_norm
from services.inference.engine.targets import Widths


@dataclass(frozen=True)
class Layer:
    """The modules and weights of one layer."""

    block: nn.Module
    attention: nn.Module
    attention_out: nn.Module
    attn_projections: tuple[nn.Module, ...]
    """The projections to q, k and v, or the one that is fused of them."""
    mlp: nn.Module
    """Its output is the MLP's, before a post-norm."""
    mlp_gate: nn.Module | None
    """The projection to `w_in`'s pre-activations."""
    mlp_up: nn.Module | None
    """The projection to the other branch of a gated MLP."""
    mlp_down: nn.Module | None
    experts: bool
    """The MLP is a mixture of experts: it has no neurons (F is 0) and none of these projections."""
    parallel: bool
    """Attention and MLP read the same residual stream: there is none between them."""
    attn_norm: Norm
    mlp_norm: Norm
    attn_post_norm: Norm | None
    mlp_post_norm: Norm | None
    q_norm: Norm | None
    """Over the width of a head, on queries before any rotation."""
    k_norm: Norm | None
    window: int | None
    """How many tokens a query reads at most, itself included; None: all before it."""
    scaling: float
    """What q . k is multiplied by."""
    attn_softcap: float | None
    """Scores are c tanh(score / c), before the mask."""
    w_q: Tensor
    """[H, dh, d]: query projection per head, before norm and rotation."""
    b_q: Tensor | None
    """[H, dh]"""
    w_k: Tensor
    """[Hk, dh, d]: key projection per key/value head, before norm and rotation."""
    b_k: Tensor | None
    """[Hk, dh]"""
    w_v: Tensor
    """[Hk, dh, d]: value projection per key/value head."""
    b_v: Tensor | None
    """[Hk, dh]"""
    w_in: Tensor
    """[F, d]: what a neuron's pre-activation reads (the gate's where it is gated)."""
    b_in: Tensor | None
    """[F]"""
    w_up: Tensor | None
    """[F, d]: what the other branch of a gated neuron reads."""
    b_up: Tensor | None
    """[F]"""
    activation: Callable[[Tensor], Tensor]
    """From pre-activations to activations (of the gate where it is gated)."""
    w_o: Tensor
    """[H, dh, d]: output projection per head, with the post-norm's gain."""
    b_o: Tensor | None
    """[d], with the post-norm's gain, without its bias."""
    w_out: Tensor
    """[F, d]: output row per neuron, with the post-norm's gain."""
    b_out: Tensor | None
    """[d], with the post-norm's gain, without its bias."""
    w_o_gram: Tensor
    """[H, dh, dh]: W_O W_O^T per head, for write magnitudes without d-vectors."""
    w_out_norm: Tensor
    """[F]: length of each output row."""

    @property
    def gated(self) -> bool:
        """Whether a neuron's activation is act(gate) * up."""
        return self.w_up is not None

    def output_bias(self, kind: Kind) -> Tensor | None:
        """[d], with the post-norm's gain: `Kind.BIAS_ATTN` or `Kind.BIAS_MLP`."""
        return self.b_o if kind is Kind.BIAS_ATTN else self.b_out

    def bias_write(self, kind: Kind, scale: Tensor | None) -> Tensor | None:
        """What a sublayer's output bias and its post-norm's add to the stream, [T or 1, d].

        scale: of the post-norm, [T, 1], None where there is none. `Kind.BIAS_MLP` of experts is
        None: their whole write is a node.
        """
        if kind is Kind.BIAS_MLP and self.experts:
            return None
        bias = self.output_bias(kind)
        post_norm = self.attn_post_norm if kind is Kind.BIAS_ATTN else self.mlp_post_norm
        write = None if bias is None else bias[None]
        if write is not None and scale is not None:
            write = write / scale
        if post_norm is not None and post_norm.bias.any():
            write = post_norm.bias[None] if write is None else write + post_norm.bias
        return write

    def norms(self, index: int) -> Iterator[tuple[NormPlace, Norm]]:
        """Every norm of this layer, which is number `index`."""
        for site, norm in (
            ("attn", self.attn_norm),
            ("q", self.q_norm),
            ("k", self.k_norm),
            ("attn_post", self.attn_post_norm),
            ("mlp", self.mlp_norm),
            ("mlp_post", self.mlp_post_norm),
        ):
            if norm is not None:
                yield (site, index), norm


@dataclass(frozen=True)
class Architecture:
    """A model's modules, sizes and write weights."""

    family: str
    layers: tuple[Layer, ...]
    final_norm: Norm
    w_e: Tensor
    """[V, d]: embedding rows as stored; `embed_scale` times that is what a token writes."""
    embed_scale: float
    w_u: Tensor
    """[V, d]: unembedding rows."""
    w_u_mean: Tensor
    """[d]: their mean."""
    unembed_bias: Tensor | None
    """[V]"""
    logit_softcap: float | None
    """The model's own logits are c tanh(logit / c)."""
    n_heads: int
    n_key_value_heads: int
    head_width: int
    width: int
    neurons: int
    vocabulary: int
    context: int

    @property
    def parallel(self) -> bool:
        """Attention and MLP of a layer read the same residual stream: no `resid_mid` exists."""
        return self.layers[0].parallel

    @property
    def experts(self) -> frozenset[int]:
        """Layers whose MLP is a mixture of experts, so that `mlp.L` is the finest node there."""
        return frozenset(index for index, layer in enumerate(self.layers) if layer.experts)

    @property
    def shape(self) -> Shape:
        return Shape(
            layers=len(self.layers),
            heads=self.n_heads,
            neurons=self.neurons,
            windows=tuple(layer.window for layer in self.layers),
            experts=self.experts,
            parallel=self.parallel,
            without_bias=frozenset(
                (kind, index)
                for index, layer in enumerate(self.layers)
                for kind in (Kind.BIAS_ATTN, Kind.BIAS_MLP)
                if layer.bias_write(kind, None) is None
            ),
        )

    @property
    def widths(self) -> Widths:
        return Widths(residual=self.width, head=self.head_width)


def resolve(model: PreTrainedModel) -> Architecture:
    """Finds the modules to hook. Raises FailedPrecondition where one is not as assumed."""
    config = model.config
    family = family_of(config)
    arch = resolve_arch(model, config)
    with torch.no_grad():
        w_e = _weight(arch.embed)
        layers = tuple(_layer(arch, index, family, config) for index in range(arch.n_layers))
        final_norm = probe_norm(arch.final_norm, arch.d_model, w_e)
        w_u = _write_weight(arch.lm_head).T
    softcap = getattr(config, "final_logit_softcapping", None)
    unembed_bias = bias_of(arch.lm_head)
    if softcap is not None and unembed_bias is not None:
        raise unsupported("an unembedding bias below a soft cap of the logits is not supported")
    return Architecture(
        family=str(config.model_type),
        layers=layers,
        final_norm=final_norm,
        w_e=w_e,
        embed_scale=float(getattr(arch.embed, "embed_scale", 1.0)),
        w_u=w_u,
        w_u_mean=w_u.mean(0),
        unembed_bias=unembed_bias,
        logit_softcap=softcap,
        n_heads=arch.n_heads,
        n_key_value_heads=arch.n_kv_heads,
        head_width=arch.head_dim,
        width=arch.d_model,
        neurons=max(layer.w_out.shape[0] for layer in layers),
        vocabulary=w_u.shape[0],
        context=int(config.max_position_embeddings),
    )


def _layer(arch: ArchSpec, index: int, family: Family, config: PretrainedConfig) -> Layer:
    block, attention = arch.block(index), arch.attn_module(index)
    width, head_width = arch.d_model, arch.head_dim
    like = _weight(arch.embed)

    def norm(owner: nn.Module, name: str | None, over: int) -> Norm | None:
        return None if name is None else probe_norm(getattr(owner, name), over, like)

    attn_norm = norm(block, family.attn_norm, width)
    mlp_norm = norm(block, family.mlp_norm, width)
    if attn_norm is None or mlp_norm is None:
        raise unsupported(f"layer {index} has no norm before attention or before the MLP")
    attn_post_norm = norm(block, family.attn_post_norm, width)
    mlp_post_norm = norm(block, family.mlp_post_norm, width)
    has_qk_norm = hasattr(attention, "q_norm")
    attn_out = arch.attn_out_proj(index)
    w_o, b_o = _folded(attn_out, attn_post_norm)
    w_o = w_o.view(arch.n_heads, head_width, width)
    mlp = _mlp(arch, index, mlp_post_norm)
    query, key, value = _query_key_value(attention, head_width)
    scaling = _scaling(attention)
    if family.scales_queries:
        query = (query[0] * scaling, None if query[1] is None else query[1] * scaling)
        scaling = 1.0
    return Layer(
        block=block,
        attention=attention,
        attention_out=attn_out,
        attn_projections=_attn_projections(attention),
        mlp=mlp.module,
        mlp_gate=mlp.gate,
        mlp_up=mlp.up,
        mlp_down=mlp.down,
        experts=mlp.gate is None,
        parallel=bool(getattr(config, "use_parallel_residual", False)),
        attn_norm=attn_norm,
        mlp_norm=mlp_norm,
        attn_post_norm=attn_post_norm,
        mlp_post_norm=mlp_post_norm,
        q_norm=norm(attention, "q_norm" if has_qk_norm else None, head_width),
        k_norm=norm(attention, "k_norm" if has_qk_norm else None, head_width),
        window=arch.sliding_window_for_layer(index),
        scaling=scaling,
        attn_softcap=config.attn_logit_softcapping if family.softcaps_attention else None,
        w_q=query[0],
        b_q=query[1],
        w_k=key[0],
        b_k=key[1],
        w_v=value[0],
        b_v=value[1],
        w_in=mlp.w_in,
        b_in=None if mlp.gate is None else bias_of(mlp.gate),
        w_up=None if mlp.up is None else _write_weight(mlp.up).T,
        b_up=None if mlp.up is None else bias_of(mlp.up),
        activation=mlp.activation,
        w_o=w_o,
        b_o=b_o,
        w_out=mlp.w_out,
        b_out=mlp.b_out,
        w_o_gram=w_o @ w_o.transpose(1, 2),
        w_out_norm=torch.linalg.vector_norm(mlp.w_out, dim=1),
    )


@dataclass(frozen=True)
class _Mlp:
    """The modules of an MLP and the weights of its neurons; no gate where it is of experts."""

    module: nn.Module
    gate: nn.Module | None
    up: nn.Module | None
    down: nn.Module | None
    activation: Callable[[Tensor], Tensor]
    w_in: Tensor
    w_out: Tensor
    b_out: Tensor | None


def _mlp(arch: ArchSpec, index: int, post_norm: Norm | None) -> _Mlp:
    holder = arch.mlp_projection_holder(index)
    if arch.is_moe_layer(index):
        none = _weight(arch.embed).new_zeros(0, arch.d_model)
        return _Mlp(holder, None, None, None, nn.Identity(), none, none, None)
    gate, down = (arch.mlp_projection(index, which) for which in ("pre_act", "down"))
    w_out, b_out = _folded(down, post_norm)
    return _Mlp(
        module=down if holder is arch.block(index) else holder,
        gate=gate,
        up=getattr(holder, "up_proj", None),
        down=down,
        activation=_activation(holder),
        w_in=_write_weight(gate).T,
        w_out=w_out,
        b_out=b_out,
    )


def _folded(projection: nn.Module, post_norm: Norm | None) -> tuple[Tensor, Tensor | None]:
    """Write weight [in, d] and bias [d] of a projection, through the linear part of a post-norm."""
    weight, bias = _write_weight(projection), bias_of(projection)
    if post_norm is None:
        return weight, bias
    return post_norm.linear(weight), None if bias is None else post_norm.linear(bias)


def _attn_projections(attention: nn.Module) -> tuple[nn.Module, ...]:
    for name in ("c_attn", "query_key_value"):
        if hasattr(attention, name):
            return (getattr(attention, name),)
    return tuple(getattr(attention, name) for name in ("q_proj", "k_proj", "v_proj"))


Projection = tuple[Tensor, Tensor | None]
"""Weight [heads, dh, d] and bias [heads, dh]."""


def _query_key_value(attention: nn.Module, head_width: int) -> tuple[Projection, ...]:
    """Projections of q, k and v per head, of a fused or a separate layout."""
    projections = _attn_projections(attention)
    if hasattr(attention, "query_key_value"):
        # Rows are ordered by head, then q, k, v.
        (interleaved,) = projections
        weights = _interleaved(_weight(interleaved), head_width)
        bias = bias_of(interleaved)
        biases: Sequence[Tensor | None] = (
            (None,) * 3 if bias is None else _interleaved(bias, head_width)
        )
    elif len(projections) == 1:
        (fused,) = projections
        weights = _write_weight(fused).T.chunk(3)
        bias = bias_of(fused)
        biases = (None,) * 3 if bias is None else bias.chunk(3)
    else:
        weights = tuple(_weight(projection) for projection in projections)
        biases = [bias_of(projection) for projection in projections]
    return tuple(
        (
            weight.reshape(-1, head_width, weight.shape[-1]),
            None if of_weight is None else of_weight.reshape(-1, head_width),
        )
        for weight, of_weight in zip(weights, biases, strict=True)
    )


def _interleaved(fused: Tensor, head_width: int) -> tuple[Tensor, ...]:
    """[H * 3 * dh, ...] -> three of [H, dh, ...]."""
    by_head = fused.view(-1, 3, head_width, *fused.shape[1:])
    return by_head[:, 0], by_head[:, 1], by_head[:, 2]


def _activation(holder: nn.Module) -> Callable[[Tensor], Tensor]:
    for name in ("act", "act_fn", "activation_fn"):
        found = getattr(holder, name, None)
        if callable(found):
            activation: Callable[[Tensor], Tensor] = found
            return activation
    raise unsupported(f"{type(holder).__name__} does not say its activation function")


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


def bias_of(projection: nn.Module) -> Tensor | None:
    bias = getattr(projection, "bias", None)
    return bias.detach() if isinstance(bias, Tensor) else None
