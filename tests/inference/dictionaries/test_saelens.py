"""SAELens folders written from its layout, against its formulas."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from services.common.errors import FailedPrecondition
from services.inference.engine.dictionaries.dictionary import NormKind
from services.inference.engine.dictionaries.sites import Point, Site
from tests.inference.dictionaries.opening import (
    HEADS,
    D,
    N,
    agrees,
    check,
    drawn,
    one,
    opened,
    tokens,
)

V6: dict[str, Any] = {
    "architecture": "standard",
    "d_in": D,
    "d_sae": N,
    "dtype": "float32",
    "device": "cpu",
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "reshape_activations": "none",
    "metadata": {
        "model_name": "gpt2",
        "hook_name": "blocks.2.hook_resid_pre",
        "hook_head_index": None,
        "prepend_bos": True,
        "context_size": 128,
        "dataset_path": "some/corpus",
        "sae_lens_version": "6.54.12",
    },
}
OLD: dict[str, Any] = {
    "model_name": "gpt2-small",
    "hook_point": "blocks.2.hook_resid_pre",
    "hook_point_layer": 2,
    "hook_point_head_index": None,
    "dataset_path": "some/corpus",
    "d_in": D,
    "d_sae": N,
    "l1_coefficient": 8e-5,
    "lr": 4e-4,
}


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = {**config, **changes}
    if "metadata" in config:
        config["metadata"] = {**V6["metadata"], **config["metadata"]}
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "sae_weights.safetensors")
    return folder


def plain(d_in: int = D, d_out: int | None = None, n: int = N) -> dict[str, Tensor]:
    random = drawn()
    d_out = d_out or d_in
    return {
        "W_enc": random(d_in, n),
        "W_dec": random(n, d_out),
        "b_enc": random(n),
        "b_dec": random(d_out),
    }


def relu(x: Tensor, t: dict[str, Tensor], subtract: bool = True) -> tuple[Tensor, Tensor]:
    f = torch.relu((x - t["b_dec"] if subtract else x) @ t["W_enc"] + t["b_enc"])
    return f, f @ t["W_dec"] + t["b_dec"]


@pytest.mark.parametrize("config", [V6, OLD], ids=["v6", "old"])
def test_standard(tmp_path: Path, config: dict[str, Any]) -> None:
    t = plain()
    (registered,) = opened(write(tmp_path, config, t))
    header = registered.header
    assert (header.id, header.activation) == ("mine", "relu")
    assert header.site_in == header.site_out == Site(Point.RESID_PRE, 2)
    assert header.declared.sample == "some/corpus"
    assert [name for name, _ in header.provenance.files] == ["cfg.json", "sae_weights.safetensors"]
    assert all(len(digest) == 64 for _, digest in header.provenance.files)
    x = tokens()
    check(registered.load(), x, *relu(x, t))
    assert not agrees(registered.load(), x, *relu(x, t, subtract=False))


def test_what_it_declares(tmp_path: Path) -> None:
    figures = {"l0": 15.98, "fvu": 0.0521, "dataset_path": "sample.txt", "seqpos_slice": [2, None]}
    folder = write(tmp_path / "release" / "first", V6, plain(), metadata=figures)
    declared = opened(folder)[0].header.declared
    assert (declared.l0, declared.fvu, declared.leave_out_first) == (15.98, 0.0521, 2)
    assert (declared.sample, declared.sample_file) == ("sample.txt", None)
    (folder.parent / "sample.txt").write_text("a text")
    assert opened(folder)[0].header.declared.sample_file == folder.parent / "sample.txt"
    for elsewhere in ("../release/sample.txt", str(folder.parent / "sample.txt")):
        write(folder, V6, plain(), metadata={"dataset_path": elsewhere})
        assert opened(folder)[0].header.declared.sample_file is None


def test_without_subtracting_b_dec(tmp_path: Path) -> None:
    t = plain()
    d = one(write(tmp_path, V6, t, apply_b_dec_to_input=False))
    x = tokens()
    check(d, x, *relu(x, t, subtract=False))
    assert not agrees(d, x, *relu(x, t))


def test_a_turned_encoder_is_recognised_by_its_shape(tmp_path: Path) -> None:
    t = plain()
    d = one(write(tmp_path, V6, {**t, "W_enc": t["W_enc"].T, "W_dec": t["W_dec"].T}))
    x = tokens()
    check(d, x, *relu(x, t))


def test_a_square_encoder_is_read_as_the_format_writes_it(tmp_path: Path) -> None:
    t = plain(n=D)
    d = one(write(tmp_path, V6, t, d_sae=D))
    x = tokens()
    check(d, x, *relu(x, t))
    assert not agrees(d, x, *relu(x, {**t, "W_enc": t["W_enc"].T}))


def test_gated(tmp_path: Path) -> None:
    random, t = drawn(3), plain()
    del t["b_enc"]
    t |= {"b_gate": random(N), "r_mag": 0.2 * random(N), "b_mag": random(N)}
    x = tokens()
    u = (x - t["b_dec"]) @ t["W_enc"]
    f = (u + t["b_gate"] > 0) * torch.relu(
        (x - t["b_dec"]) @ (t["W_enc"] * t["r_mag"].exp()) + t["b_mag"]
    )
    check(one(write(tmp_path, V6, t, architecture="gated")), x, f, f @ t["W_dec"] + t["b_dec"])


@pytest.mark.parametrize("log", [False, True])
def test_jumprelu_and_its_old_log_thresholds(tmp_path: Path, log: bool) -> None:
    t, threshold = plain(), drawn(4)(N).abs()
    name = "log_threshold" if log else "threshold"
    t[name] = threshold.log() if log else threshold
    d = one(write(tmp_path, V6, t, architecture="jumprelu"))
    x = tokens()
    pre = (x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    f = torch.relu(pre) * (pre > threshold)
    check(d, x, f, f @ t["W_dec"] + t["b_dec"])
    wrong = torch.relu(pre) * (pre > t[name])
    assert agrees(d, x, wrong, wrong @ t["W_dec"] + t["b_dec"]) is not log


@pytest.mark.parametrize("layout", ["v6", "old"])
def test_topk(tmp_path: Path, layout: str) -> None:
    t = plain()
    old = {**OLD, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}}
    config = old if layout == "old" else {**V6, "architecture": "topk", "k": 4}
    x = tokens()
    pre = (x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    values, index = pre.topk(4)
    f = torch.zeros_like(pre).scatter(-1, index, values.relu())
    check(one(write(tmp_path, config, t)), x, f, f @ t["W_dec"] + t["b_dec"])


def test_topk_rescaled_by_decoder_norms(tmp_path: Path) -> None:
    t = plain()
    t["W_dec"] = t["W_dec"] * torch.linspace(0.2, 3, N)[:, None]
    d = one(write(tmp_path, V6, t, architecture="topk", k=4, rescale_acts_by_decoder_norm=True))
    x = tokens()
    lengths = t["W_dec"].norm(dim=-1)
    pre = ((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]) * lengths
    values, index = pre.topk(4)
    f = torch.zeros_like(pre).scatter(-1, index, values.relu())
    check(d, x, f, (f / lengths) @ t["W_dec"] + t["b_dec"])
    values, index = (pre / lengths).topk(4)
    plain_f = torch.zeros_like(pre).scatter(-1, index, values.relu())
    assert not agrees(d, x, plain_f, plain_f @ t["W_dec"] + t["b_dec"])


def test_layer_norm_divides_by_the_unbiased_deviation(tmp_path: Path) -> None:
    t = plain()
    d = one(write(tmp_path, V6, t, normalize_activations="layer_norm"))
    x = tokens()
    mean = x.mean(-1, keepdim=True)
    for correction, right in ((1, True), (0, False)):
        std = x.std(-1, keepdim=True, correction=correction)
        f, recon = relu((x - mean) / (std + 1e-5), t)
        assert agrees(d, x, f, recon * std + mean) is right
    assert not agrees(d, x, *relu(x, t))


def test_constant_norm(tmp_path: Path) -> None:
    t = plain()
    d = one(write(tmp_path, V6, t, normalize_activations="constant_norm_rescale"))
    x = tokens()
    coefficient = D**0.5 / x.norm(dim=-1, keepdim=True)
    f, recon = relu(x * coefficient, t)
    check(d, x, f, recon / coefficient)


def test_an_average_factor_needs_its_number(tmp_path: Path) -> None:
    t = plain()
    write(tmp_path, V6, t, normalize_activations="expected_average_only_in")
    with pytest.raises(FailedPrecondition, match="no file has the factor"):
        opened(tmp_path)
    write(tmp_path, OLD, t, normalize_activations=True)
    with pytest.raises(FailedPrecondition, match="no file has the factor"):
        opened(tmp_path)
    (tmp_path / "activation_scaler.json").write_text('{"scaling_factor": 0.4}')
    x = tokens()
    f, recon = relu(x * 0.4, t)
    check(one(tmp_path), x, f, recon / 0.4)
    write(tmp_path, V6, t)
    with pytest.raises(FailedPrecondition, match="nothing is rescaled"):
        opened(tmp_path)


def test_centred_weights_centre_the_raw_residual(tmp_path: Path) -> None:
    t = plain()
    kwargs = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    d = one(write(tmp_path, V6, t, metadata=kwargs))
    assert d.norm.kind is NormKind.CENTRE
    x = tokens()
    mean = x.mean(-1, keepdim=True)
    f, recon = relu(x - mean, t)
    check(d, x, f, recon + mean)
    assert not agrees(d, x, *relu(x, t))
    write(tmp_path, V6, t, metadata=kwargs, normalize_activations="constant_norm_rescale")
    with pytest.raises(FailedPrecondition, match="on centred weights"):
        opened(tmp_path)


def test_z_is_as_wide_as_all_heads(tmp_path: Path) -> None:
    t = plain(d_in=HEADS)
    z = {"hook_name": "blocks.3.attn.hook_z"}
    d = one(write(tmp_path, V6, t, d_in=HEADS, reshape_activations="hook_z", metadata=z))
    assert d.header.site_in == Site(Point.Z, 3, before_post_norm=True)
    x = tokens(HEADS)
    check(d, x, *relu(x, t))
    write(tmp_path, V6, plain(), reshape_activations="hook_z", metadata=z)
    with pytest.raises(FailedPrecondition, match=r"reads 12 channels at z\.3.*z is 16 wide"):
        opened(tmp_path)
    write(tmp_path, V6, plain(), reshape_activations="hook_z")
    with pytest.raises(FailedPrecondition, match="reshape_activations is 'hook_z'"):
        opened(tmp_path)
    z_folded = {**z, "model_from_pretrained_kwargs": {"fold_value_biases": True}}
    write(tmp_path, V6, t, d_in=HEADS, metadata=z_folded)
    with pytest.raises(FailedPrecondition, match="fold_value_biases is True"):
        opened(tmp_path)


def test_finetuned_scales(tmp_path: Path) -> None:
    t = plain()
    x = tokens()
    write(tmp_path, OLD, {**t, "scaling_factor": torch.ones(N)})
    check(one(tmp_path), x, *relu(x, t))
    scaling = torch.linspace(0.5, 2, N)
    write(tmp_path, OLD, {**t, "scaling_factor": scaling}, finetuning_scaling_factor=True)
    f, _ = relu(x, t)
    check(one(tmp_path), x, f, (f * scaling) @ t["W_dec"] + t["b_dec"])
    write(tmp_path, OLD, {**t, "scaling_factor": scaling}, finetuning_scaling_factor=False)
    with pytest.raises(FailedPrecondition, match="not all ones"):
        one(tmp_path)


@pytest.mark.parametrize("architecture", ["transcoder", "skip_transcoder", "jumprelu_transcoder"])
@pytest.mark.parametrize("norm", ["none", "layer_norm"])
def test_transcoders(tmp_path: Path, architecture: str, norm: str) -> None:
    random, t = drawn(6), plain()
    x = tokens()
    x_n = x
    if norm == "layer_norm":
        x_n = (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-5)
    pre = x_n @ t["W_enc"] + t["b_enc"]
    f = torch.relu(pre)
    if "jumprelu" in architecture:
        t["threshold"] = random(N).abs()
        f = f * (pre > t["threshold"])
    recon = f @ t["W_dec"] + t["b_dec"]
    if "skip" in architecture:
        t["W_skip"] = random(D, D)
        recon = recon + x @ t["W_skip"].T
    write(
        tmp_path,
        V6,
        t,
        architecture=architecture,
        d_out=D,
        apply_b_dec_to_input=False,
        normalize_activations=norm,
        metadata={"hook_name": "blocks.2.mlp.hook_in", "hook_name_out": "blocks.2.hook_mlp_out"},
    )
    d = one(tmp_path)
    assert d.header.is_transcoder
    assert (d.header.site_in, d.header.site_out) == (Site(Point.MLP_IN, 2), Site(Point.MLP_OUT, 2))
    check(d, x, f, recon)
    if "skip" in architecture:
        assert not agrees(d, x, f, recon - x @ t["W_skip"].T + x @ t["W_skip"])


def test_a_transcoder_before_the_gain_needs_the_model_s_norm(tmp_path: Path) -> None:
    t = plain()
    hooks = {
        "hook_name": "blocks.2.ln2.hook_normalized",
        "hook_name_out": "blocks.2.hook_mlp_out",
    }
    write(tmp_path, V6, t, architecture="transcoder", apply_b_dec_to_input=False, metadata=hooks)
    with pytest.raises(FailedPrecondition, match="before the norm's gain"):
        opened(tmp_path)
    assert not one(f"{tmp_path}#site=mlp_in.2:mlp_out.2").header.site_in.before_gain


@pytest.mark.parametrize(
    ("config", "changes", "says"),
    [
        (V6, {"architecture": "temporal"}, "architecture is 'temporal', but only standard"),
        (V6, {"surprise": 1}, "option 'surprise' is unknown"),
        (V6, {"normalize_activations": "other"}, "normalize_activations is 'other'"),
        (V6, {"apply_b_dec_to_input": "yes"}, "apply_b_dec_to_input is 'yes'"),
        (V6, {"d_sae": 31}, "d_sae is 31, but only 30"),
        (V6, {"rescale_acts_by_decoder_norm": True}, "rescale_acts_by_decoder_norm is True"),
        (
            V6,
            {"architecture": "topk", "k": None},
            "k is None, but only a whole number from 1 to its 30",
        ),
        (
            V6,
            {"metadata": {"hook_name": "blocks.2.hook_q"}},
            "'blocks.2.hook_q', which is no point",
        ),
        (V6, {"metadata": {"hook_head_index": 3}}, "hook_head_index is 3"),
        (
            V6,
            {"metadata": {"hook_name": "blocks.9.hook_resid_pre"}},
            "reads layer 9, but the model",
        ),
        (OLD, {"activation_fn_str": "tanh-relu"}, "activation_fn is 'tanh-relu'"),
        (V6, {"architecture": "gated"}, "lacks 'b_gate'"),
        (V6, {"architecture": "jumprelu"}, "lacks 'threshold'"),
        (V6, {"architecture": "transcoder"}, "apply_b_dec_to_input is True"),
        (
            V6,
            {
                "architecture": "transcoder",
                "apply_b_dec_to_input": False,
                "metadata": {
                    "hook_name": "blocks.2.mlp.hook_in",
                    "hook_name_out": "blocks.3.hook_mlp_out",
                },
            },
            "reads mlp_in.2 and writes mlp_out.3: another layer",
        ),
    ],
)
def test_what_is_not_understood_is_refused(
    tmp_path: Path, config: dict[str, Any], changes: dict[str, Any], says: str
) -> None:
    write(tmp_path, config, plain(), **changes)
    with pytest.raises(FailedPrecondition) as caught:
        opened(tmp_path)
    assert says in caught.value.message
    assert caught.value.message.startswith("dictionary 'mine': ")
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("name", "shape", "says"),
    [
        ("W_enc", (D, N + 1), "'W_enc' is [12, 31], but its 30 biases"),
        ("W_dec", (N, D + 1), "'W_dec' is [30, 13], but the other tensors ask for [30, 12]"),
        ("b_enc", (N, 1), "'b_enc' should be a vector"),
        ("W_other", (3, 3), "has 'W_other' [3, 3], unknown here"),
    ],
)
def test_a_wrong_tensor_is_refused(
    tmp_path: Path, name: str, shape: tuple[int, ...], says: str
) -> None:
    write(tmp_path, V6, {**plain(), name: torch.zeros(shape)})
    with pytest.raises(FailedPrecondition) as caught:
        opened(tmp_path)
    assert says in caught.value.message
    assert "sae_weights.safetensors" in caught.value.message


def test_a_nan_is_refused_when_the_weights_are_read(tmp_path: Path) -> None:
    t = plain()
    t["W_dec"][3, 3] = torch.nan
    (registered,) = opened(write(tmp_path, V6, t))
    with pytest.raises(FailedPrecondition, match="'W_dec' holds a NaN"):
        registered.load()
