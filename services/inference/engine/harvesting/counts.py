"""Running counts of values by the fixed bins of `services.common.harvest.bins`."""

import torch
from torch import Tensor

from services.common.harvest import bins

_MOST = 2.0**bins.HIGHEST_EXPONENT
_LEAST = float(torch.nextafter(torch.tensor(2.0**bins.LOWEST_EXPONENT), torch.tensor(0.0)))
"""What lies beyond these counts as these."""


class Counts:
    """Of N components, [N, BINS]."""

    def __init__(self, components: int, device: torch.device) -> None:
        self.counts = torch.zeros(components, bins.BINS, dtype=torch.long, device=device)
        begins = torch.arange(components, dtype=torch.int32, device=device) * bins.BINS
        self._begins = begins

    def add(self, found: Tensor, part: slice) -> None:
        """found: the bins [..., n] of values of the components `part`, int32; overwritten."""
        components = found.shape[-1]
        found += self._begins[:components]
        counts = torch.bincount(found.flatten(), minlength=components * bins.BINS)
        self.counts[part] += counts.view(components, bins.BINS)

    def add_few(self, found: Tensor) -> None:
        """The same of all components [..., N], where bins are many beside values."""
        where = (found + self._begins).flatten()
        self.counts.view(-1).index_add_(0, where, torch.ones_like(where, dtype=torch.long))


def binned(values: Tensor, code: Tensor | None = None, sign: Tensor | None = None) -> Tensor:
    """The bin of each finite float32, int32 of the same shape.

    code and sign: float32 of that shape that may be written to; the result lies in `code`.
    """
    code = torch.abs(values, out=code)
    found = code.clamp_(_LEAST, _MOST).view(torch.int32)
    found >>= bins.SHIFT
    found -= bins.LOWEST_CODE - 1
    below = None if sign is None else sign.view(torch.int32)
    below = torch.le(values.view(torch.int32), 0, out=below).int()
    # Turns code into -1 - code where a value is not positive; a `where` takes three times as long.
    found ^= below.neg_()
    return found.add_(bins.FIRST_POSITIVE)
