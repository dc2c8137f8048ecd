"""Sparse autoencoders side by side: what they compute, how good they are, how they are saved.

The files are SAELens's, version 6: a folder `demo-mlp_out-0` and the like for each dictionary, with
`cfg.json` and `sae_weights.safetensors`. `metadata.l0` and `metadata.fvu` say what `sample.txt`
beside the folders gives.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from demo import corpus

SAMPLE = "sample.txt"
_SAMPLE_TOKENS = 4000


@dataclass
class Stack:
    """Autoencoders side by side, [dictionaries, ...]."""

    w_enc: Tensor
    """[dictionaries, d, latents]"""
    w_dec: Tensor
    """[dictionaries, latents, d], rows of length 1"""
    b_enc: Tensor
    """[dictionaries, 1, latents]"""
    b_dec: Tensor
    """[dictionaries, 1, d]"""

    @property
    def parameters(self) -> list[Tensor]:
        return [self.w_enc, self.w_dec, self.b_enc, self.b_dec]

    def encode(self, x: Tensor, k: int) -> Tensor:
        """[dictionaries, tokens, d] -> [dictionaries, tokens, latents]"""
        pre = torch.baddbmm(self.b_enc, x - self.b_dec, self.w_enc)
        top = pre.topk(k, dim=-1)
        return torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())

    def decode(self, f: Tensor) -> Tensor:
        return torch.baddbmm(self.b_dec, f, self.w_dec)


@contextmanager
def writes(model: Any) -> Iterator[list[Tensor]]:
    """After a forward pass, what each of `sites(model)` wrote: [batch, tokens, d] each."""
    found: list[Tensor] = []

    def keep(module: Any, args: Any, output: Tensor) -> None:
        found.append(output)

    blocks = model.transformer.h
    modules = [part.c_proj for block in blocks for part in (block.attn, block.mlp)]
    hooks = [module.register_forward_hook(keep) for module in modules]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def activations(model: Any, rows: Tensor) -> Tensor:
    """[rows, tokens] -> [dictionaries, rows * tokens, d]"""
    with writes(model) as found:
        model.transformer(rows)
    return torch.stack([x.flatten(0, 1) for x in found])


def sites(model: Any) -> list[tuple[str, int]]:
    """Point and layer of each dictionary, in the order of a stack."""
    return [
        (point, layer) for layer in range(model.config.n_layer) for point in ("attn_out", "mlp_out")
    ]


def name(point: str, layer: int) -> str:
    return f"demo-{point}-{layer}"


@dataclass(frozen=True)
class Quality:
    tokens: int
    fvu: float
    """Fraction of variance unexplained: squared errors over squared distances from the mean."""
    l0: float
    """Mean number of active latents per token."""
    dead: float
    """Share of latents that no token uses."""


@torch.no_grad()
def measure(stack: Stack, k: int, x: Tensor) -> list[Quality]:
    """Of each dictionary on `x` [dictionaries, tokens, d]."""
    found = []
    for d, own in enumerate(x):
        alone = Stack(*(tensor[d : d + 1] for tensor in stack.parameters))
        f = alone.encode(own[None], k)
        error = (own - alone.decode(f)[0]).square().sum()
        variance = (own - own.mean(dim=0)).square().sum()
        active = f[0] > 0
        found.append(
            Quality(
                tokens=len(own),
                fvu=float(error / variance),
                l0=float(active.sum(-1).float().mean()),
                dead=float((~active.any(dim=0)).float().mean()),
            )
        )
    return found


@torch.no_grad()
def unscaled(stack: Stack, scale: Tensor) -> Stack:
    """The stack for inputs that are not divided by `scale` [dictionaries, 1, 1] first: the same
    latents are active, `scale` times as strongly, and decoder rows keep their length."""
    return Stack(
        stack.w_enc.detach(),
        stack.w_dec.detach(),
        stack.b_enc.detach() * scale,
        stack.b_dec.detach() * scale,
    )


def sample_text(tokenizer: Any) -> str:
    """About 4,000 tokens of the corpus, a document a line."""
    lines, tokens = [], 0
    texts = corpus.documents("sample")
    while tokens < _SAMPLE_TOKENS:
        lines.append(next(texts))
        tokens += len(tokenizer.backend_tokenizer.encode(lines[-1]).ids) + 1
    return "\n".join(lines) + "\n"


def sample_rows(tokenizer: Any, text: str, context: int) -> Tensor:
    """[rows, context]: the text's tokens in order; what does not fill a row is left out."""
    ids = tokenizer.backend_tokenizer.encode(text).ids
    return torch.tensor(ids[: len(ids) // context * context]).view(-1, context)


def save(stack: Stack, k: int, model: Any, qualities: list[Quality], out: Path) -> None:
    for d, ((point, layer), quality) in enumerate(zip(sites(model), qualities, strict=True)):
        folder = out / name(point, layer)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "architecture": "topk",
            "d_in": model.config.n_embd,
            "d_sae": stack.w_enc.shape[-1],
            "k": k,
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": True,
            "normalize_activations": "none",
            "reshape_activations": "none",
            "rescale_acts_by_decoder_norm": False,
            "metadata": {
                "model_name": "demo-gpt2",
                "hook_name": f"blocks.{layer}.hook_{point}",
                "hook_head_index": None,
                "prepend_bos": False,
                "context_size": model.config.n_positions,
                "dataset_path": SAMPLE,
                "l0": round(quality.l0, 3),
                "fvu": round(quality.fvu, 4),
            },
        }
        (folder / "cfg.json").write_text(json.dumps(config, indent=2) + "\n")
        tensors = {
            "W_enc": stack.w_enc[d],
            "W_dec": stack.w_dec[d],
            "b_enc": stack.b_enc[d, 0],
            "b_dec": stack.b_dec[d, 0],
        }
        save_file(
            {key: tensor.contiguous().clone() for key, tensor in tensors.items()},
            folder / "sae_weights.safetensors",
        )
