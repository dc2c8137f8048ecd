"""The canonical form against SEMANTICS 9 written out, and its identities."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from services.common.errors import FailedPrecondition
from services.inference.engine.dictionaries.dictionary import (
    Dictionary,
    Gated,
    InputNorm,
    JumpRelu,
    NormKind,
    TopK,
)
from tests.inference.dictionaries.examples import example

ACTIVATIONS = ("relu", "jumprelu", "topk", "gated")
NORMS = {
    "none": InputNorm(),
    "centre": InputNorm(NormKind.CENTRE),
    "layer_norm": InputNorm(NormKind.LAYER_NORM, eps=1e-5),
    "constant_norm": InputNorm(NormKind.CONSTANT_NORM),
    "factor": InputNorm(NormKind.FACTOR, factor=0.3),
    "not undone": InputNorm(NormKind.LAYER_NORM, undone=False),
}


def tokens(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 7, 12, generator=torch.Generator().manual_seed(9)).to(dtype) * 2 + 0.5


def by_hand(d: Dictionary, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """pre, f and recon of one token x [d_in], from the formulas of SEMANTICS 9."""
    scale, mean, x_n = torch.ones(()).to(x), torch.zeros(()).to(x), x
    match d.norm.kind:
        case NormKind.CENTRE:
            mean = x.mean()
            x_n = x - mean
        case NormKind.LAYER_NORM:
            mean, scale = x.mean(), x.std()
            x_n = (x - mean) / (scale + 1e-5)
        case NormKind.CONSTANT_NORM:
            scale = x.norm() / len(x) ** 0.5
            x_n = x / scale
        case NormKind.FACTOR:
            scale = 1 / torch.tensor(d.norm.factor).to(x)
            x_n = x * d.norm.factor
    u = (x_n - d.b_in) @ d.w_enc + d.b_enc
    pre = u
    f = torch.relu(u)
    match d.activation:
        case JumpRelu(threshold):
            f = torch.where(u > threshold, f, 0)
        case TopK(k):
            kept = sorted(range(len(u)), key=lambda i: -float(u[i]))[:k]
            f = torch.stack([v if i in kept else v * 0 for i, v in enumerate(f)])
        case Gated(b_gate, r_mag, b_mag):
            pre = torch.exp(r_mag) * u + b_mag
            f = torch.where(u + b_gate > 0, torch.relu(pre), 0)
    recon = f @ d.w_dec + d.b_dec
    return pre, f, recon * scale + mean if d.norm.undone else recon


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_is_the_published_formula(activation: str, norm: str) -> None:
    d = example(activation, NORMS[norm])
    x = tokens()
    f = d.encode(x)
    _, scale, mean = d.normalise(x)
    recon = d.decode(f, scale, mean)
    for where in ((0, 0), (1, 6)):
        expected = by_hand(d, x[where])
        assert_close(d.pre_activation(x)[where], expected[0])
        assert_close(f[where], expected[1])
        assert_close(recon[where], expected[2], rtol=1e-5, atol=1e-4)
    assert 0 < (f > 0).float().mean() < 1


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_latents_bias_and_error_add_up_to_the_site(activation: str, norm: str) -> None:
    d = example(activation, NORMS[norm], dtype=torch.float64)
    x = tokens(torch.float64)
    f = d.encode(x)
    _, scale, mean = d.normalise(x)
    latents = torch.arange(d.latents).expand(*f.shape)
    rows = f[..., None] * d.w_dec[latents] * scale[..., None, :]
    assert_close(rows.sum(-2), d.write(f, scale))
    assert_close(rows.sum(-2) + d.bias_write(scale, mean) + d.error(x, x), x)


def test_a_transcoder_s_error_leaves_out_the_skip() -> None:
    d = example("relu", d_out=9, skip=True)
    assert d.skip is not None
    x = tokens()
    target = torch.randn(2, 7, 9)
    f = torch.relu((x - d.b_in) @ d.w_enc + d.b_enc)
    assert_close(d.error(x, target), target - f @ d.w_dec - d.b_dec - x @ d.skip, atol=1e-4, rtol=0)
    without = replace(d, skip=None)
    assert_close(without.skip_write(x), torch.zeros(2, 7, 9))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_pre_activations_of_some_latents(activation: str, norm: str) -> None:
    d = example(activation, NORMS[norm], dtype=torch.float64)
    x = tokens(torch.float64)
    some = torch.tensor([31, 0, 7])
    pre = d.pre_activation_of(x, some)
    assert_close(pre, d.pre_activation(x)[..., some])
    linear = (d.encoder_directions(x, some) @ x[..., None])[..., 0]
    assert_close(linear + d.encoder_constants(some), pre)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_gradient_holds_norm_in_s_scale(activation: str, norm: str) -> None:
    d = example(activation, NORMS[norm], dtype=torch.float64)
    x = tokens(torch.float64).requires_grad_()
    latent = torch.tensor([3])
    grad = torch.autograd.grad(d.pre_activation_of(x, latent).sum(), x)[0]
    assert_close(grad, d.encoder_directions(x.detach(), latent)[..., 0, :])
    live = torch.autograd.grad(d.pre_activation_of(x, latent, frozen=False).sum(), x)[0]
    step = torch.randn_like(x)
    ahead, behind = (
        d.pre_activation_of(x.detach() + sign * 1e-6 * step, latent).sum() for sign in (1, -1)
    )
    assert_close((live * step).sum(), (ahead - behind) / 2e-6, rtol=1e-5, atol=1e-6)
    if norm in ("layer_norm", "constant_norm"):
        assert not torch.allclose(live, grad)


def test_top_k_keeps_the_lowest_index_among_equals() -> None:
    d = example("topk", latents=9)
    same = torch.ones(12, 9) * torch.tensor([1.0, 2, 2, 1, 2, 2, 1, 2, 2])
    d = replace(d, w_enc=same, b_enc=torch.zeros(9), b_in=torch.zeros(12), activation=TopK(3))
    assert d.encode(torch.ones(12)).nonzero().flatten().tolist() == [1, 2, 4]
    d = replace(d, activation=TopK(7))
    assert d.encode(torch.ones(12)).nonzero().flatten().tolist() == [0, 1, 2, 4, 5, 7, 8]


def test_top_k_of_negative_values() -> None:
    d = replace(example("topk"), activation=TopK(3), b_enc=torch.full((40,), -1e3))
    assert d.encode(tokens()).count_nonzero() == 0
    signed = replace(d, activation=TopK(3, signed=True))
    f = signed.encode(tokens())
    assert (f.count_nonzero(-1) == 3).all()
    assert (f <= 0).all()


def test_sparse_and_dense_decoding_agree() -> None:
    d = example("topk", latents=400)
    f = d.encode(tokens())
    f[0, 3] = 0
    assert (f != 0).float().mean() < 1 / 16
    assert_close(d.write(f, torch.ones(2, 7, 1)), f @ d.w_dec)
    assert_close(d.write(f * 0, torch.ones(2, 7, 1)), torch.zeros(2, 7, 12))
    leaf = f.clone().requires_grad_()
    grad = torch.autograd.grad(d.write(leaf, torch.ones(2, 7, 1)).sum(), leaf)[0]
    assert_close(grad, d.w_dec.sum(-1).expand(2, 7, -1))


def test_a_silent_token_is_no_division_by_zero() -> None:
    for norm in NORMS.values():
        assert example("relu", norm).encode(torch.zeros(1, 12)).isfinite().all()


def test_the_norm_s_gain_can_be_folded() -> None:
    """(x - bias) / gain is what the dictionary was trained on; x is what the model has."""
    d = example("jumprelu", d_out=9, skip=True)
    gain, bias = torch.rand(12) + 0.5, torch.randn(12)
    x = tokens()
    target = torch.randn(2, 7, 9)
    before = (x - bias) / gain
    folded = d.through_gain(gain, bias)
    assert_close(folded.encode(x), d.encode(before), atol=1e-4, rtol=1e-4)
    assert_close(folded.error(x, target), d.error(before, target), atol=1e-3, rtol=1e-3)
    assert not torch.allclose(d.encode(x), d.encode(before), atol=0.1)
    with pytest.raises(FailedPrecondition, match="no gain"):
        d.through_gain(torch.zeros(12), bias)
    with pytest.raises(FailedPrecondition, match="layer_norm"):
        example("relu", NORMS["layer_norm"]).through_gain(gain, bias)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_moving_it_moves_everything(activation: str) -> None:
    d = example(activation, skip=True)
    double = d.to(torch.device("cpu"), torch.float64)
    assert double.nbytes == 2 * d.nbytes == 2 * d.header.nbytes
    assert double.encode(tokens()).dtype is torch.float64
    assert double.to(torch.device("cpu")) is double


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_sparse_decoding_in_other_precisions(dtype: torch.dtype) -> None:
    d = example("topk", latents=400).to(torch.device("cpu"), dtype)
    f = d.encode(tokens())
    assert (f != 0).float().mean() < 1 / 16
    near = 1e-10 if dtype is torch.float64 else 0.3
    assert_close(d.write(f, torch.ones(2, 7, 1, dtype=dtype)), f @ d.w_dec, atol=near, rtol=0)
