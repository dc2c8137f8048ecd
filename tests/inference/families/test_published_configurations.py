"""Configurations in the form that checkpoints were published in, sizes shrunk, load as meant."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from services.inference.engine.loading import load
from services.inference.engine.model import Model

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
GEMMA = {
    "num_key_value_heads": 1,
    "head_dim": 16,
    "hidden_activation": "gelu_pytorch_tanh",
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "cache_implementation": "hybrid",
}
ROPE = {"rope_theta": 1000000.0, "rope_scaling": None, "num_key_value_heads": 2}

# Name: what differs, and windows, embedding scale, scaling of scores.
PUBLISHED: dict[str, tuple[dict[str, Any], tuple[Any, ...], float, float]] = {
    "pythia": (
        {"model_type": "gpt_neox", "rotary_emb_base": 10000, "rotary_pct": 0.25},
        (None, None),
        1.0,
        8**-0.5,
    ),
    "opt-125m": (
        {
            "model_type": "opt",
            "ffn_dim": 48,
            "word_embed_proj_dim": 32,
            "do_layer_norm_before": True,
            "prefix": "</s>",
            "pad_token_id": 1,
        },
        (None, None),
        1.0,
        1.0,
    ),
    "gemma-2-2b": (
        {**GEMMA, "model_type": "gemma2", "sliding_window": 4096, "rope_theta": 10000.0},
        (4096, None),
        32**0.5,
        1 / 16,
    ),
    "gemma-3-1b": (
        {
            **GEMMA,
            "model_type": "gemma3_text",
            "num_hidden_layers": 7,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
            "rope_local_base_freq": 10000,
            "rope_theta": 1000000,
        },
        (512, 512, 512, 512, 512, None, 512),
        32**0.5,
        1 / 16,
    ),
    "mistral-7b-v0.1": (
        {**ROPE, "model_type": "mistral", "sliding_window": 4096},
        (4096, 4096),
        1.0,
        8**-0.5,
    ),
    "mistral-7b-v0.3": (
        {**ROPE, "model_type": "mistral", "sliding_window": None},
        (None, None),
        1.0,
        8**-0.5,
    ),
    "qwen2.5-0.5b": (
        {
            **ROPE,
            "model_type": "qwen2",
            "use_sliding_window": False,
            "sliding_window": 32768,
            "max_window_layers": 24,
            "tie_word_embeddings": True,
        },
        (None, None),
        1.0,
        8**-0.5,
    ),
    "qwen3-0.6b": (
        {**ROPE, "model_type": "qwen3", "head_dim": 16, "sliding_window": None},
        (None, None),
        1.0,
        16**-0.5,
    ),
    "llama-3.2-1b": (
        {
            **ROPE,
            "model_type": "llama",
            "rope_scaling": {
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
        },
        (None, None),
        1.0,
        8**-0.5,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_load_as_they_are_meant(name: str, tmp_path: Path) -> None:
    changes, windows, embed_scale, scaling = PUBLISHED[name]
    text = json.dumps({**SIZES, **changes})
    (tmp_path / "config.json").write_text(text)
    config = AutoConfig.from_pretrained(tmp_path)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    model = Model(load(name, str(tmp_path), None, torch.device("cpu"), torch.float32))
    model.warm_up()
    architecture = model.architecture
    assert architecture.shape.windows == windows
    assert architecture.embed_scale == pytest.approx(embed_scale)
    assert architecture.layers[0].scaling == pytest.approx(scaling)
    assert model.dtype is torch.float32
    gemma2 = name == "gemma-2-2b"
    assert (architecture.logit_softcap, architecture.layers[0].attn_softcap) == (
        (30.0, 50.0) if gemma2 else (None, None)
    )
