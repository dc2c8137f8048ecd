"""The one form that every dictionary has in memory.

    x_n = norm_in(x)
    pre = (x_n - b_in) @ w_enc + b_enc
    f = activation(pre)
    recon = (f @ w_dec + b_dec) * scale + mean        what norm_in took away, where recon undoes it
    error = target - recon - x @ skip                 target is x, but for a transcoder

`w_enc` is [d_in, N] and `w_dec` [N, d_out] whatever the file had, and every option of a format that
only rescales weights is folded into them by its reader. All methods work over any leading axes,
compute in the weights' dtype and can be differentiated; the scale of norm_in is a constant in the
backward pass unless `frozen=False`.
"""

from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from services.common.errors import FailedPrecondition
from services.inference.engine.dictionaries.sites import Header

_SPARSE = 1 / 16
"""Below this fraction of active latents a gather beats the dense product on a CPU."""


class NormKind(Enum):
    NONE = "none"
    CENTRE = "centre"
    """The mean over channels is subtracted: dictionaries of models with centred weights."""
    LAYER_NORM = "layer_norm"
    """(x - mean) / (std + eps), std unbiased; undone by std without eps (OpenAI, SAELens)."""
    CONSTANT_NORM = "constant_norm"
    """x * sqrt(d_in) / |x|."""
    FACTOR = "factor"
    """x * factor."""


@dataclass(frozen=True)
class InputNorm:
    """What happens to x before it is encoded, and whether the reconstruction undoes it."""

    kind: NormKind = NormKind.NONE
    eps: float = 1e-5
    factor: float = 1.0
    undone: bool = True


@dataclass(frozen=True)
class Relu:
    pass


@dataclass(frozen=True)
class JumpRelu:
    """pre where it is positive and above the threshold, else 0."""

    threshold: Tensor
    """[N]"""


@dataclass(frozen=True)
class TopK:
    """The k largest of each token; of equals the lower index wins."""

    k: int
    signed: bool = False
    """Whether negative ones among them keep their value; otherwise they are 0."""


@dataclass(frozen=True)
class Gated:
    """With u = x_n @ w_enc: 1[u + b_gate > 0] * relu(exp(r_mag) * u + b_mag). All [N]."""

    b_gate: Tensor
    r_mag: Tensor
    b_mag: Tensor


Activation = Relu | JumpRelu | TopK | Gated


class Normalised(NamedTuple):
    x: Tensor
    """[..., d_in]: the normalised input."""
    scale: Tensor
    """[..., 1]: what recon multiplies by; 1 where it undoes nothing."""
    mean: Tensor
    """[..., 1]: what recon adds back; 0 where it undoes nothing."""


