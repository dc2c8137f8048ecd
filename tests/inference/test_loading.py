"""Loading: what is wrong with a model folder is one sentence, and nothing is filled in silently."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.activations import GELUTanh, NewGELUActivation

from services.common.errors import FailedPrecondition
from services.common.settings import ModelSource
from services.inference.engine import hub, loading
from services.inference.engine.asked import AskedAttribution, AskedRun
from services.inference.engine.attribution import ExplainedRun, NormMode
from services.inference.engine.cancellation import CancelToken
from services.inference.engine.columns import Column
from services.inference.engine.model import Model
from services.inference.engine.objectives import LogitMinusMean
from services.inference.engine.tables import Ranking
from services.inference.server import load_model

CPU = torch.device("cpu")


def load(folder: Path | str, tokenizer: str | None = None) -> loading.Loaded:
    return loading.load("m", str(folder), tokenizer, CPU, torch.float32)


@pytest.fixture
def copy(model_folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(model_folder, tmp_path / "copy")
    return tmp_path / "copy"


def configure(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_weights_are_those_of_the_folder(model_folder: Path) -> None:
    loaded = load(model_folder)
    theirs = AutoModelForCausalLM.from_pretrained(model_folder).state_dict()
    for name, ours in loaded.model.state_dict().items():
        assert torch.equal(ours, theirs[name]), name
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert not loaded.model.training


def test_gelu_is_one_kernel_in_float32_and_the_same_function(model_folder: Path) -> None:
    x = torch.linspace(-12, 12, 4801)
    whole = load(model_folder).model.transformer.h[0].mlp.act
    half = loading.load("m", str(model_folder), None, CPU, torch.bfloat16).model
    composed = half.transformer.h[0].mlp.act
    assert (type(whole), type(composed)) == (GELUTanh, NewGELUActivation)
    torch.testing.assert_close(whole(x), composed(x), rtol=1e-6, atol=1e-6)
    with pytest.raises(AssertionError):  # the exact GELU is another function
        torch.testing.assert_close(torch.nn.functional.gelu(x), composed(x), rtol=1e-6, atol=1e-6)


def test_missing_weights_are_refused(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    del weights["transformer.h.1.mlp.c_fc.bias"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FailedPrecondition, match=r"lacks 1 weights.*h\.1\.mlp\.c_fc\.bias"):
        load(copy)


def test_the_hash_follows_weights_and_configuration(copy: Path) -> None:
    before = load(copy).identity.weights_hash
    assert load(copy).identity.weights_hash == before
    configure(copy, note="changed")
    after_config = load(copy).identity.weights_hash
    weights = load_file(copy / "model.safetensors")
    weights["transformer.h.1.mlp.c_fc.bias"][0] += 1
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert len({before, after_config, load(copy).identity.weights_hash}) == 3


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "gptj"}, "models of type 'gptj' are not supported; supported: gpt2, gpt_n"),
        ({"model_type": "bloom"}, "they bypass the attention interface.*; supported: gpt2"),
        ({"model_type": "falcon"}, "they bypass the attention interface"),
        ({"model_type": "opt", "do_layer_norm_before": False}, "as in OPT-350m"),
        ({"model_type": "opt", "word_embed_proj_dim": 8}, "word_embed_proj_dim differs"),
        ({"model_type": "opt", "_remove_final_layer_norm": True}, "_remove_final_layer_norm"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "later tokens"),
        (
            {
                "model_type": "llama",
                "rope_parameters": {
                    "rope_type": "longrope",
                    "short_factor": [1.0],
                    "long_factor": [1.0],
                    "rope_theta": 1e4,
                    "original_max_position_embeddings": 16,
                },
            },
            "longrope embedding depends on the longest prompt",
        ),
        ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn bypasses"),
        ({"add_cross_attention": True}, "cross-attention"),
        ({"model_type": "no-such-thing"}, "config.json is not readable"),
    ],
)
def test_what_would_be_half_served_is_refused(
    changes: dict[str, object], sentence: str, copy: Path
) -> None:
    configure(copy, **changes)
    with pytest.raises(FailedPrecondition, match=sentence):
        load(copy)


def test_an_empty_folder_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match=r"holds no config\.json"):
        load(tmp_path)


def test_an_unreachable_hub_is_one_sentence_within_five_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(FailedPrecondition, match="neither a folder nor whole in the local"):
        load("nobody/no-such-model")
    assert time.monotonic() - started < 5


def test_without_a_tokenizer_ids_work_and_text_says_what_to_do(copy: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    vocabulary = Model(load(copy)).vocabulary
    assert vocabulary.facts is None
    assert vocabulary.token(17).text == "<17>"
    assert vocabulary.decode([1, 17]) == ("<1><17>", ())
    with pytest.raises(FailedPrecondition, match="no tokenizer: send token_ids or start with"):
        vocabulary.encode("text")


def test_a_tokenizer_larger_than_the_model_is_refused(model_folder: Path, copy: Path) -> None:
    configure(copy, vocab_size=100)
    weights = load_file(copy / "model.safetensors")
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"][:100].clone()
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FailedPrecondition, match="do not belong together"):
        load(copy, str(model_folder))


def test_a_tokenizer_folder_without_one_is_refused(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="holds no tokenizer"):
        load(model_folder, str(tmp_path))


def test_pickled_weights_cannot_run_code(copy: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "ran",)  # type: ignore[return-value]

    (copy / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": Evil()}, copy / "pytorch_model.bin")
    with pytest.raises(FailedPrecondition, match="does not load"):
        load(copy)
    assert not (tmp_path / "ran").exists()


def test_examples_come_from_behaviours_json(copy: Path) -> None:
    entry = {"title": "T", "prompt": "a", "target": " b", "distractor": " c", "accuracy": 1.0}
    (copy / "behaviours.json").write_text(json.dumps([entry]))
    (example,) = Model(load(copy)).examples
    assert (example.title, example.target, example.accuracy) == ("T", " b", 1.0)
    (copy / "behaviours.json").write_text('[{"title": 1}]')
    with pytest.raises(FailedPrecondition, match="not a list of examples"):
        Model(load(copy))


def test_tiny_vocabularies_and_contexts_are_served(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=3, n_positions=2, n_embd=4, n_layer=1, n_head=1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "tiny")
    model = Model(load(tmp_path / "tiny"))
    model.warm_up()
    run = model.run(AskedRun((0, 2), (), (0, 1), 10, (1,)), CancelToken())
    assert [len(each.top) for each in run.next_tokens] == [3, 3]
    explained = ExplainedRun((2, 1), (), LogitMinusMean((0,), 1))
    ranking = Ranking(Column.TOTAL_EFFECT, 100)
    asked = AskedAttribution((explained,), NormMode.LIVE, ranking, 10)
    result = model.attribute(asked, CancelToken())
    assert len(result.table.rows) == 2 + 3 + 2 * 16
    assert all(len(read.output) == 3 for read in result.read_outs.values())


def test_half_a_cached_snapshot_is_completed_from_the_hub(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = tmp_path / "cached"
    cached.mkdir()
    shutil.copy(copy / "tokenizer.json", cached)
    asked: list[bool] = []

    def snapshot(
        source: str,
        *,
        revision: str | None,
        allow_patterns: list[str],
        local_files_only: bool = False,
    ) -> str:
        asked.append(local_files_only)
        return str(cached if local_files_only else copy)

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    monkeypatch.setattr(hub, "_require_hub", lambda source: None)
    assert load("somebody/model").folder == copy
    assert asked == [True, False]
    shutil.copytree(copy, cached, dirs_exist_ok=True)
    assert load("somebody/model").folder == cached
    assert asked == [True, False, True]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:3", "mps"])
def test_a_device_that_is_not_there_is_refused(model_folder: Path, device: str) -> None:
    source = ModelSource("tiny", str(model_folder))
    with pytest.raises(FailedPrecondition, match=f"TDB_DEVICE is {device}"):
        load_model(source, None, device=device)
    assert load_model(source, None, device="cpu").device.type == "cpu"
