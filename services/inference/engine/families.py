"""Families: which models are served, and why others are not.

A family is a value of `config.model_type`. Only what the tests prove for a family is served, so the
list is explicit; everything else is refused by name, from the configuration alone, before weights
are read.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from transformers import PretrainedConfig

from services.common.errors import FailedPrecondition


@dataclass(frozen=True)
class Family:
    """Where a family keeps the norms of a block, what is peculiar to it and what is not served."""

    title: str
    variants: Mapping[str, str]
    """The shapes of it that every test runs on: a name, and what is peculiar about that shape."""
    attn_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    attn_post_norm: str | None = None
    mlp_post_norm: str | None = None
    softcaps_attention: bool = False
    """Whether its attention applies the configuration's `attn_logit_softcapping`."""
    experts: bool = False
    """Whether MLPs are mixtures of experts, so that `mlp.L` is the finest node there."""
    scales_queries: bool = False
    """Whether queries are scaled rather than scores."""
    refuses: Callable[[PretrainedConfig], str | None] = lambda config: None
    """Why a configuration of this family is not served, None where it is."""


def _bidirectional(config: PretrainedConfig) -> str | None:
    if getattr(config, "use_bidirectional_attention", False):
        return "use_bidirectional_attention: later tokens would act on earlier ones"
    return None


def _opt(config: PretrainedConfig) -> str | None:
    if not config.do_layer_norm_before:
        return (
            "do_layer_norm_before is false, as in OPT-350m: norms after each sum leave no residual "
            "stream that writes add up in"
        )
    if config.word_embed_proj_dim != config.hidden_size:
        return "word_embed_proj_dim differs from hidden_size: embeddings are projected twice"
    if config._remove_final_layer_norm:
        return "_remove_final_layer_norm: a model without a norm before the unembedding"
    return None


FAMILIES = {
    "gpt2": Family(
        "GPT-2",
        {
            "tied": "fused q/k/v, learned positions, biases, tied unembedding",
            "by layer": "scores also divided by the layer's number, unembedding of its own",
        },
        attn_norm="ln_1",
        mlp_norm="ln_2",
    ),
    "gpt_neox": Family(
        "GPT-NeoX, Pythia",
        {
            "parallel": "attention and MLP side by side; fused q/k/v interleaved by head; rotary "
            "embedding of a part of each head",
            "sequential": "the same with attention before the MLP, and no biases in attention",
        },
    ),
    "llama": Family(
        "Llama",
        {
            "grouped": "gated MLP, grouped-query attention, rotary embedding",
            "biased": "one key/value head per query head, biases, tied unembedding",
        },
    ),
    "mistral": Family(
        "Mistral", {"window": "sliding window in every layer, heads wider than their share"}
    ),
    "qwen2": Family("Qwen2", {"window": "biases on q/k/v, sliding window in some layers"}),
    "qwen3": Family("Qwen3", {"qk-norm": "norms on q and k, heads wider than their share"}),
    "gemma2": Family(
        "Gemma-2",
        {
            "softcap": "norms before and behind each sublayer with gain 1 + weight, soft caps on "
            "scores and logits, scaled embeddings, sliding window in every second layer"
        },
        softcaps_attention=True,
        mlp_norm="pre_feedforward_layernorm",
        attn_post_norm="post_attention_layernorm",
        mlp_post_norm="post_feedforward_layernorm",
        refuses=_bidirectional,
    ),
    "gemma3_text": Family(
        "Gemma-3, text",
        {
            "qk-norm": "as Gemma-2 without soft caps; norms on q and k; rotary embedding of local "
            "and of global layers"
        },
        mlp_norm="pre_feedforward_layernorm",
        attn_post_norm="post_attention_layernorm",
        mlp_post_norm="post_feedforward_layernorm",
        refuses=_bidirectional,
    ),
    "mixtral": Family(
        "Mixtral",
        {"window": "mixtures of experts in every layer, sliding window in every layer"},
        experts=True,
    ),
    "qwen3_moe": Family(
        "Qwen3, mixture of experts",
        {"mixed": "a layer without experts between two with them, norms on q and k"},
        experts=True,
    ),
    "opt": Family(
        "OPT",
        {
            "relu": "learned positions, biases, ReLU, MLP without a module of its own",
            "bare": "the same without biases, and with norms without gain and bias",
        },
        attn_norm="self_attn_layer_norm",
        mlp_norm="final_layer_norm",
        scales_queries=True,
        refuses=_opt,
    ),
}
"""By `config.model_type`."""

