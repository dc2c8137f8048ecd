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

from demo.train import (
    FACTS,
    Settings,
    batch,
    decided,
    loss_of,
    main,
    new_model,
    rate,
    recalled,
    train,
)

MODEL = Path(__file__).parents[2] / "demo" / "model"
TINY = Settings(
    lists=2,
    rows=8,
    steps=6,
    tokens=128,
    short=16,
    full=4,
    context=64,
    layers=2,
    heads=4,
    width=32,
    copying=1,
    report=2,
    prompts=12,
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
    flags = ["--lists", "1", "--steps", "2", "--tokens", "256", "--prompts", "12"]
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
    assert "--lists 1 --steps 2 --tokens 256" in (out / "README.md").read_text()


def test_rows_depend_on_seed_and_step_alone() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    for step, shape in ((3, (8, 16)), (4, (2, 64))):
        one = batch(TINY, step, tokenizer)
        assert torch.equal(one.tokens, batch(TINY, step, tokenizer).tokens)
        assert one.tokens.shape == one.positions.shape == one.weights.shape == shape
    for step in (1, 3):
        one, other = (batch(replace(TINY, seed=seed), step, tokenizer) for seed in (0, 1))
        assert one.tokens.shape != other.tokens.shape or not torch.equal(one.tokens, other.tokens)
    end = tokenizer.eos_token_id
    assert [row[0] == end for row in islice(batch(TINY, 2, tokenizer).tokens.tolist(), 4)] == [
        *(False, True, False, True)
    ]


def test_lists_count_only_what_was_said_before() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    read = batch(TINY, 0, tokenizer)
    counted = read.weights > 0
    assert torch.equal(counted, recalled(read.tokens, tokenizer, FACTS))
    assert set(counted.sum(dim=1).tolist()) == {2}  # two entries a list, each said twice
    words = {tokenizer.decode([token]).strip() for token in read.tokens[counted].tolist()}
    assert words <= FACTS
    starts = read.positions[:, 0]
    assert len(set(starts.tolist())) > 1
    assert torch.equal(
        read.positions - starts[:, None], torch.arange(read.tokens.shape[1]).expand_as(read.tokens)
    )
    assert read.positions.max() < TINY.context


def test_a_new_document_forgets_what_was_said() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    end = tokenizer.eos_token
    tokens = tokenizer(f"Mary Hill saw Ben Hill. Mary was old.{end}Mary Hill.").input_ids
    assert tokens.count(tokenizer.eos_token_id) == 1
    rows = torch.tensor([tokens])
    assert recalled(rows, tokenizer, FACTS)[0].nonzero().flatten().tolist() == [4]
    assert decided(rows, tokenizer)[0].nonzero().flatten().tolist() == [6, 7]


def test_the_loss_is_the_weighted_mean_of_what_the_model_says() -> None:
    """Against the loss written out from the model's own logits."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = new_model(TINY, tokenizer)
    read = batch(TINY, 4, tokenizer)
    with torch.no_grad():
        logs = model(read.tokens, position_ids=read.positions).logits.log_softmax(-1)
        stated = loss_of(model, read)
    said = logs[:, :-1].gather(-1, read.tokens[:, 1:, None])[..., 0]
    weights = read.weights[:, 1:]
    assert set(weights.flatten().tolist()) == {1.0, TINY.emphasis, TINY.full_emphasis}
    assert stated == pytest.approx(float(-(said * weights).sum() / weights.sum()), rel=1e-5)
    assert stated != pytest.approx(float(-said.mean()), rel=1e-5)


def test_the_first_heads_read_the_token_before_from_the_start() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = new_model(Settings(), tokenizer)
    model.set_attn_implementation("eager")
    tokens = torch.randint(1, len(tokenizer), (1, 30), generator=torch.manual_seed(0))
    with torch.no_grad():
        first = model(tokens, output_attentions=True).attentions[0][0]
    before = first.diagonal(-1, dim1=1, dim2=2)
    planted = Settings().copying
    assert before[:planted].min() > 0.9
    assert before[planted:].mean() < 0.2  # negative control: the others do not


def test_the_learning_rate_rises_and_falls() -> None:
    usual = Settings()
    rates = [rate(usual, step) for step in range(usual.steps)]
    assert max(rates) == rates[usual.warmup] == usual.peak
    assert rates[0] < rates[1] < usual.peak
    assert rates[usual.steps // 2] == usual.peak
    assert rates[-1] == pytest.approx(usual.peak / 50)
