"""Dictionaries of the demo model that reconstruct what they read almost exactly.

A rotation and its negative, through a ReLU: relu(x) - relu(-x) = x but for a small threshold, so
there is a little error to see.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

LAYERS, WIDTH = 4, 128
THRESHOLD = 0.02


def write_dictionaries(folder: Path) -> None:
    """One for every sublayer's write, in SAELens's format."""
    for site in ("attn_out", "mlp_out"):
        for layer in range(LAYERS):
            _write(folder / f"{site}-{layer}", f"blocks.{layer}.hook_{site}", seed=layer)


def _write(folder: Path, hook: str, seed: int) -> None:
    folder.mkdir(parents=True)
    draw = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=draw)).Q
    weights = {
        "W_enc": torch.cat([rotation, -rotation], 1),
        "W_dec": torch.cat([rotation.T, -rotation.T], 0),
        "b_enc": torch.full((2 * WIDTH,), -THRESHOLD),
        "b_dec": torch.zeros(WIDTH),
    }
    save_file(
        {name: value.contiguous() for name, value in weights.items()},
        folder / "sae_weights.safetensors",
    )
    config = {
        "architecture": "standard",
        "d_in": WIDTH,
        "d_sae": 2 * WIDTH,
        "dtype": "float32",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "metadata": {"hook_name": hook},
    }
    (folder / "cfg.json").write_text(json.dumps(config))
