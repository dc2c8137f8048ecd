"""Memory that is written over and over: fresh pages cost more than the arithmetic on them."""

import math

import torch
from torch import Tensor


class Scratch:
    """Float32 tensors by name."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held: dict[str, Tensor] = {}

    def take(self, name: str, shape: torch.Size) -> Tensor:
        """Anything may be in it, and what was taken under that name before is written over."""
        size = math.prod(shape)
        held = self._held.get(name)
        if held is None or len(held) < size:
            held = self._held[name] = torch.empty(size, device=self._device)
        return held[:size].view(shape)
