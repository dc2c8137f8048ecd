"""A transformer's forward pass written out by hand, with a callback at every site.

It shares no code with the engine and none with Hugging Face but the weights, so it is what edits
and derivatives are compared with. `site(kind, layer, values)` may return other values:

    embed, attn, resid_mid, mlp_in, mlp, resid_post [T, d]     q, k, v [H, T, dh] per query head
    bias.attn, bias.mlp [T, d]
    scores, probabilities [H, T, T]      z [T, H, dh]          gate, up, neurons [T, F]
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from services.inference.engine.interventions import (
    Add,
    Mask,
    Operation,
    ProjectOut,
    Scale,
    SetTo,
    Zero,
)

Site = Callable[[str, int | None, Tensor], Tensor]
Scales = dict[str, Tensor]


def untouched(kind: str, layer: int | None, values: Tensor) -> Tensor:
    return values


def edited(*changes: tuple[str, int | None, Any, Callable[[Tensor], Tensor]]) -> Site:
    """A site callback from (kind, layer, index, function of what stands at the index)."""

    def site(kind: str, layer: int | None, values: Tensor) -> Tensor:
        for at_kind, at_layer, index, change in changes:
            if (at_kind, at_layer) == (kind, layer):
                values = values.clone()
                values[index] = change(values[index])
        return values

    return site


def apply(operation: Operation, x: Tensor) -> Tensor:
    """What an operation makes of the value of a site."""
    match operation:
        case Zero():
            return torch.zeros_like(x)
        case SetTo(value):
            return torch.zeros_like(x) + torch.as_tensor(value).to(x)
        case Scale(factor):
            return factor * x
        case Add(value, relative):
            length = x.norm(dim=-1, keepdim=True) if relative else 1
            return x + length * torch.as_tensor(value).to(x)
        case ProjectOut(direction):
            along = direction.to(x)
            return x - (x @ along / along.square().sum())[..., None] * along
        case Mask():
            return torch.full_like(x, float("-inf"))
        case _:
            raise TypeError(f"{operation} needs other runs: by_hand.change")


def forward(
    model: Any,
    ids: Sequence[int],
    site: Site = untouched,
    held: Scales | None = None,
    scales: Scales | None = None,
) -> Tensor:
    """Logits [T, V]. Norms named in `held` divide by that; `scales` collects the real ones."""
    tokens = torch.arange(len(ids))
    gpt2 = model.config.model_type == "gpt2"
    trunk = model.transformer if gpt2 else model.model

    def norm(name: str, module: Any, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True) if gpt2 else x
        eps = module.eps if gpt2 else module.variance_epsilon
        scale = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        if scales is not None:
            scales[name] = scale.detach()
        out: Tensor = centred / (held or {}).get(name, scale) * module.weight
        return out + module.bias if gpt2 else out

    if gpt2:
        x = trunk.wte.weight[list(ids)] + trunk.wpe.weight[tokens]
        blocks, final = trunk.h, trunk.ln_f
    else:
        x = trunk.embed_tokens.weight[list(ids)]
        blocks, final = trunk.layers, trunk.norm
    x = site("embed", None, x)
    for layer, block in enumerate(blocks):
        first, second = (
            (block.ln_1, block.ln_2)
            if gpt2
            else (block.input_layernorm, block.post_attention_layernorm)
        )
        read = norm(f"attn.{layer}", first, x)
        query, key, value = _queries(model, block, read, tokens)
        query = site("q", layer, query)
        key = site("k", layer, key)
        value = site("v", layer, value)
        scores = site("scores", layer, query @ key.transpose(1, 2) / query.shape[-1] ** 0.5)
        future = tokens[None, :] > tokens[:, None]
        probabilities = scores.masked_fill(future, float("-inf")).softmax(-1)
        probabilities = site("probabilities", layer, probabilities)
        z = site("z", layer, (probabilities @ value).transpose(0, 1))
        out = block.attn.c_proj if gpt2 else block.self_attn.o_proj
        write = _biased(site, "bias.attn", layer, out, out(z.reshape(len(ids), -1)))
        write = site("attn", layer, write)
        x = site("resid_mid", layer, x + write)
        read = site("mlp_in", layer, norm(f"mlp.{layer}", second, x))
        if gpt2:
            neurons = block.mlp.act(site("gate", layer, block.mlp.c_fc(read)))
            down = block.mlp.c_proj
        else:
            gate = site("gate", layer, block.mlp.gate_proj(read))
            up = site("up", layer, block.mlp.up_proj(read))
            neurons = torch.nn.functional.silu(gate) * up
            down = block.mlp.down_proj
        write = _biased(site, "bias.mlp", layer, down, down(site("neurons", layer, neurons)))
        write = site("mlp", layer, write)
        x = site("resid_post", layer, x + write)
    logits: Tensor = model.lm_head(norm("final", final, x))
    return logits


def _biased(site: Site, kind: str, layer: int, projection: Any, write: Tensor) -> Tensor:
    """A sublayer's write with another bias, where it has one."""
    if projection.bias is None:
        return write
    bias: Tensor = projection.bias.expand_as(write)
    return write - bias + site(kind, layer, bias)


def _queries(model: Any, block: Any, read: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
    """q, k, v per query head, [H, T, dh], rotated where the model rotates."""
    heads = model.config.num_attention_heads
    if model.config.model_type == "gpt2":
        parts = block.attn.c_attn(read).chunk(3, dim=-1)
        return tuple(part.view(len(tokens), heads, -1).transpose(0, 1) for part in parts)
    attention = block.self_attn
    width = attention.head_dim
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    query, key, value = (
        project(read).view(len(tokens), -1, width).transpose(0, 1) for project in projections
    )
    base = model.config.rope_parameters["rope_theta"]
    # In float32, as the model does it: the angles are constants, so nothing is lost by it.
    frequencies = 1.0 / base ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    angles = tokens[:, None].float() * frequencies
    cosine = torch.cat([angles.cos()] * 2, -1).to(read.dtype)
    sine = torch.cat([angles.sin()] * 2, -1).to(read.dtype)

    def rotated(vectors: Tensor) -> Tensor:
        left, right = vectors.chunk(2, dim=-1)
        return vectors * cosine + torch.cat([-right, left], -1) * sine

    groups = heads // key.shape[0]
    key, value = (each.repeat_interleave(groups, 0) for each in (rotated(key), value))
    return rotated(query), key, value
