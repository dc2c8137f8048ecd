"""Training of dictionaries: resumable, on what the sublayers really write, saved as it was."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo.autoencoders import activations, measure, name, sample_text, sites, unscaled
from demo.train_dictionaries import Settings, batch, main, new_stack, start_again, train

MODEL = Path(__file__).parents[2] / "demo" / "model"
TINY = Settings(steps=6, rows=2, latents=48, k=4, rest=2, report=2)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL).eval()


def test_activations_are_what_the_sublayers_add(model: Any, tokenizer: Any) -> None:
    """The residual stream closes: embedding and all writes are what the final norm reads."""
    rows = batch(TINY, 0, tokenizer, 32)
    read: list[torch.Tensor] = []
    hook = model.transformer.ln_f.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    x = activations(model, rows)
    hook.remove()
    embedding = model.transformer.wte(rows) + model.transformer.wpe(torch.arange(32))
    stream = embedding.flatten(0, 1) + x.sum(dim=0)
    assert torch.allclose(stream, read[0].flatten(0, 1), atol=1e-4)
    assert not torch.allclose(stream - x[0], read[0].flatten(0, 1), atol=1e-1)
    assert sites(model)[:3] == [("attn_out", 0), ("mlp_out", 0), ("attn_out", 1)]
    block = model.transformer.h[0]
    attention = block.attn(block.ln_1(embedding))[0].flatten(0, 1)
    assert torch.allclose(x[0], attention, atol=1e-4)


def test_resuming_gives_the_weights_of_an_uninterrupted_run(
    tmp_path: Path, model: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(folder: str, stop: int | None = None, seed: int = 0) -> list[torch.Tensor]:
        settings = replace(TINY, seed=seed)
        stack, _, _ = train(model, tokenizer, settings, tmp_path / folder, stop)
        return [tensor.detach().clone() for tensor in stack.parameters]

    def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
        return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

    whole = run("whole")
    early = run("half", stop=4)
    assert "resuming" not in capsys.readouterr().out
    assert same(whole, run("half"))
    assert "resuming at step 4" in capsys.readouterr().out
    assert not same(whole, early)  # negative controls
    assert not same(whole, run("other", seed=1))
    with pytest.raises(ValueError, match="made with other settings"):
        run("half", seed=1)


def test_the_scale_is_folded_into_the_weights() -> None:
    torch.manual_seed(0)
    x = 3 + torch.randn(2, 50, 16) * torch.tensor([0.2, 7.0])[:, None, None]
    scale = torch.tensor([0.2, 7.0])[:, None, None]
    stack = new_stack(x / scale, TINY)
    with torch.no_grad():
        stack.b_enc.normal_()
        f = stack.encode(x / scale, 4)
        folded = unscaled(stack, scale)
        assert torch.allclose(folded.encode(x, 4), f * scale, rtol=1e-4, atol=1e-5)
        assert torch.allclose(
            folded.decode(folded.encode(x, 4)), stack.decode(f) * scale, rtol=1e-4, atol=1e-4
        )
        assert not torch.allclose(stack.encode(x, 4), f * scale, atol=1e-2)  # negative control
    assert [q.fvu for q in measure(folded, 4, x)] == pytest.approx(
        [q.fvu for q in measure(stack, 4, x / scale)], rel=1e-3
    )


def test_an_idle_latent_starts_again_at_an_error() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 30, 16)
    stack = new_stack(x, TINY)
    optimise = torch.optim.Adam(stack.parameters, lr=0.1)
    error = x - stack.decode(stack.encode(x, 4))
    error.square().sum().backward()  # type: ignore[no-untyped-call]
    optimise.step()
    before = [tensor.detach().clone() for tensor in stack.parameters]
    idle = torch.zeros(1, TINY.latents, dtype=torch.bool)
    idle[0, [3, 7]] = True
    only = torch.zeros_like(error)
    only[0, 5] = error[0, 5].detach()  # the one token that is reconstructed badly, twice
    only[0, 6] = error[0, 6].detach()
    start_again(stack, optimise, only, idle)
    changed = (stack.w_dec.detach() != before[1]).any(dim=-1)
    assert torch.equal(changed, idle)
    for latent in (3, 7):
        cosines = torch.cosine_similarity(stack.w_dec[0, latent], only[0, 5:7], dim=-1)
        assert cosines.max() > 0.999
        assert torch.allclose(stack.w_enc[0, :, latent], stack.w_dec[0, latent])
    assert optimise.state[stack.w_enc]["exp_avg"][0, :, [3, 7]].abs().max() == 0
    assert optimise.state[stack.w_enc]["exp_avg"][0, :, 4].abs().max() > 0


def test_the_command_writes_dictionaries_and_their_figures(tmp_path: Path, tokenizer: Any) -> None:
    folder, out = tmp_path / "model", tmp_path / "dictionaries"
    shutil.copytree(MODEL, folder)
    threads = str(torch.get_num_threads())
    places = ["--model", str(folder), "--out", str(out), "--checkpoint", str(tmp_path / "ck")]
    main([*places, "--threads", threads, "--steps", "2", "--rows", "2", "--latents", "40"])
    names = [name(point, layer) for layer in range(4) for point in ("attn_out", "mlp_out")]
    assert sorted(path.name for path in out.iterdir()) == sorted([*names, "sample.txt"])
    text = (out / "sample.txt").read_text()
    assert text == sample_text(tokenizer)
    assert 4000 <= len(tokenizer.backend_tokenizer.encode(text).ids) < 4200
    config = json.loads((out / "demo-mlp_out-2" / "cfg.json").read_text())
    assert (config["architecture"], config["d_in"], config["d_sae"]) == ("topk", 128, 40)
    assert config["metadata"]["hook_name"] == "blocks.2.hook_mlp_out"
    tensors = load_file(out / "demo-mlp_out-2" / "sae_weights.safetensors")
    assert {key: tuple(value.shape) for key, value in tensors.items()} == {
        **{"W_enc": (128, 40), "W_dec": (40, 128), "b_enc": (40,), "b_dec": (128,)}
    }
    card = (folder / "README.md").read_text()
    assert "demo.train_dictionaries --steps 2 --rows 2 --latents 40" in card
    assert card.count("## Dictionaries") == card.count("## Limits") == 1
    assert all(f"| `{one}` |" in card for one in names)
