"""Norms are measured right, and what is no norm is refused."""

import pytest
import torch
from torch import Tensor, nn

from services.common.errors import FailedPrecondition
from services.inference.engine.norms import hold_scale, probe_norm


class OnePlusWeight(nn.Module):
    """An RMSNorm whose effective gain is 1 + weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width) * 0.3)
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (1 + self.weight)


def layer_norm(width: int) -> nn.LayerNorm:
    norm = nn.LayerNorm(width)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(width))
        norm.bias.copy_(torch.randn(width))
    return norm.requires_grad_(False)


@pytest.mark.parametrize("width", [16, 17])
def test_layer_norm_is_measured(width: int) -> None:
    module = layer_norm(width)
    norm = probe_norm(module, width, torch.zeros(1))
    assert norm.centres
    assert torch.allclose(norm.gain, module.weight, atol=1e-4)
    assert torch.allclose(norm.bias, module.bias, atol=1e-6)


@pytest.mark.parametrize("width", [16, 17])
def test_effective_gain_of_an_rms_norm_is_measured(width: int) -> None:
    module = OnePlusWeight(width).requires_grad_(False)
    norm = probe_norm(module, width, torch.zeros(1))
    assert not norm.centres
    assert torch.allclose(norm.gain, 1 + module.weight, atol=1e-4)
    assert norm.bias.abs().max() < 1e-6


def test_what_is_no_norm_is_refused() -> None:
    class Clamped(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).clamp(-0.5, 0.5)

    with pytest.raises(FailedPrecondition, match="neither a LayerNorm nor an RMSNorm"):
        probe_norm(Clamped(16).requires_grad_(False), 16, torch.zeros(1))


def test_the_scale_of_half_precision_does_not_overflow() -> None:
    norm = probe_norm(layer_norm(16).half(), 16, torch.zeros(1, dtype=torch.float16))
    x = torch.tensor([1000.0, -1000.0] * 8, dtype=torch.float16)
    assert float(norm.scale(x)) == pytest.approx(1000, rel=1e-3)


@pytest.mark.parametrize("make", [layer_norm, OnePlusWeight])
def test_rows_freeze_one_by_one_and_forward_values_never_change(make: type[nn.Module]) -> None:
    torch.manual_seed(1)
    module = make(16).double().requires_grad_(False)
    norm = probe_norm(module, 16, torch.zeros(1, dtype=torch.float64))
    x = torch.randn(2, 3, 16, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(2, 3, 16, dtype=torch.float64)
    output = hold_scale(norm, x, module(x), (True, False))
    assert torch.equal(output, module(x))
    (ours,) = torch.autograd.grad((output * direction).sum(), x)
    scale = norm.scale(x).detach()
    centred = x - x.mean(-1, keepdim=True) if norm.centres else x
    (held,) = torch.autograd.grad((centred / scale * norm.gain * direction).sum(), x)
    (live,) = torch.autograd.grad((module(x) * direction).sum(), x)
    assert torch.allclose(ours[0], held[0], rtol=1e-6)
    assert torch.allclose(ours[1], live[1], rtol=1e-6)
    assert not torch.allclose(held, live, rtol=1e-2)
