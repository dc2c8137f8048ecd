"""Opening files as the service does, and comparing with a formula."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.testing import assert_close

from services.common.settings import DictionarySource
from services.inference.engine.dictionaries.dictionary import Dictionary
from services.inference.engine.dictionaries.sources import Registered, open_dictionaries
from services.inference.engine.dictionaries.widths import Widths

D, HEADS, F, N = 12, 16, 20, 30
WIDTHS = Widths(layers=6, residual=D, neurons=F, heads=HEADS)


def opened(
    uri: Path | str, name: str = "mine", widths: Widths = WIDTHS, unchecked: bool = False
) -> list[Registered]:
    return open_dictionaries([DictionarySource(name, str(uri), unchecked)], widths)


def one(uri: Path | str, widths: Widths = WIDTHS) -> Dictionary:
    (registered,) = opened(uri, widths=widths)
    return registered.load()


def tokens(width: int = D, seed: int = 5) -> Tensor:
    return torch.randn(40, width, generator=torch.Generator().manual_seed(seed)) * 1.5 + 0.4


def drawn(seed: int = 1) -> "Drawing":
    return Drawing(seed)


def save_npz(path: Path, arrays: dict[str, Any]) -> None:
    np.savez(path, allow_pickle=True, **{k: np.asarray(v) for k, v in arrays.items()})


class Drawing:
    """Random tensors, each call another."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator)


def agrees(d: Dictionary, x: Tensor, f: Tensor, recon: Tensor) -> bool:
    """Whether latents and reconstruction (skip included) are these to 1e-5 of their largest."""
    mine = d.encode(x)
    _, scale, mean = d.normalise(x)
    both = ((mine, f), (d.decode(mine, scale, mean) + d.skip_write(x), recon))
    return all(float((a - b).abs().max()) <= 1e-5 * float(b.abs().max()) for a, b in both)


def check(d: Dictionary, x: Tensor, f: Tensor, recon: Tensor) -> None:
    """The same as an assertion, and that the example is not trivial."""
    assert 0 < (f != 0).float().mean() < 1
    assert agrees(d, x, f, recon)
    assert_close(d.error(x, recon), torch.zeros_like(recon), atol=1e-4, rtol=0)
