"""Attention through the registries of transformers: patterns captured and edited in place.

One implementation under a private key calls the model file's own `eager_attention_forward`, so
fused projections, QK-norm, rotary embedding and scaling are as the model has them. It is entered in
both registries: without the mask entry transformers passes no mask and attention becomes
bidirectional, silently. The probabilities handed to the pass are the very tensor that the values
are summed with, so gradients and edits are of the same object; where a row of the batch is edited,
its sum is taken again with the edited probabilities.
"""

import sys
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

IMPLEMENTATION = "tdb_captured"


class AttentionTap(Protocol):
    """What a layer's attention reports to: returns the outputs [B, T, H, dh] to go on with."""

    def attention(self, value: Tensor, output: Tensor, probabilities: Tensor) -> Tensor: ...


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
    output, probabilities = eager(module, query, key, value, attention_mask, **kwargs)
    listener = _taps.get(module)
    if listener is not None:
        output = listener.attention(value, output, probabilities)
    return output, probabilities


AttentionInterface.register(IMPLEMENTATION, _captured_attention)
AttentionMaskInterface.register(IMPLEMENTATION, eager_mask)
