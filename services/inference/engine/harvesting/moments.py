"""Running mean, central sums and extremes of every component.

Each sequence is summed by itself around its own mean, in float32, and joined to what went before in
float64: a mean far from 0 costs no digits, and the result does not depend on what shares a batch.
Where float32 cannot hold the fourth power, float64 is used from the start.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from services.inference.engine.harvesting.scratch import Scratch
from services.inference.engine.numerics import precise

_LARGE, _SMALL = 1e8, 1e-7
"""Fourth powers of values up to the one, and of spreads down to the other, fit into float32."""


class Sums:
    """Of a batch of sequences, over the places of each, [B, n]."""

    def __init__(self, batch: int, components: int, device: torch.device) -> None:
        self.smallest, self.largest, self.about, *self.powers = torch.empty(
            7, batch, components, device=device
        ).unbind()
        """powers: sums of the powers 1..4 of what differs from `about`, about the mean."""

    def add(self, values: Tensor, part: slice, scratch: Scratch) -> None:
        """values: [B, P, m] of the components `part`; `are_finite` says whether these are."""
        smallest = torch.amin(values, 1, out=self.smallest[:, part])
        largest = torch.amax(values, 1, out=self.largest[:, part])
        ends = float(smallest.amin()), float(largest.amax())
        self.are_finite = all(map(math.isfinite, ends))
        power, square = (scratch.take(name, values.shape) for name in ("power", "square"))
        _central(
            values, self.about[:, part], [each[:, part] for each in self.powers], power, square
        )


class Moments:
    """Of N components."""

    def __init__(self, components: int, device: torch.device) -> None:
        zeros = precise(torch.zeros(components, device=device))
        self.count = 0
        self.mean, self.m2, self.m3, self.m4 = (zeros.clone() for _ in range(4))
        self.smallest = torch.full((components,), torch.inf, device=device)
        self.largest = -self.smallest

    def add(self, values: Tensor, sums: Sums, part: slice) -> None:
        """values: [B, P, n] of the components `part`; sums: theirs."""
        places = values.shape[1]
        central = _corrected(places, sums.about, *sums.powers)
        top, bottom = sums.largest.amax(0), sums.smallest.amin(0)
        extreme = torch.maximum(top.abs(), bottom.abs()) > _LARGE
        spread = top - bottom
        extreme |= (spread > 0) & (spread < _SMALL)
        if bool(extreme.any()):
            exact = _exact(precise(values[..., extreme]))
            for each, better in zip(central, exact, strict=True):
                each[:, extreme.to(each.device)] = better
        self._join(central, places, part)
        self.smallest[part] = torch.minimum(self.smallest[part], bottom)
        self.largest[part] = torch.maximum(self.largest[part], top)

    def advance(self, sequences: int, places: int) -> None:
        """Counts a batch whose parts were all added."""
        self.count += sequences * places

    def _join(self, central: Sequence[Tensor], places: int, part: slice) -> None:
        """Joins central sums [B, n] of sequences to the running ones, as one union."""
        mean0, m2, m3, m4 = (each[part] for each in (self.mean, self.m2, self.m3, self.m4))
        means, *theirs = central
        count = self.count + len(means) * places
        off = means - mean0
        shift = off.sum(0) * (places / count)
        ours = _moved(self.count, -shift, m2, m3, m4)
        moved = _moved(places, off - shift, *theirs)
        self.mean[part] = mean0 + shift
        for running, one, other in zip((self.m2, self.m3, self.m4), ours, moved, strict=True):
            running[part] = one + other.sum(0)


def _central(
    values: Tensor, about: Tensor, powers: Sequence[Tensor], power: Tensor, square: Tensor
) -> None:
    """Writes means and sums of powers of values [B, P, n]; power and square are overwritten."""
    torch.mean(values, 1, out=about)
    torch.sub(values, about[:, None], out=power)
    torch.mul(power, power, out=square)
    torch.sum(power, 1, out=powers[0])
    torch.sum(square, 1, out=powers[1])
    torch.sum(power.mul_(square), 1, out=powers[2])
    torch.sum(square.mul_(square), 1, out=powers[3])


def _exact(values: Tensor) -> tuple[Tensor, ...]:
    """[B, P, n] -> mean and central sums, [B, n], worked out in float64 alone."""
    about, *powers = (values.new_empty(len(values), values.shape[2]) for _ in range(5))
    _central(values, about, powers, torch.empty_like(values), torch.empty_like(values))
    return _corrected(values.shape[1], about, *powers)


def _corrected(places: int, about: Tensor, *powers: Tensor) -> tuple[Tensor, ...]:
    """Mean and central sums in float64. `about` was rounded: sums are moved to the true mean."""
    s1, s2, s3, s4 = map(precise, powers)
    off = s1 / places
    off2 = off * off
    m2 = s2 - places * off2
    m3 = s3 - off * (3 * s2 - 2 * places * off2)
    m4 = s4 - 4 * off * s3 + off2 * (6 * s2 - 3 * places * off2)
    return precise(about) + off, m2.clamp_min_(0), m3, m4.clamp_min_(0)


def _moved(count: int, off: Tensor, m2: Tensor, m3: Tensor, m4: Tensor) -> tuple[Tensor, ...]:
    """Central sums of `count` values, about what lies `off` below their mean."""
    around = count * off * off
    return m2 + around, m3 + off * (3 * m2 + around), m4 + off * (4 * m3 + off * (6 * m2 + around))
