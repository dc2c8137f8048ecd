"""The committed dictionaries do what they declare, by formulas and hooks written here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo.autoencoders import sample_text

DEMO = Path(__file__).parents[2] / "demo"
FOLDER = DEMO / "dictionaries"
SITES = [(point, layer) for layer in range(4) for point in ("attn_out", "mlp_out")]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO / "model")


@pytest.fixture(scope="module")
def written(tokenizer: Any) -> dict[tuple[str, int], torch.Tensor]:
    """What each sublayer writes on the sample, [tokens, 128], by hooks on whole sublayers."""
    model = AutoModelForCausalLM.from_pretrained(DEMO / "model").eval()
    found: dict[tuple[str, int], torch.Tensor] = {}
    for layer, block in enumerate(model.transformer.h):
        for point, module in (("attn_out", block.attn), ("mlp_out", block.mlp)):

            def keep(_: Any, args: Any, output: Any, key: Any = (point, layer)) -> None:
                found[key] = (output[0] if isinstance(output, tuple) else output).flatten(0, 1)

            module.register_forward_hook(keep)
    ids = tokenizer.backend_tokenizer.encode((FOLDER / "sample.txt").read_text()).ids
    with torch.no_grad():
        model(torch.tensor(ids[: len(ids) // 128 * 128]).view(-1, 128))
    return found


def fvu_and_l0(tensors: dict[str, torch.Tensor], k: int, x: torch.Tensor) -> tuple[float, float]:
    pre = (x - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]
    least = pre.sort(dim=-1, descending=True).values[:, k - 1 : k]
    f = torch.where(pre >= least, pre.clamp_min(0), 0)
    error = x - f @ tensors["W_dec"] - tensors["b_dec"]
    variance = (x - x.mean(0)).square().sum()
    return float(error.square().sum() / variance), float((f > 0).sum() / len(x))


@pytest.mark.parametrize(("point", "layer"), SITES)
def test_a_dictionary_is_as_good_as_it_declares(
    point: str, layer: int, written: dict[tuple[str, int], torch.Tensor]
) -> None:
    folder = FOLDER / f"demo-{point}-{layer}"
    config = json.loads((folder / "cfg.json").read_text())
    metadata = config["metadata"]
    assert metadata["hook_name"] == f"blocks.{layer}.hook_{point}"
    assert config["architecture"] == "topk"
    assert config["apply_b_dec_to_input"] is True
    tensors = load_file(folder / "sae_weights.safetensors")
    fvu, l0 = fvu_and_l0(tensors, config["k"], written[point, layer])
    assert fvu == pytest.approx(metadata["fvu"], abs=0.002)
    assert l0 == pytest.approx(metadata["l0"], abs=0.05)
    assert fvu <= 0.15
    assert l0 <= 32
    lengths = tensors["W_dec"].norm(dim=-1)
    assert torch.allclose(lengths, torch.ones_like(lengths), atol=1e-4)
    other = written[point, (layer + 1) % 4]  # negative control: it belongs to its own layer
    assert fvu_and_l0(tensors, config["k"], other)[0] > 2 * fvu
    card = (DEMO / "model" / "README.md").read_text()
    assert f"| `{folder.name}` | {metadata['fvu']:.4f} | {metadata['l0']:.2f} |" in card


def test_the_sample_is_the_corpus_with_a_seed_of_its_own(tokenizer: Any) -> None:
    assert (FOLDER / "sample.txt").read_text() == sample_text(tokenizer)


def test_nothing_else_is_there_and_it_is_small() -> None:
    names = {f"demo-{point}-{layer}" for point, layer in SITES}
    assert {path.name for path in FOLDER.iterdir()} == {*names, "sample.txt"}
    files = [*FOLDER.rglob("*"), *(DEMO / "model").iterdir()]
    assert sum(path.stat().st_size for path in files if path.is_file()) < 15_000_000