@dataclass(frozen=True, eq=False)
class Dictionary:
    """A dictionary with its weights. Latent indices are the file's."""

    header: Header
    w_enc: Tensor
    """[d_in, N]"""
    w_dec: Tensor
    """[N, d_out]"""
    b_enc: Tensor
    """[N]; zeros for Gated, whose biases are its own."""
    b_in: Tensor
    """[d_in]: subtracted after norm_in; zeros where the format subtracts nothing."""
    b_dec: Tensor
    """[d_out]"""
    activation: Activation
    norm: InputNorm
    skip: Tensor | None = None
    """[d_in, d_out], applied to x itself, not to the normalised x."""

    @property
    def id(self) -> str:
        return self.header.id

    @property
    def latents(self) -> int:
        return self.w_enc.shape[1]

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in self._tensors())

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> "Dictionary":
        """The same dictionary elsewhere; itself if it is there already."""
        dtype = dtype or self.w_enc.dtype
        if (self.w_enc.device, self.w_enc.dtype) == (device, dtype):
            return self

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, dtype)

        activation = self.activation
        if isinstance(activation, JumpRelu):
            activation = JumpRelu(move(activation.threshold))
        elif isinstance(activation, Gated):
            activation = Gated(
                move(activation.b_gate), move(activation.r_mag), move(activation.b_mag)
            )
        return replace(
            self,
            w_enc=move(self.w_enc),
            w_dec=move(self.w_dec),
            b_enc=move(self.b_enc),
            b_in=move(self.b_in),
            b_dec=move(self.b_dec),
            activation=activation,
            skip=None if self.skip is None else move(self.skip),
        )

    def laid_out(self) -> "Dictionary":
        """The same with the encoder weights of one latent side by side in memory."""
        return replace(self, w_enc=self.w_enc.T.contiguous().T)

    def through_gain(self, gain: Tensor, bias: Tensor) -> "Dictionary":
        """A dictionary that reads before the gain [d_in] and bias [d_in] of a norm, after them.

        Its site becomes `mlp_in`. Raises FailedPrecondition where that cannot be folded.
        """
        site = replace(self.header.site_in, before_gain=False)
        if self.norm.kind is not NormKind.NONE or bool((gain == 0).any()):
            reason = "a channel of the norm has no gain"
            if self.norm.kind is not NormKind.NONE:
                reason = f"it normalises its input itself ({self.norm.kind.value})"
            raise FailedPrecondition(
                f"dictionary {self.id} reads {site} before the norm's gain, which cannot be folded "
                f"into it: {reason}"
            )
        gain, bias = gain.to(self.w_enc), bias.to(self.w_enc)
        skip = None if self.skip is None else self.skip / gain[:, None]
        return replace(
            self,
            header=replace(self.header, site_in=site),
            w_enc=self.w_enc / gain[:, None],
            b_in=bias + gain * self.b_in,
            b_dec=self.b_dec if skip is None else self.b_dec - bias @ skip,
            skip=skip,
        )

    def normalise(self, x: Tensor, *, frozen: bool = True) -> Normalised:
        """norm_in(x) for x [..., d_in], with what recon needs to undo it."""
        x = x.to(self.w_enc.dtype)
        one, zero = x.new_ones(*x.shape[:-1], 1), x.new_zeros(*x.shape[:-1], 1)
        match self.norm.kind:
            case NormKind.NONE:
                return Normalised(x, one, zero)
            case NormKind.CENTRE:
                scale, mean = one, x.mean(-1, keepdim=True)
                normalised = x - mean
            case NormKind.LAYER_NORM:
                mean = x.mean(-1, keepdim=True)
                scale = x.std(-1, keepdim=True, correction=1)
                scale = scale.detach() if frozen else scale
                normalised = (x - mean) / (scale + self.norm.eps)
            case NormKind.CONSTANT_NORM:
                mean = zero
                scale = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
                scale = scale.detach() if frozen else scale
                normalised = x / scale.clamp_min(torch.finfo(x.dtype).tiny)
            case NormKind.FACTOR:
                scale, mean = one / self.norm.factor, zero
                normalised = x * self.norm.factor
        if not self.norm.undone:
            return Normalised(normalised, one, zero)
        return Normalised(normalised, scale, mean)

    def pre_activation(self, x: Tensor, *, frozen: bool = True) -> Tensor:
        """[..., d_in] -> [..., N]: what goes into the activation; of Gated the second bracket."""
        return self._traced(self._projected(self.normalise(x, frozen=frozen).x))

    def pre_activation_of(self, x: Tensor, latents: Tensor, *, frozen: bool = True) -> Tensor:
        """[..., d_in], [n] -> [..., n]: `pre_activation` of these latents alone."""
        centred = self.normalise(x, frozen=frozen).x - self.b_in
        pre = centred @ self.w_enc[:, latents]
        match self.activation:
            case Gated(_, r_mag, b_mag):
                return r_mag[latents].exp() * pre + b_mag[latents]
        return pre + self.b_enc[latents]

    def encode(self, x: Tensor, *, frozen: bool = True) -> Tensor:
        """[..., d_in] -> f [..., N]."""
        pre = self._projected(self.normalise(x, frozen=frozen).x)
        match self.activation:
            case Relu():
                return pre.relu()
            case JumpRelu(threshold):
                return torch.where(pre > threshold.clamp_min(0), pre, 0)
            case TopK(k, signed):
                return _top_k((pre if signed else pre.relu()).contiguous(), k)
            case Gated(b_gate, _, _):
                return torch.where(pre + b_gate > 0, self._traced(pre).relu(), 0)

    def encode_of(self, x: Tensor, latents: Tensor, *, frozen: bool = True) -> Tensor:
        """[..., d_in], [n] -> [..., n]: `encode` of these latents alone."""
        match self.activation:
            case TopK():  # every latent competes
                return self.encode(x, frozen=frozen)[..., latents]
            case Relu():
                return self.pre_activation_of(x, latents, frozen=frozen).relu()
            case JumpRelu(threshold):
                pre = self.pre_activation_of(x, latents, frozen=frozen)
                return pre.relu() * (pre > threshold[latents])
            case Gated(b_gate, r_mag, b_mag):
                centred = self.normalise(x, frozen=frozen).x - self.b_in
                gate = centred @ self.w_enc[:, latents]
                magnitude = r_mag[latents].exp() * gate + b_mag[latents]
                return magnitude.relu() * (gate + b_gate[latents] > 0)

    def decode(self, f: Tensor, scale: Tensor, mean: Tensor) -> Tensor:
        """f [..., N] and `normalise`'s scale and mean, [..., 1] -> recon [..., d_out]."""
        return (self._mixed(f) + self.b_dec) * scale + mean

    def write(self, f: Tensor, scale: Tensor) -> Tensor:
        """f [..., N], scale [..., 1] -> [..., d_out]: what latents write, without b_dec and mean.

        Linear in f, so an edit adds `write(f_edited - f, scale)`.
        """
        return self._mixed(f) * scale

    def bias_write(self, scale: Tensor, mean: Tensor) -> Tensor:
        """[..., 1], [..., 1] -> [..., d_out]: b_dec, and the mean that recon adds back."""
        return self.b_dec * scale + mean

    def skip_write(self, x: Tensor) -> Tensor:
        """x [..., d_in], not normalised -> [..., d_out]; zeros without a skip connection."""
        if self.skip is None:
            return x.new_zeros(*x.shape[:-1], self.w_dec.shape[1], dtype=self.w_dec.dtype)
        return x.to(self.skip.dtype) @ self.skip

    def error(self, x: Tensor, target: Tensor, f: Tensor | None = None) -> Tensor:
        """x [..., d_in], target [..., d_out] (x itself, but for a transcoder) -> [..., d_out]."""
        f = self.encode(x) if f is None else f
        _, scale, mean = self.normalise(x)
        return target.to(self.w_dec.dtype) - self.decode(f, scale, mean) - self.skip_write(x)

    def encoder_rows(self, latents: Tensor) -> Tensor:
        """[n] -> [n, d_in]: gradient of their pre-activations at the normalised input."""
        rows = self.w_enc[:, latents].T
        match self.activation:
            case Gated(_, r_mag, _):
                return rows * r_mag[latents].exp()[:, None]
        return rows

    def encoder_directions(self, x: Tensor, latents: Tensor) -> Tensor:
        """x [..., d_in], latents [n] -> [..., n, d_in]: the gradient at x, norm_in's scale frozen.

        `pre_activation_of(x) = encoder_directions(x) @ x + encoder_constants`.
        """
        rows = self.encoder_rows(latents)
        divisor = self.normalise(x).scale if self.norm.undone else self._scale(x)
        match self.norm.kind:
            case NormKind.CENTRE:
                rows = rows - rows.mean(-1, keepdim=True)
            case NormKind.LAYER_NORM:
                rows = rows - rows.mean(-1, keepdim=True)
                divisor = divisor + self.norm.eps
        return rows / divisor[..., None]

    def encoder_constants(self, latents: Tensor) -> Tensor:
        """[n] -> [n]: what pre-activations hold that does not depend on x (b_enc and b_in)."""
        match self.activation:
            case Gated(_, _, b_mag):
                own = b_mag[latents]
            case _:
                own = self.b_enc[latents]
        return own - self.encoder_rows(latents) @ self.b_in

    def _scale(self, x: Tensor) -> Tensor:
        return replace(self, norm=replace(self.norm, undone=True)).normalise(x).scale

    def _projected(self, normalised: Tensor) -> Tensor:
        centred = (normalised - self.b_in).reshape(-1, normalised.shape[-1])
        # A third faster on a CPU than the product the other way round, where latents lie in rows.
        projected = (self.w_enc.T @ centred.T).T + self.b_enc
        return projected.reshape(*normalised.shape[:-1], -1)

    def _traced(self, projected: Tensor) -> Tensor:
        match self.activation:
            case Gated(_, r_mag, b_mag):
                return r_mag.exp() * projected + b_mag
        return projected

    def _mixed(self, f: Tensor) -> Tensor:
        """f @ w_dec, touching the rows of active latents only where that is faster."""
        graph = torch.is_grad_enabled() and f.requires_grad
        if graph or f.device.type != "cpu" or not f.numel():
            return f @ self.w_dec
        flat = f.reshape(-1, f.shape[-1])
        token, latent = flat.nonzero(as_tuple=True)
        if len(latent) > _SPARSE * flat.numel():
            return f @ self.w_dec
        counts = torch.bincount(token, minlength=len(flat))
        starts = counts.cumsum(0) - counts
        mixed = F.embedding_bag(
            latent, self.w_dec, starts, mode="sum", per_sample_weights=flat[token, latent]
        )
        return mixed.reshape(*f.shape[:-1], -1)

    def _tensors(self) -> list[Tensor]:
        tensors = [self.w_enc, self.w_dec, self.b_enc, self.b_in, self.b_dec]
        match self.activation:
            case JumpRelu(threshold):
                tensors.append(threshold)
            case Gated(b_gate, r_mag, b_mag):
                tensors += [b_gate, r_mag, b_mag]
        return tensors if self.skip is None else [*tensors, self.skip]


def _top_k(values: Tensor, k: int) -> Tensor:
    """Keeps the k largest entries of the last axis, the lowest indices among equals, else 0."""
    best = values.topk(k, dim=-1)
    last = best.values[..., -1:].detach()
    # Which of several zeros is kept makes no difference; any other tie at the edge does.
    tied = ((values >= last).sum(-1, keepdim=True) > k) & (last != 0)
    if not bool(tied.any()):
        return torch.zeros_like(values).scatter(-1, best.indices, best.values)
    above = values > last
    level = values == last
    room = k - above.sum(-1, keepdim=True)
    return torch.where(above | (level & (level.cumsum(-1) <= room)), values, 0)
