"""Families: which models are served, and why others are not.

A family is a value of `config.model_type`. Only what the tests prove for a family is served, so the
list is explicit; everything else is refused by name, from the configuration alone, before weights
are read.
"""

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PretrainedConfig

from services.common.errors import FailedPrecondition


@dataclass(frozen=True)
class Family:
    """Where a family keeps the norms of a block, and what of it is not served."""

    title: str
    attn_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    attn_post_norm: str | None = None
    mlp_post_norm: str | None = None
    refuses: Callable[[PretrainedConfig], str | None] = lambda config: None
    """Why a configuration of this family is not served, None where it is."""


FAMILIES = {
    "gpt2": Family("GPT-2", attn_norm="ln_1", mlp_norm="ln_2"),
    "llama": Family("Llama"),
}
"""By `config.model_type`."""


def family_of(config: PretrainedConfig) -> Family:
    """Raises FailedPrecondition for a model that would only be half served. Needs no weights."""
    model_type = str(config.model_type)
    family = FAMILIES.get(model_type)
    if family is None:
        raise unsupported(
            f"models of type {model_type!r} are not supported; supported: {', '.join(FAMILIES)}"
        )
    reason = _refusal(config) or family.refuses(config)
    if reason is not None:
        raise unsupported(reason)
    return family


def unsupported(reason: str) -> FailedPrecondition:
    """The refusal of a model, with the reason as a sentence."""
    return FailedPrecondition(reason, reason="UNSUPPORTED_ARCHITECTURE")


def _refusal(config: PretrainedConfig) -> str | None:
    if getattr(config, "reorder_and_upcast_attn", False):
        return (
            "reorder_and_upcast_attn bypasses the attention interface, so attention could not be "
            "read or edited; set it to false in the model's config.json"
        )
    if getattr(config, "add_cross_attention", False):
        return "models with cross-attention are not supported: they read a second prompt"
    return None
