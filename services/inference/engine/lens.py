"""The logit lens: what the residual stream at a point would predict if the model ended there.

The final norm with its real scale at that token, then the unembedding with the model's own bias and
soft cap. At the last point that is the model's own prediction.
"""

import torch.nn.functional as F
from torch import Tensor

from services.inference.engine.architecture import Architecture
from services.inference.engine.points import Point


def lens_logits(architecture: Architecture, residual: Tensor) -> Tensor:
    """Residuals [B, T, d] -> logits [B, T, V]."""
    normed = architecture.final_norm.module(residual)
    logits = F.linear(normed, architecture.w_u, architecture.unembed_bias)
    cap = architecture.logit_softcap
    return logits if cap is None else (logits / cap).tanh() * cap


def default_points(architecture: Architecture) -> tuple[Point, ...]:
    """`embed` and the residual stream after every layer."""
    layers = range(len(architecture.layers))
    return Point("embed"), *(Point("resid_post", layer) for layer in layers)
