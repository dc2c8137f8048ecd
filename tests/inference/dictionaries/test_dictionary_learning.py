"""dictionary_learning folders written from its classes' state dicts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from services.common.errors import FailedPrecondition
from services.inference.engine.dictionaries.sites import Point, Site
from tests.inference.dictionaries.opening import D, N, agrees, check, drawn, one, opened, tokens


def write(folder: Path, dict_class: str, t: dict[str, Tensor], **trainer: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    facts = {
        "trainer_class": "Some",
        "dict_class": dict_class,
        "activation_dim": D,
        "dict_size": N,
        "layer": 2,
        "lm_name": "some/model",
        "submodule_name": "resid_post_layer_2",
    }
    config = {"trainer": {**facts, **trainer}, "buffer": {"d_submodule": D, "io": "out"}}
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(t, folder / "ae.pt")
    return folder


def linear(b_dec: str) -> dict[str, Tensor]:
    random = drawn(11)
    return {
        "encoder.weight": random(N, D),
        "encoder.bias": random(N),
        "decoder.weight": random(D, N),
        b_dec: random(D),
    }


def parameters() -> dict[str, Tensor]:
    random = drawn(12)
    return {"W_enc": random(D, N), "b_enc": random(N), "W_dec": random(N, D), "b_dec": random(D)}


def test_auto_encoder(tmp_path: Path) -> None:
    t = linear("bias")
    d = one(write(tmp_path, "AutoEncoder", t))
    assert d.header.site_in == Site(Point.RESID_POST, 2)
    x = tokens()
    f = torch.relu((x - t["bias"]) @ t["encoder.weight"].T + t["encoder.bias"])
    check(d, x, f, f @ t["decoder.weight"].T + t["bias"])
    f = torch.relu(x @ t["encoder.weight"].T + t["encoder.bias"])
    assert not agrees(d, x, f, f @ t["decoder.weight"].T + t["bias"])


def test_auto_encoder_new_subtracts_nothing(tmp_path: Path) -> None:
    t = linear("decoder.bias")
    d = one(write(tmp_path, "AutoEncoderNew", t))
    x = tokens()
    f = torch.relu(x @ t["encoder.weight"].T + t["encoder.bias"])
    check(d, x, f, f @ t["decoder.weight"].T + t["decoder.bias"])


@pytest.mark.parametrize("buffers", [{}, {"k": torch.tensor(4), "threshold": torch.tensor(0.9)}])
def test_topk(tmp_path: Path, buffers: dict[str, Tensor]) -> None:
    t = linear("b_dec")
    d = one(write(tmp_path, "AutoEncoderTopK", {**t, **buffers}, k=4))
    x = tokens()
    pre = torch.relu((x - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"])
    values, index = pre.topk(4)
    f = torch.zeros_like(pre).scatter(-1, index, values)
    check(d, x, f, f @ t["decoder.weight"].T + t["b_dec"])


@pytest.mark.parametrize("dict_class", ["BatchTopKSAE", "MatryoshkaBatchTopKSAE"])
def test_batch_topk_is_a_threshold(tmp_path: Path, dict_class: str) -> None:
    matryoshka = dict_class.startswith("M")
    t = parameters() if matryoshka else linear("b_dec")
    buffers = {"k": torch.tensor(4), "threshold": torch.tensor(1.3)}
    if matryoshka:
        buffers["group_sizes"] = torch.tensor([10, 20])
    d = one(write(tmp_path, dict_class, {**t, **buffers}, k=4))
    assert (d.header.activation, d.header.declared.l0) == ("jumprelu", 4)
    x = tokens()
    if matryoshka:
        pre = (x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
        decoder = t["W_dec"]
    else:
        pre = (x - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"]
        decoder = t["decoder.weight"].T
    f = torch.relu(pre) * (torch.relu(pre) > 1.3)
    check(d, x, f, f @ decoder + t["b_dec"])
    (registered,) = opened(
        write(tmp_path, dict_class, {**t, **buffers, "threshold": torch.tensor(-1.0)}, k=4)
    )
    with pytest.raises(FailedPrecondition, match="depend on the rest of the batch"):
        registered.load()


def test_jumprelu_in_units_of_its_writes(tmp_path: Path) -> None:
    t = {**parameters(), "threshold": drawn(13)(N).abs()}
    d = one(write(tmp_path, "JumpReluAutoEncoder", t))
    x = tokens()
    pre = x @ t["W_enc"] + t["b_enc"]
    lengths = t["W_dec"].norm(dim=1)
    f = torch.relu(pre * (pre > t["threshold"])) * lengths
    check(d, x, f, (f / lengths) @ t["W_dec"] + t["b_dec"])


def test_gated_in_units_of_its_writes(tmp_path: Path) -> None:
    random = drawn(14)
    t = {
        "encoder.weight": random(N, D),
        "decoder.weight": random(D, N),
        "decoder_bias": random(D),
        "gate_bias": random(N),
        "r_mag": 0.2 * random(N),
        "mag_bias": random(N),
    }
    d = one(write(tmp_path, "GatedAutoEncoder", t))
    x = tokens()
    u = (x - t["decoder_bias"]) @ t["encoder.weight"].T
    lengths = t["decoder.weight"].norm(dim=0)
    f = (u + t["gate_bias"] > 0) * torch.relu(t["r_mag"].exp() * u + t["mag_bias"]) * lengths
    check(d, x, f, (f / lengths) @ t["decoder.weight"].T + t["decoder_bias"])


def test_what_an_evaluation_beside_it_measured_is_declared(tmp_path: Path) -> None:
    write(tmp_path, "AutoEncoder", linear("bias"))
    results = {"l0": 37.5, "frac_variance_explained": 0.8, "cossim": 0.9}
    (tmp_path / "eval_results.json").write_text(json.dumps(results))
    (registered,) = opened(tmp_path)
    assert registered.header.declared.l0 == 37.5
    assert registered.header.declared.fvu == pytest.approx(0.2)


def test_safetensors_too(tmp_path: Path) -> None:
    t = linear("bias")
    write(tmp_path, "AutoEncoder", t)
    (tmp_path / "ae.pt").unlink()
    save_file(t, tmp_path / "ae.safetensors")
    x = tokens()
    f = torch.relu((x - t["bias"]) @ t["encoder.weight"].T + t["encoder.bias"])
    check(one(tmp_path), x, f, f @ t["decoder.weight"].T + t["bias"])
    assert one(tmp_path / "ae.safetensors").id == "mine"


def test_modules_end_before_a_post_norm(tmp_path: Path) -> None:
    t = linear("bias")
    write(tmp_path / "mlp_out_layer3" / "10_32768", "AutoEncoder", t, submodule_name=None, layer=3)
    d = one(tmp_path / "mlp_out_layer3" / "10_32768")
    assert d.header.site_in == Site(Point.MLP_OUT, 3, before_post_norm=True)
    write(tmp_path / "x", "AutoEncoder", t, submodule_name="model.layers.2", layer=2)
    with pytest.raises(FailedPrecondition, match=r"submodule_name is 'model\.layers\.2'"):
        opened(tmp_path / "x")
    assert one(f"{tmp_path / 'x'}#site=mlp_out").header.site_in.before_post_norm


@pytest.mark.parametrize(
    ("dict_class", "trainer", "says"),
    [
        ("CrossCoder", {}, "trainer.dict_class is 'CrossCoder'"),
        ("AutoEncoder", {"layer": 5}, "trainer.layer is 5, but only 2, as in resid_post_layer_2"),
        ("AutoEncoder", {"dict_size": 31}, "trainer.dict_size is 31, but only 30"),
        ("AutoEncoderTopK", {}, "lacks 'b_dec'"),
        ("AutoEncoderNew", {}, "lacks 'decoder.bias'"),
    ],
)
def test_what_is_not_understood_is_refused(
    tmp_path: Path, dict_class: str, trainer: dict[str, Any], says: str
) -> None:
    write(tmp_path, dict_class, linear("bias"), **trainer)
    with pytest.raises(FailedPrecondition) as caught:
        opened(tmp_path)
    assert says in caught.value.message
