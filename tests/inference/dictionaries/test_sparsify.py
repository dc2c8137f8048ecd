"""EleutherAI sparsify folders written from its layout."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from services.common.errors import FailedPrecondition
from services.inference.engine.dictionaries.sites import Point, Site
from tests.inference.dictionaries.opening import (
    D,
    N,
    agrees,
    check,
    drawn,
    one,
    opened,
    tokens,
)

CONFIG = {
    "expansion_factor": 32,
    "normalize_decoder": True,
    "num_latents": N,
    "k": 4,
    "multi_topk": False,
    "signed": False,
    "d_in": D,
}


def write(folder: Path, t: dict[str, Tensor], **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps({**CONFIG, **changes}))
    save_file(t, folder / "sae.safetensors")
    return folder


def tensors(n: int = N, skip: bool = False) -> dict[str, Tensor]:
    random = drawn(5)
    t = {
        "encoder.weight": random(n, D),
        "encoder.bias": random(n),
        "W_dec": random(n, D),
        "b_dec": random(D),
    }
    return {**t, "W_skip": random(D, D)} if skip else t


def formula(x: Tensor, t: dict[str, Tensor], subtracts: bool = True) -> tuple[Tensor, Tensor]:
    x_in = x - t["b_dec"] if subtracts else x
    values, index = torch.relu(x_in @ t["encoder.weight"].T + t["encoder.bias"]).topk(4)
    f = torch.zeros(len(x), len(t["encoder.bias"])).scatter(-1, index, values)
    recon = f @ t["W_dec"] + t["b_dec"]
    return f, recon + x @ t["W_skip"].mT if "W_skip" in t else recon


@pytest.mark.parametrize(
    ("hookpoint", "site"),
    [
        ("layers.3", Site(Point.RESID_POST, 3)),
        ("layers.3.mlp", Site(Point.MLP_OUT, 3, before_post_norm=True)),
        ("gpt_neox.layers.3.attention", Site(Point.ATTN_OUT, 3, before_post_norm=True)),
        ("h.3.mlp", Site(Point.MLP_OUT, 3, before_post_norm=True)),
    ],
)
def test_the_hookpoint_is_the_site(tmp_path: Path, hookpoint: str, site: Site) -> None:
    t = tensors()
    d = one(write(tmp_path / hookpoint, t))
    assert d.header.site_in == d.header.site_out == site
    x = tokens()
    check(d, x, *formula(x, t))
    assert not agrees(d, x, *formula(x, t, subtracts=False))


def test_no_number_of_latents_means_the_expansion(tmp_path: Path) -> None:
    t = tensors(2 * D)
    d = one(write(tmp_path / "layers.3", t, num_latents=0, expansion_factor=2))
    x = tokens()
    check(d, x, *formula(x, t))
    write(tmp_path / "layers.3", t, num_latents=0, expansion_factor=3)
    with pytest.raises(FailedPrecondition, match=r"36 latents, but in .* is \[24, 12\]"):
        opened(tmp_path / "layers.3")


@pytest.mark.parametrize("says_transcode", [True, False])
def test_skip_transcoders(tmp_path: Path, says_transcode: bool) -> None:
    t = tensors(skip=True)
    more = {"transcode": True} if says_transcode else {}
    d = one(write(tmp_path / "layers.3.mlp", t, skip_connection=True, **more))
    assert d.header.site_in == Site(Point.MLP_IN, 3)
    assert d.header.site_out == Site(Point.MLP_OUT, 3, before_post_norm=True)
    x = tokens()
    f, recon = formula(x, t, subtracts=not says_transcode)
    check(d, x, f, recon)
    assert not agrees(d, x, f, recon - x @ t["W_skip"].mT + x @ t["W_skip"])


def test_a_transcoder_without_a_skip(tmp_path: Path) -> None:
    t = tensors()
    d = one(write(tmp_path / "layers.3.mlp", t, transcode=True))
    assert d.header.is_transcoder
    x = tokens()
    check(d, x, *formula(x, t, subtracts=False))


def test_a_repository_of_hookpoints_is_a_set(tmp_path: Path) -> None:
    for hookpoint in ("layers.0", "layers.0.mlp", "layers.10", "layers.2"):
        write(tmp_path / hookpoint, tensors())
    (tmp_path / "config.json").write_text('{"model": "some/model"}')
    with pytest.raises(FailedPrecondition, match="layer 10, but the model has layers 0 to 5"):
        opened(tmp_path)
    (tmp_path / "layers.10").rename(tmp_path / "layers.4")
    ids = [each.id for each in opened(tmp_path, "py.thia")]
    assert ids == [
        "py-thia-resid_post-0",
        "py-thia-mlp_out-0",
        "py-thia-resid_post-2",
        "py-thia-resid_post-4",
    ]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"activation": "groupmax"}, "activation is 'groupmax', but only topk"),
        ({"signed": True}, "signed is True, but only false"),
        ({"k": 0}, "k is 0"),
        ({"k": 31}, "k is 31, but only a whole number from 1 to its 30 latents is supported"),
        ({"skip_connection": True}, "lacks 'W_skip'"),
        ({"d_in": 13}, "says d_in 13"),
    ],
)
def test_what_is_not_understood_is_refused(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    write(tmp_path / "layers.3.mlp", tensors(), **changes)
    with pytest.raises(FailedPrecondition) as caught:
        opened(tmp_path / "layers.3.mlp")
    assert says in caught.value.message


@pytest.mark.parametrize("hookpoint", ["embed_tokens", "layers.3.mlp.gate_proj", "whatever"])
def test_an_unknown_hookpoint_says_what_to_do(tmp_path: Path, hookpoint: str) -> None:
    write(tmp_path / hookpoint, tensors())
    with pytest.raises(FailedPrecondition, match=r"end its URI in #site=POINT\.LAYER"):
        opened(tmp_path / hookpoint)
