"""One row of a pass, as objectives read it: residual points, logits and sublayers of one run."""

from dataclasses import dataclass

from torch import Tensor

from services.common.addresses import Address, Kind
from services.inference.engine.architecture import Architecture, Layer
from services.inference.engine.captured import AttentionSite, Pass
from services.inference.engine.direct_path import DirectPath
from services.inference.engine.interventions import Edit


@dataclass(frozen=True)
class RunView:
    """A run, captured as row `row` of a batch. Tensors are of the graph unless said otherwise."""

    architecture: Architecture
    captured: Pass
    row: int

    @property
    def tokens(self) -> int:
        """How many tokens the run has; what lies behind them in the batch is padding."""
        return len(self.captured.rows[self.row].token_ids)

    @property
    def edits(self) -> tuple[Edit, ...]:
        """As they were applied."""
        return self.captured.applied(self.row)

    def logits(self, position: int) -> Tensor:
        """[V] at a position that the pass was asked for."""
        return self.captured.logits[self.row, self.captured.logits_at(self.row).index(position)]

    def residual(self, point: Address) -> Tensor:
        """[B, T, d]: the captured residual stream of the whole batch at a point, after edits."""
        match point.kind, point.layer:
            case Kind.EMBED, None:
                return self.captured.embed
            case Kind.RESID_MID, int(layer):
                return self.captured.middles[layer]
            case Kind.RESID_POST, int(layer):
                return self.captured.resid_post(layer)
        raise ValueError(f"{point} is no point of the residual stream")

    def post_norm_scale(self, sublayer: Kind, layer: int) -> Tensor | None:
        """[T, 1], detached: scale of the norm behind `attn` or `mlp`, None where there is none."""
        captured = self.captured
        scales = captured.attn_scale if sublayer is Kind.ATTN else captured.mlp_scale
        scale = scales[layer]
        return None if scale is None else scale[self.row, : self.tokens]

    def layer(self, index: int) -> Layer:
        return self.architecture.layers[index]

    def attention(self, index: int) -> AttentionSite:
        return self.captured.attention[index]


def read_by_attention(layer: int) -> Address:
    """The residual stream that a layer's attention reads, before its norm."""
    return Address(Kind.RESID_POST, layer - 1) if layer else Address(Kind.EMBED)


def read_by_mlp(layer: int, *, parallel: bool) -> Address:
    """The residual stream that a layer's MLP reads, before its norm."""
    return read_by_attention(layer) if parallel else Address(Kind.RESID_MID, layer)


def last_point(layers: int) -> Address:
    """The residual stream that the final norm reads."""
    return Address(Kind.RESID_POST, layers - 1)


def is_upstream(sublayer: Kind, layer: int, point: Address) -> bool:
    """Whether what `attn.layer` or `mlp.layer` writes is part of a point of the residual stream.

    In a parallel block there is no `resid_mid`, and both are part of `resid_post` only.
    """
    if point.layer is None or point.layer < layer:
        return False
    if point.layer > layer or point.kind is Kind.RESID_POST:
        return True
    return sublayer is Kind.ATTN


def before_post_norm(run: RunView, path: DirectPath, sublayer: Kind, layer: int) -> Tensor:
    """[T, d]: the gradient that a sublayer's writes meet before the norm behind it, if any.

    The gain of that norm is part of the write weights; what is left of it is its scale.
    """
    met = (path.attention if sublayer is Kind.ATTN else path.mlp)[layer]
    scale = run.post_norm_scale(sublayer, layer)
    return met if scale is None else met / scale
