"""Norms: what each one does, and how to hold its scale constant in the backward pass.

A norm is `(x - mean) / scale * gain + bias` (LayerNorm) or `x / scale * gain` (RMSNorm). Which of
the two, the effective gain (1 + weight in some families) and the bias are measured by probing the
module once at load, not read from attribute names, and checked on random input.

In half precision the facts are measured on a copy in float32, and scales are taken in float32, as
the modules themselves do it.

Freezing never changes a forward value: the hook hands on the module's own output, and only its
gradient is replaced by that of the norm with a constant scale. Rows of a batch freeze one by one.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from services.common.errors import FailedPrecondition

NormPlace = tuple[str, int | None]
"""Which norm: `attn`, `mlp` (input norms), `q`, `k`, `attn_post`, `mlp_post` and the layer, or
`FINAL`."""
FINAL: NormPlace = ("final", None)


@dataclass(frozen=True)
class Norm:
    """A norm module and its measured facts."""

    module: nn.Module
    gain: Tensor
    """[d]: effective gain."""
    bias: Tensor
    """[d]: zeros for an RMSNorm."""
    centres: bool
    """Whether the mean is subtracted (LayerNorm)."""
    eps: float

    def scale(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., 1]: sqrt(var + eps), or sqrt(mean square + eps) for an RMSNorm."""
        x = at_least_float32(x)
        if self.centres:
            return (x.var(-1, keepdim=True, correction=0) + self.eps).sqrt()
        return (x.square().mean(-1, keepdim=True) + self.eps).sqrt()

    def linear(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., d]: what the norm does to a part of its input, but for its scale."""
        passed = (x - x.mean(-1, keepdim=True) if self.centres else x) * self.gain
        return passed.to(x.dtype)

    def frozen_gradient(self, grad: Tensor, scale: Tensor) -> Tensor:
        """Gradient at the input while `scale` is constant; shapes [..., d], [..., 1]."""
        held = grad * (self.gain / scale)
        held = held - held.mean(-1, keepdim=True) if self.centres else held
        return held.to(grad.dtype)


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision lifted to float32; anything else as it is."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


_LARGE = 2.0**13
"""Beside it epsilon is nothing, and the mean of many of it is exact."""


def probe_norm(module: nn.Module, width: int, like: Tensor) -> Norm:
    """Measures a norm over `width` channels; `like` has its device and dtype.

    Raises FailedPrecondition if it is no known norm.
    """
    pattern = torch.ones(width, dtype=at_least_float32(like[:0]).dtype, device=like.device)
    probed = module if pattern.dtype == like.dtype else copy.deepcopy(module).to(pattern.dtype)
    pattern[1::2] = -1
    if width % 2:
        pattern[-3:] = torch.tensor([1.0, 1.0, -2.0])
    rms = pattern.square().mean().sqrt()

    def run(x: Tensor) -> Tensor:
        # The shape the model itself uses: some norms flatten over batch and token.
        output: Tensor = probed(x[None, None])
        return output[0, 0].detach()

    bias = run(torch.zeros_like(pattern))
    gain = (run(pattern * _LARGE) - bias) * rms / pattern
    centres = bool(
        (run(torch.full_like(pattern, _LARGE)) - bias).abs().max() < 1e-3 * gain.abs().max()
    )
    norm = Norm(module, gain, bias, centres, _epsilon(module))
    generator = torch.Generator().manual_seed(0)
    for size in (0.1, 3.0):
        x = torch.randn(width, generator=generator).to(pattern) * size + 0.1
        centred = x - x.mean() if centres else x
        expected = centred / norm.scale(x) * gain + bias
        error = (run(x) - expected).abs().max() / expected.abs().max()
        if not error < 1e-3:
            raise FailedPrecondition(
                f"{type(module).__name__} is neither a LayerNorm nor an RMSNorm: its output "
                f"differs by {float(error):.2g} of its largest value",
                reason="UNSUPPORTED_ARCHITECTURE",
            )
    return norm


def _epsilon(module: nn.Module) -> float:
    for name in ("eps", "variance_epsilon", "epsilon"):
        value = getattr(module, name, None)
        if isinstance(value, float):
            return value
    raise FailedPrecondition(
        f"{type(module).__name__} does not say its epsilon", reason="UNSUPPORTED_ARCHITECTURE"
    )


class _HeldScale(torch.autograd.Function):
    """Output of the norm itself forward; backward with the scale constant in the rows asked for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, output: Tensor, norm: Norm, frozen: Tensor | None) -> Tensor:
        ctx.norm = norm
        ctx.frozen = frozen
        ctx.save_for_backward(norm.scale(x))
        return output.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        (scale,) = ctx.saved_tensors
        held = ctx.norm.frozen_gradient(grad, scale)
        if ctx.frozen is None:
            return held, None, None, None
        zero = torch.zeros((), dtype=grad.dtype, device=grad.device)
        return (
            torch.where(ctx.frozen, held, zero),
            torch.where(ctx.frozen, zero, grad),
            None,
            None,
        )


def hold_scale(norm: Norm, x: Tensor, output: Tensor, frozen_rows: tuple[bool, ...]) -> Tensor:
    """`output` unchanged, with the scale constant in the backward pass of the rows marked.

    `x` and `output` are [B, ..., d]; `frozen_rows` has B flags, one or more of them set.
    """
    if all(frozen_rows):
        held: Tensor = _HeldScale.apply(x, output.detach(), norm, None)  # type: ignore[no-untyped-call]
        return held
    flags = torch.tensor(frozen_rows, device=x.device).view(-1, *(1,) * (x.dim() - 1))
    mixed: Tensor = _HeldScale.apply(x, output, norm, flags)  # type: ignore[no-untyped-call]
    return mixed
