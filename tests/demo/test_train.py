"""A run that was interrupted ends with the weights of one that was not."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo.train import Settings, batch, main, rate, train

MODEL = Path(__file__).parents[2] / "demo" / "model"
TINY = Settings(
    steps=6, tokens=128, short=16, context=64, layers=1, heads=2, width=16, report=2, prompts=12
)


def folder(path: Path) -> Path:
    """A checkpoint folder that has its tokenizer already: training one takes seconds."""
    path.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, path / name)
    return path


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def test_resuming_gives_the_weights_of_an_uninterrupted_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = weights(train(TINY, folder(tmp_path / "whole"))[0])
    half = folder(tmp_path / "half")
    early = weights(train(TINY, half, stop=3)[0])
    assert "resuming" not in capsys.readouterr().out
    resumed = weights(train(TINY, half)[0])
    assert "resuming at step 3" in capsys.readouterr().out
    assert same(whole, resumed)
    assert not same(early, resumed)  # negative control: three more steps do change the weights
    other = weights(train(replace(TINY, seed=1), folder(tmp_path / "other"))[0])
    assert not same(whole, other)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    checkpoint = folder(tmp_path / "checkpoint")
    train(TINY, checkpoint, stop=1)
    with pytest.raises(ValueError, match="made with other settings"):
        train(replace(TINY, peak=1e-3), checkpoint)


def test_the_command_writes_a_model_that_loads(tmp_path: Path) -> None:
    out, checkpoint = tmp_path / "model", folder(tmp_path / "checkpoint")
    threads = str(torch.get_num_threads())
    flags = ["--steps", "2", "--tokens", "256", "--report", "2", "--prompts", "12"]
    places = ["--out", str(out), "--checkpoint", str(checkpoint), "--threads", threads]
    main([*places, *flags])
    assert sorted(path.name for path in out.iterdir()) == [
        *("README.md", "behaviours.json", "config.json", "generation_config.json"),
        *("model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    ]
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert model.config.vocab_size == len(tokenizer)
    assert len(json.loads((out / "behaviours.json").read_text())) == 6
    assert "--steps 2 --tokens 256" in (out / "README.md").read_text()


def test_rows_depend_on_seed_and_step_alone() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    assert torch.equal(batch(TINY, 1, tokenizer), batch(TINY, 1, tokenizer))
    assert not torch.equal(batch(TINY, 1, tokenizer), batch(TINY, 2, tokenizer))
    assert batch(TINY, 2, tokenizer).shape == (8, 16)
    assert batch(TINY, 3, tokenizer).shape == (2, 64)
    end = tokenizer.eos_token_id
    assert [row[0] == end for row in islice(batch(TINY, 1, tokenizer).tolist(), 4)] == [
        *(False, True, False, True)
    ]


def test_the_learning_rate_rises_and_falls() -> None:
    usual = Settings()
    rates = [rate(usual, step) for step in range(usual.steps)]
    assert max(rates) == rates[usual.warmup] == usual.peak
    assert rates[0] < rates[1] < usual.peak
    assert rates[usual.steps // 2] == usual.peak
    assert rates[-1] == pytest.approx(usual.peak / 50)
