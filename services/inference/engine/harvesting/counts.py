"""Running counts of values by the fixed bins of `services.common.harvest.bins`."""

import torch
from torch import Tensor

from services.common.harvest import bins


class Counts:
    """Of N components, [N, BINS]."""

    def __init__(self, components: int, device: torch.device) -> None:
        self.counts = torch.zeros(components, bins.BINS, dtype=torch.long, device=device)

    def add(self, binned: Tensor, part: slice) -> None:
        """binned: the bins [..., n] of values of the components `part`, int32; overwritten."""
        components = binned.shape[-1]
        binned += torch.arange(components, dtype=torch.int32, device=binned.device) * bins.BINS
        found = torch.bincount(binned.flatten(), minlength=components * bins.BINS)
        self.counts[part] += found.view(components, bins.BINS)


def binned(values: Tensor) -> Tensor:
    """The bin of each float32, int32 of the same shape."""
    code = values.abs().view(torch.int32)
    code >>= bins.SHIFT
    code -= bins.LOWEST_CODE - 1
    code.clamp_(0, bins.PER_SIGN + 1)
    # Turns code into -1 - code where a value is not positive; a `where` takes three times as long.
    code ^= (values <= 0).int().neg_()
    return code.add_(bins.FIRST_POSITIVE)
