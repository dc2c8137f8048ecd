"""Random dictionaries in canonical form, made without any reader."""

from dataclasses import replace

import torch

from services.inference.engine.dictionaries.dictionary import (
    Activation,
    Dictionary,
    Gated,
    InputNorm,
    JumpRelu,
    Relu,
    TopK,
)
from services.inference.engine.dictionaries.sites import (
    Declared,
    Header,
    Point,
    Provenance,
    Site,
)


def header(**changes: object) -> Header:
    site = Site(Point.MLP_OUT, 1)
    plain = Header(
        id="mine",
        site_in=site,
        site_out=site,
        d_in=12,
        d_out=12,
        latents=40,
        activation="relu",
        declared=Declared(),
        provenance=Provenance("somewhere", "", "test", ()),
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def example(
    activation: str = "relu",
    norm: InputNorm | None = None,
    *,
    d_in: int = 12,
    d_out: int | None = None,
    latents: int = 40,
    skip: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Dictionary:
    draw = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw).to(dtype)

    d_out = d_out or d_in
    kinds: dict[str, Activation] = {
        "relu": Relu(),
        "jumprelu": JumpRelu(random(latents).abs()),
        "topk": TopK(5),
        "gated": Gated(random(latents), 0.1 * random(latents), random(latents)),
    }
    return Dictionary(
        header(d_in=d_in, d_out=d_out, latents=latents, activation=activation, has_skip=skip),
        w_enc=random(d_in, latents),
        w_dec=random(latents, d_out),
        b_enc=torch.zeros(latents, dtype=dtype) if activation == "gated" else random(latents),
        b_in=random(d_in),
        b_dec=random(d_out),
        activation=kinds[activation],
        norm=norm or InputNorm(),
        skip=random(d_in, d_out) if skip else None,
    )
