"""Running mean, central sums and extremes of every component.

Each sequence is summed by itself around its own mean, in float32, and joined to what went before in
float64: a mean far from 0 costs no digits, and the result does not depend on what shares a batch.
Where float32 cannot hold the fourth power, float64 is used from the start.
"""

import torch
from torch import Tensor

from services.inference.engine.numerics import precise

_LARGE, _SMALL = 1e8, 1e-7
"""Fourth powers of values up to the one, and of spreads down to the other, fit into float32."""


class Moments:
    """Of N components."""

    def __init__(self, components: int, device: torch.device) -> None:
        zeros = precise(torch.zeros(components, device=device))
        self.count = 0
        self.mean, self.m2, self.m3, self.m4 = (zeros.clone() for _ in range(4))
        self.smallest = torch.full((components,), torch.inf, device=device)
        self.largest = -self.smallest

    def add(self, values: Tensor, largest: Tensor, smallest: Tensor, part: slice) -> None:
        """values: [B, P, n] of the components `part`; largest, smallest: over places, [B, n]."""
        sums = _central(values)
        top, bottom = largest.amax(0), smallest.amin(0)
        extreme = torch.maximum(top.abs(), bottom.abs()) > _LARGE
        spread = top - bottom
        extreme |= (spread > 0) & (spread < _SMALL)
        if bool(extreme.any()):
            exact = _central(precise(values[..., extreme]))
            for each, better in zip(sums, exact, strict=True):
                each[:, extreme.to(each.device)] = better
        self._join(sums, values.shape[1], part)
        self.smallest[part] = torch.minimum(self.smallest[part], bottom)
        self.largest[part] = torch.maximum(self.largest[part], top)

    def advance(self, sequences: int, places: int) -> None:
        """Counts a batch whose parts were all added."""
        self.count += sequences * places

    def _join(self, sums: tuple[Tensor, ...], places: int, part: slice) -> None:
        """Joins central sums [B, n] of sequences to the running ones, as one union."""
        before = [each[part][None] for each in (self.mean, self.m2, self.m3, self.m4)]
        mean_of, m2_of, m3_of, m4_of = (
            torch.cat((old, new)) for old, new in zip(before, sums, strict=True)
        )
        count = mean_of.new_full((len(mean_of), 1), places)
        count[0] = self.count
        mean = (mean_of * (count / count.sum())).sum(0)
        off = mean_of - mean
        off2 = off * off
        self.mean[part] = mean
        self.m2[part] = (m2_of + count * off2).sum(0)
        self.m3[part] = (m3_of + off * (3 * m2_of + count * off2)).sum(0)
        self.m4[part] = (m4_of + off * (4 * m3_of + off * (6 * m2_of + count * off2))).sum(0)


def _central(values: Tensor) -> tuple[Tensor, ...]:
    """[B, P, n] -> mean and sums of the powers 2, 3, 4 of what differs from it, [B, n] float64."""
    places = values.shape[1]
    about = values.mean(1)
    power = values - about[:, None]
    square = power * power
    s1, s2 = precise(power.sum(1)), precise(square.sum(1))
    s3 = precise(power.mul_(square).sum(1))
    s4 = precise(square.mul_(square).sum(1))
    # `about` was rounded: these are the sums around the true mean.
    off = s1 / places
    m2 = s2 - places * off**2
    m3 = s3 - 3 * off * s2 + 2 * places * off**3
    m4 = s4 - 4 * off * s3 + 6 * off**2 * s2 - 3 * places * off**4
    return precise(about) + off, m2.clamp_min(0), m3, m4.clamp_min(0)
