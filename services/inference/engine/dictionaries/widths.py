"""What a model must offer for a dictionary to fit: layers, widths of points, the MLP's norms."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from services.common.errors import FailedPrecondition
from services.inference.engine.dictionaries.sites import Header, Point, Site


@dataclass(frozen=True)
class Widths:
    """The sizes of a model that sites depend on."""

    layers: int
    residual: int
    """d"""
    neurons: int | None
    """F; None where a layer has no neurons to read (mixture of experts)."""
    heads: int
    """Query heads times head width."""
    experts: frozenset[int] = frozenset()
    """Layers whose MLP is a mixture of experts and has no neurons."""
    parallel: bool = False
    """Whether attention and MLP read the same residual, so that there is no `resid_mid`."""
    mlp_norms: Sequence[tuple[Tensor, Tensor]] | None = None
    """Gain [d] and bias [d] of each layer's norm before the MLP; None if they are not known."""

    def check(self, header: Header) -> None:
        """Raises FailedPrecondition unless the dictionary fits, naming both numbers."""
        ends = ((header.site_in, header.d_in, "reads"), (header.site_out, header.d_out, "writes"))
        for site, width, verb in ends:
            if not 0 <= site.layer < self.layers:
                raise FailedPrecondition(
                    f"{header.id} {verb} layer {site.layer}, but the model has layers 0 to "
                    f"{self.layers - 1}"
                )
            expected = self._width(site)
            if expected is None:
                raise FailedPrecondition(
                    f"{header.id} {verb} {site}, and this model has no {site.point}"
                )
            if width != expected:
                raise FailedPrecondition(
                    f"{header.id} {verb} {width} channels at {site}, but the model's {site.point} "
                    f"is {expected} wide"
                )
        if header.is_transcoder and header.site_out.point is not Point.MLP_OUT:
            raise FailedPrecondition(
                f"{header.id} reads {header.site_in} and writes {header.site_out}, but only "
                "transcoders that write mlp_out are supported"
            )
        if header.site_out.layer != header.site_in.layer:
            raise FailedPrecondition(
                f"{header.id} reads {header.site_in} and writes {header.site_out}: another layer"
            )
        if not header.is_transcoder and header.site_in.point is Point.MLP_IN:
            raise FailedPrecondition(
                f"{header.id} reads and writes {header.site_in}, which is nothing that a layer "
                "adds to the residual stream; only transcoders read there"
            )
        if header.site_in.before_gain:
            self.mlp_norm(header)

    def fits(self, header: Header) -> bool:
        """Whether `check` finds no fault."""
        try:
            self.check(header)
        except FailedPrecondition:
            return False
        return True

    def mlp_norm(self, header: Header) -> tuple[Tensor, Tensor]:
        """Gain and bias of the norm that lies before the dictionary's input."""
        if self.mlp_norms is None:
            raise FailedPrecondition(
                f"{header.id} reads {header.site_in} before the norm's gain, which this model does "
                "not have"
            )
        return self.mlp_norms[header.site_in.layer]

    def _width(self, site: Site) -> int | None:
        match site.point:
            case Point.MLP_ACT:
                return None if site.layer in self.experts else self.neurons
            case Point.Z:
                return self.heads
            case Point.RESID_MID if self.parallel:
                return None
        return self.residual
