"""Both Gemma Scopes, written from their layouts."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from services.common.errors import FailedPrecondition
from services.inference.engine.dictionaries.sites import Point, Site
from services.inference.engine.dictionaries.widths import Widths
from tests.inference.dictionaries.opening import (
    HEADS,
    WIDTHS,
    D,
    F,
    N,
    agrees,
    check,
    drawn,
    one,
    opened,
    save_npz,
    tokens,
)


def tensors(d_in: int = D, d_out: int = D) -> dict[str, Tensor]:
    random = drawn(2)
    return {
        "w_enc": random(d_in, N),
        "w_dec": random(N, d_out),
        "b_enc": random(N),
        "b_dec": random(d_out),
        "threshold": random(N).abs(),
    }


def formula(x: Tensor, t: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    pre = x @ t["w_enc"] + t["b_enc"]
    f = torch.relu(pre) * (pre > t["threshold"])
    return f, f @ t["w_dec"] + t["b_dec"]


def first(
    root: Path, kind: str, t: dict[str, Tensor], inside: str = "layer_3/width_16k/average_l0_82"
) -> Path:
    folder = root / f"gemma-scope-2b-pt-{kind}" / inside
    folder.mkdir(parents=True)
    save_npz(folder / "params.npz", {k.replace("w_", "W_"): v for k, v in t.items()})
    return folder


@pytest.mark.parametrize(
    ("kind", "site"),
    [
        ("res", Site(Point.RESID_POST, 3)),
        ("mlp", Site(Point.MLP_OUT, 3, before_post_norm=False)),
        ("att", Site(Point.Z, 3)),
    ],
)
def test_the_first(tmp_path: Path, kind: str, site: Site) -> None:
    width = HEADS if kind == "att" else D
    t = tensors(width, width)
    d = one(first(tmp_path, kind, t))
    assert d.header.site_in == d.header.site_out == site
    assert d.header.declared.l0 == 82
    x = tokens(width)
    check(d, x, *formula(x, t))
    f = torch.relu((x - t["b_dec"]) @ t["w_enc"] + t["b_enc"])
    assert not agrees(d, x, f, f @ t["w_dec"] + t["b_dec"])


def test_either_spelling(tmp_path: Path) -> None:
    t = tensors()
    folder = first(tmp_path, "res", t)
    save_npz(folder / "params.npz", t)
    x = tokens()
    check(one(folder), x, *formula(x, t))


def test_the_first_s_transcoders_read_before_the_gain(tmp_path: Path) -> None:
    """The model offers the norm's output, gain included; they were trained without the gain."""
    t = tensors()
    folder = first(tmp_path, "transcoders", t)
    gain, bias = torch.rand(D) + 0.5, torch.zeros(D)
    norms = [(gain, bias)] * 6
    widths = Widths(6, D, F, HEADS, mlp_norms=norms)
    (registered,) = opened(folder, widths=widths)
    assert registered.header.site_in.before_gain
    d = registered.load()
    assert d.header.site_in == Site(Point.MLP_IN, 3)
    assert d.header.site_out == Site(Point.MLP_OUT, 3, before_post_norm=False)
    unweighted = tokens()
    f, recon = formula(unweighted, t)
    check(d, unweighted * gain, f, recon)
    assert not agrees(d, unweighted, f, recon)
    with pytest.raises(FailedPrecondition, match="before the norm's gain"):
        opened(folder, widths=WIDTHS)
    after = registered.at(Site(Point.MLP_IN, 3), Site(Point.MLP_OUT, 3)).load()
    check(after, unweighted, f, recon)
    for end, weights in ((".before", d), (".after", after), ("", after)):
        named = one(f"{folder}#site=mlp_in.3{end}:mlp_out.3", widths=widths)
        assert torch.equal(named.w_enc, weights.w_enc)


def test_embedding_dictionaries_read_the_first_residual(tmp_path: Path) -> None:
    folder = first(tmp_path, "res", tensors(), "embedding/width_4k/average_l0_6")
    assert one(folder).header.site_in == Site(Point.RESID_PRE, 0)


def test_a_release_is_a_set_and_ambiguity_is_refused(tmp_path: Path) -> None:
    for layer in (0, 2, 1):
        first(tmp_path, "res", tensors(), f"layer_{layer}/width_16k/average_l0_50")
    release = tmp_path / "gemma-scope-2b-pt-res"
    ids = [each.id for each in opened(release, "gs")]
    assert ids == ["gs-resid_post-0", "gs-resid_post-1", "gs-resid_post-2"]
    first(tmp_path, "res", tensors(), "layer_2/width_16k/average_l0_90")
    with pytest.raises(
        FailedPrecondition, match="two dictionaries would be called 'gs-resid_post-2"
    ):
        opened(release, "gs")