FEATURES = {
    "logits": "logits equal Hugging Face's eager forward, to 1e-5 of the largest",
    "layout": "every weight and captured value gives the next one: pre-activations, activations, "
    "scores, probabilities, head outputs, writes",
    "sums": "direct effects and remainder rows add up to J in every norm mode, with and without "
    "interventions",
    "magnitudes": "a write magnitude is the length of what removing the node takes from its "
    "sublayer's write, the post-norm's scale held",
    "estimates": "estimates equal central differences in float64, with just the scales held that "
    "the norm mode holds",
    "norm modes": "they change no forward value by a bit",
    "loading": "a saved folder of it loads, warms up and has the same logits",
    "ablation": "an ablated neuron, head and pair equal plain PyTorch hooks",
    "read-outs": "output tokens are the change of the logits, input tokens the gradient of the "
    "traced value",
    "latents": "at every site, before and behind post-norms, reading a dictionary changes no bit, "
    "ablating a latent equals plain PyTorch hooks, and sums close with latents in the table",
    "half precision": "in bfloat16 and float16 logits are those of Hugging Face's forward in that "
    "type, and estimates correlate with float32's",
    "visible pairs": "pairs outside causality and window are never listed and never a target",
    "batches": "rows of a padded batch with edits of their own equal single rows, gradients too",
    "points": "activations by name are what plain PyTorch hooks see; the logit lens ends at the "
    "model's logits",
    "generation": "every token over a cache, under edits of prompt and continuation, has the "
    "probabilities of a pass over the whole sequence",
    "verification": "effects of a run resumed at the first changed layer, stage and token equal a "
    "whole pass with plain PyTorch hooks",
    "integration": "integrated effects equal the sum over midpoints in Hugging Face's own pass",
    "tracing": "a traced value and its slopes at the embedding are those of Hugging Face's pass, "
    "its sums close, and a trace through a value is the pair's direct effect",
}
"""What `tests/inference/families` proves of every variant of every family, by name."""

EXPERT_FEATURES = (
    "logits",
    "sums",
    "estimates",
    "norm modes",
    "loading",
    "ablation",
    "batches",
    "verification",
    "integration",
    "tracing",
    "points",
    "generation",
    "half precision",
    "latents",
)
"""Those of them that are proved where MLPs are mixtures of experts."""

_NO_INTERFACE = ("gpt_neo", "bloom", "falcon", "mpt", "xglm")
"""Families that compute attention where transformers lets nobody in."""


def family_of(config: PretrainedConfig) -> Family:
    """Raises FailedPrecondition for a model that would only be half served. Needs no weights."""
    model_type = str(config.model_type)
    family = FAMILIES.get(model_type)
    if family is None:
        why = ""
        if model_type in _NO_INTERFACE:
            why = (
                ", because they bypass the attention interface and attention could not be read or "
                "edited"
            )
        elif model_type == "gemma3":
            why = " (their text-only checkpoints are of type 'gemma3_text')"
        raise unsupported(
            f"models of type {model_type!r} are not supported{why}; supported: "
            f"{', '.join(FAMILIES)}"
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
    rope = getattr(config, "rope_parameters", None) or {}
    if "longrope" in (rope.get("rope_type"), rope.get("type")):
        return (
            "a longrope embedding depends on the longest prompt of a batch, so one prompt would "
            "change another's numbers"
        )
    return None
