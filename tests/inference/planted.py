"""Random dictionaries for the tiny models, and their formulas written out by hand."""

from collections.abc import Callable

import torch
from torch import Tensor

from services.inference.engine.dictionaries.dictionary import (
    Dictionary,
    Gated,
    InputNorm,
    JumpRelu,
    NormKind,
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
from tests.inference.helpers import HEAD_WIDTH, HEADS, NEURONS, WIDTH

LATENTS = 24
ACTIVATIONS = ("relu", "jumprelu", "topk", "gated")


def width_of(point: Point) -> int:
    return {Point.MLP_ACT: NEURONS, Point.Z: HEADS * HEAD_WIDTH}.get(point, WIDTH)


def random_dictionary(
    name: str,
    point: Point,
    layer: int,
    activation: str = "relu",
    norm: InputNorm | None = None,
    *,
    reads: Point | None = None,
    skip: bool = False,
    before_post_norm: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    width: Callable[[Point], int] = width_of,
) -> Dictionary:
    """Every weight random. `reads`: a transcoder's input point."""
    generator = torch.Generator().manual_seed(seed + 100 * layer)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) * 0.5

    site_out = Site(point, layer, before_post_norm)
    site_in = site_out if reads is None else Site(reads, layer)
    d_in, d_out = width(site_in.point), width(point)
    match activation:
        case "relu":
            function: Relu | JumpRelu | TopK | Gated = Relu()
        case "jumprelu":
            function = JumpRelu(random(LATENTS).abs())
        case "topk":
            function = TopK(6)
        case _:
            function = Gated(random(LATENTS), random(LATENTS), random(LATENTS))
    header = Header(
        name,
        site_in,
        site_out,
        d_in,
        d_out,
        LATENTS,
        activation,
        Declared(),
        Provenance("memory", "", "test", ()),
        skip,
    )
    return Dictionary(
        header,
        w_enc=random(d_in, LATENTS),
        w_dec=random(LATENTS, d_out),
        b_enc=torch.zeros(LATENTS, dtype=dtype) if activation == "gated" else random(LATENTS),
        b_in=random(d_in),
        b_dec=random(d_out),
        activation=function,
        norm=norm or InputNorm(),
        skip=random(d_in, d_out) if skip else None,
    )


class ByHand:
    """The formulas of SEMANTICS 9 for one dictionary, scales live unless `held`."""

    def __init__(self, dictionary: Dictionary) -> None:
        self.d = dictionary

    def scale_and_mean(self, x: Tensor) -> tuple[Tensor, Tensor]:
        match self.d.norm.kind:
            case NormKind.LAYER_NORM:
                return x.std(-1, keepdim=True).detach(), x.mean(-1, keepdim=True)
            case NormKind.CENTRE:
                return torch.ones_like(x[..., :1]), x.mean(-1, keepdim=True)
        return torch.ones_like(x[..., :1]), torch.zeros_like(x[..., :1])

    def latents(self, x: Tensor) -> Tensor:
        scale, mean = self.scale_and_mean(x)
        eps = self.d.norm.eps if self.d.norm.kind is NormKind.LAYER_NORM else 0.0
        u = ((x - mean) / (scale + eps) - self.d.b_in) @ self.d.w_enc
        match self.d.activation:
            case Relu():
                return (u + self.d.b_enc).relu()
            case JumpRelu(threshold):
                pre = u + self.d.b_enc
                return torch.where((pre > threshold) & (pre > 0), pre, torch.zeros_like(pre))
            case TopK(k):
                pre = (u + self.d.b_enc).relu()
                kept = torch.zeros_like(pre).scatter(-1, pre.topk(k, dim=-1).indices, 1.0)
                return pre * kept
            case Gated(b_gate, r_mag, b_mag):
                return (r_mag.exp() * u + b_mag).relu() * (u + b_gate > 0)

    def write(self, f: Tensor, x: Tensor) -> Tensor:
        return (f @ self.d.w_dec) * self.scale_and_mean(x)[0]

    def bias(self, x: Tensor) -> Tensor:
        scale, mean = self.scale_and_mean(x)
        return self.d.b_dec * scale + mean

    def skipped(self, x: Tensor) -> Tensor:
        return x @ self.d.skip if self.d.skip is not None else torch.zeros_like(self.d.b_dec)

    def error(self, x: Tensor, target: Tensor) -> Tensor:
        return target - self.write(self.latents(x), x) - self.bias(x) - self.skipped(x)