def test_an_unnamed_folder_says_what_to_do(tmp_path: Path) -> None:
    folder = tmp_path / "layer_2"
    folder.mkdir()
    save_npz(folder / "params.npz", tensors())
    with pytest.raises(FailedPrecondition, match=r"end its URI in #site=POINT\.LAYER"):
        opened(folder)
    assert one(f"{folder}#site=mlp_out").header.site_in == Site(Point.MLP_OUT, 2)
    assert one(f"{folder}#site=resid_mid.4").header.site_in == Site(Point.RESID_MID, 4)


def test_pickled_objects_are_refused(tmp_path: Path) -> None:
    folder = first(tmp_path, "res", tensors())
    save_npz(folder / "params.npz", {"W_enc": np.array([{"a": 1}], dtype=object)})
    with pytest.raises(FailedPrecondition, match="holds pickled objects, which could run code"):
        opened(folder)


def test_a_damaged_or_missing_array_is_one_sentence(tmp_path: Path) -> None:
    folder = first(tmp_path, "res", tensors())
    (registered,) = opened(folder)
    path = folder / "params.npz"
    status, content = path.stat(), bytearray(path.read_bytes())
    content[200:400] = bytes(200)
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(FailedPrecondition, match="is not readable"):
        registered.load()
    path.unlink()
    with pytest.raises(FailedPrecondition, match="is not readable"):
        registered.load()
    path.write_bytes(b"no zip")
    with pytest.raises(FailedPrecondition, match="is no npz file"):
        opened(folder)


def second(folder: Path, t: dict[str, Tensor], **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architecture": "jump_relu",
        "model_name": "google/gemma-3-1b-pt",
        "hf_hook_point_in": "model.layers.3.output",
        "hf_hook_point_out": "model.layers.3.output",
        "affine_connection": False,
        "width": N,
        "l0": 20,
        "type": "sae",
    }
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    save_file(t, folder / "params.safetensors")
    return folder


@pytest.mark.parametrize(
    ("hook", "site"),
    [
        ("model.layers.3.output", Site(Point.RESID_POST, 3)),
        ("model.layers.3.self_attn.o_proj.input", Site(Point.Z, 3)),
        (
            "model.language_model.layers.3.post_feedforward_layernorm.output",
            Site(Point.MLP_OUT, 3, before_post_norm=False),
        ),
    ],
)
def test_the_second(tmp_path: Path, hook: str, site: Site) -> None:
    width = HEADS if site.point is Point.Z else D
    t = tensors(width, width)
    d = one(second(tmp_path, t, hf_hook_point_in=hook, hf_hook_point_out=hook))
    assert d.header.site_in == site
    assert (d.header.declared.l0, d.header.declared.leave_out_first) == (20, 1)
    x = tokens(width)
    check(d, x, *formula(x, t))


def test_its_affine_transcoder(tmp_path: Path) -> None:
    t = tensors()
    t["affine_skip_connection"] = drawn(8)(D, D)
    folder = second(
        tmp_path / "transcoder_all" / "layer_3_width_16k_l0_small_affine",
        t,
        model_name="google/gemma-3-1b-it",
        hf_hook_point_in="model.layers.3.pre_feedforward_layernorm.output",
        hf_hook_point_out="model.layers.3.post_feedforward_layernorm.output",
        affine_connection=True,
        type="transcoder",
    )
    d = one(folder)
    assert d.header.site_in == Site(Point.MLP_IN, 3)
    assert d.header.site_out == Site(Point.MLP_OUT, 3, before_post_norm=False)
    assert d.header.declared.leave_out_first == 4
    x = tokens()
    f, recon = formula(x, t)
    check(d, x, f, recon + x @ t["affine_skip_connection"])
    assert not agrees(d, x, f, recon + x @ t["affine_skip_connection"].T)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"architecture": "topk"}, "architecture is 'topk'"),
        ({"type": "crosscoder"}, "type is 'crosscoder'"),
        ({"affine_connection": True}, "says affine_connection True, but"),
        ({"hf_hook_point_in": "model.layers.3.q_proj.output"}, "'model.layers.3.q_proj.output'"),
    ],
)
def test_what_is_not_understood_is_refused(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    second(tmp_path, tensors(), **changes)
    with pytest.raises(FailedPrecondition) as caught:
        opened(tmp_path)
    assert says in caught.value.message


def test_its_cross_layer_transcoders_are_refused(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "params_layer_0.safetensors")
    with pytest.raises(FailedPrecondition, match="cross-layer transcoder"):
        opened(tmp_path)
