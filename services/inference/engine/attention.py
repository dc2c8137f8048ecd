"""Attention through the registries of transformers: patterns captured and edited in place.

One implementation under a private key calls the model file's own `eager_attention_forward`, so
fused projections, QK-norm, rotary embedding and scaling are as the model has them. It is entered in
both registries: without the mask entry transformers passes no mask and attention becomes
bidirectional, silently. The probabilities handed to the pass are the very tensor that the values
are summed with, so gradients and edits are of the same object; where a row of the batch is edited,
its sum is taken again with the edited probabilities. Masked pairs go into the additive mask.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

IMPLEMENTATION = "tdb_captured"


class AttentionTap(Protocol):
    """What a layer's attention reports to. Shapes: q [B, H, T, dh], k and v [B, Hk, T, dh]."""

    def inputs(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v to go on with; k and v may come back per query head [B, H, T, dh]."""

    def mask(self, mask: Tensor) -> Tensor:
        """Additive mask [B or 1, 1, T, T] to go on with; may come back per head [B, H, T, T]."""

    def outputs(
        self, value: Tensor, output: Tensor, probabilities: Tensor, unmasked: Tensor | None
    ) -> Tensor:
        """Output [B, T, H, dh] to go on with, of probabilities [B, H, T, T].

        `unmasked` are the probabilities under the model's own mask, where `mask` changed it.
        """


_taps: WeakKeyDictionary[nn.Module, AttentionTap] = WeakKeyDictionary()


def tap(module: nn.Module, listener: AttentionTap) -> None:
    """Sends what the attention module computes through `listener`."""
    _taps[module] = listener


def _captured_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    eager = sys.modules[type(module).__module__].eager_attention_forward
    listener = _taps.get(module)
    if listener is None:
        untouched: tuple[Tensor, Tensor] = eager(
            module, query, key, value, attention_mask, **kwargs
        )
        return untouched
    assert attention_mask is not None
    heads = key.shape[1]
    query, key, value = listener.inputs(query, key, value)
    mask = listener.mask(attention_mask)
    unmasked = None
    with _one_head_per_group(module) if key.shape[1] != heads else nullcontext():
        output, probabilities = eager(module, query, key, value, mask, **kwargs)
        if mask is not attention_mask:
            with torch.no_grad():
                _, unmasked = eager(module, query, key, value, attention_mask, **kwargs)
    return listener.outputs(value, output, probabilities, unmasked), probabilities


@contextmanager
def _one_head_per_group(module: nn.Module) -> Iterator[None]:
    """While keys and values are spread over the query heads, the model must not repeat them."""
    groups = module.num_key_value_groups
    setattr(module, "num_key_value_groups", 1)  # noqa: B010  # nn.Module types it as a tensor
    try:
        yield
    finally:
        module.num_key_value_groups = groups


AttentionInterface.register(IMPLEMENTATION, _captured_attention)
AttentionMaskInterface.register(IMPLEMENTATION, eager_mask)
