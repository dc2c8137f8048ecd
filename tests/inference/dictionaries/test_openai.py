"""OpenAI's .pt files, written from their layout, and those of the parity data."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import GPT2LMHeadModel

from services.common.errors import FailedPrecondition
from services.inference.engine.dictionaries.dictionary import InputNorm, NormKind
from services.inference.engine.dictionaries.sites import Point, Site
from services.inference.engine.dictionaries.widths import Widths
from tests.inference.dictionaries.opening import (
    D,
    F,
    N,
    agrees,
    check,
    drawn,
    one,
    opened,
    tokens,
)


def state(width: int = D, seed: int = 3) -> dict[str, Any]:
    random = drawn(seed)
    return {
        "pre_bias": random(width),
        "latent_bias": random(N),
        "stats_last_nonzero": torch.zeros(N, dtype=torch.long),
        "latents_activation_frequency": torch.zeros(N, dtype=torch.float64),
        "latents_mean_square": torch.zeros(N),
        "encoder.weight": random(N, width),
        "decoder.weight": random(width, N),
    }


V5 = {"activation": "TopK", "activation_state_dict": {"k": 4, "postact_fn": "ReLU"}}


def write(folder: Path, content: Any, layer: int = 3) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(content, folder / f"{layer}.pt")
    return folder / f"{layer}.pt"


def relu(x: Tensor, t: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    f = torch.relu((x - t["pre_bias"]) @ t["encoder.weight"].T + t["latent_bias"])
    return f, f @ t["decoder.weight"].T + t["pre_bias"]


def top_k(x: Tensor, t: dict[str, Tensor], normalised: bool = True) -> tuple[Tensor, Tensor]:
    mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    x_n = (x - mean) / (std + 1e-5) if normalised else x
    pre = (x_n - t["pre_bias"]) @ t["encoder.weight"].T + t["latent_bias"]
    values, index = pre.topk(4)
    f = torch.zeros_like(pre).scatter(-1, index, values.relu())
    recon = f @ t["decoder.weight"].T + t["pre_bias"]
    return f, recon * std + mean if normalised else recon


@pytest.mark.parametrize("activation", [{}, {"activation": "ReLU", "activation_state_dict": {}}])
def test_relu_files_normalise_nothing(tmp_path: Path, activation: dict[str, Any]) -> None:
    t = state()
    d = one(write(tmp_path / "resid_delta_mlp_v4" / "autoencoders", {**t, **activation}))
    assert d.header.site_in == Site(Point.MLP_OUT, 3)
    x = tokens()
    check(d, x, *relu(x, t))
    f = torch.relu(x @ t["encoder.weight"].T + t["latent_bias"])
    assert not agrees(d, x, f, f @ t["decoder.weight"].T + t["pre_bias"])


def test_v5_normalises_and_keeps_k(tmp_path: Path) -> None:
    t = state()
    d = one(write(tmp_path / "resid_post_mlp_v5_32k", {**t, **V5}))
    assert d.header.site_in == Site(Point.RESID_POST, 3)
    x = tokens()
    check(d, x, *top_k(x, t))
    assert not agrees(d, x, *relu(x, t))
    assert not agrees(d, x, *top_k(x, t, normalised=False))


def test_a_tied_decoder(tmp_path: Path) -> None:
    t = state()
    del t["decoder.weight"]
    d = one(write(tmp_path / "resid_delta_attn", t))
    x = tokens()
    check(d, x, *relu(x, {**t, "decoder.weight": t["encoder.weight"].T}))


@pytest.mark.parametrize(
    ("folder", "point"),
    [
        ("resid_delta_mlp", Point.MLP_OUT),
        ("ae-resid-delta-attn-v4", Point.ATTN_OUT),
        ("mlp_post_act_v1", Point.MLP_ACT),
        ("resid_post_attn_v5_128k", Point.RESID_MID),
        ("resid_post_mlp_v5_32k", Point.RESID_POST),
    ],
)
def test_a_folder_is_a_set_named_by_site_and_layer(
    tmp_path: Path, folder: str, point: Point
) -> None:
    width = F if point is Point.MLP_ACT else D
    for layer in (1, 0, 2):
        write(tmp_path / folder, state(width), layer)
    registered = opened(tmp_path / folder, "ae")
    assert [each.id for each in registered] == [f"ae-{point}-{layer}" for layer in range(3)]
    assert {each.set_name for each in registered} == {"ae"}
    assert registered[2].header.site_in == Site(point, 2)


def test_a_file_in_no_telling_folder_says_what_to_do(tmp_path: Path) -> None:
    path = write(tmp_path / "downloads", state())
    with pytest.raises(FailedPrecondition, match=r"#site=POINT\.LAYER, for example"):
        opened(path)
    assert one(f"{path}#site=attn_out").header.site_in == Site(Point.ATTN_OUT, 3)
    other = path.rename(path.with_name("mine.pt"))
    assert one(f"{other}#site=attn_out.5").header.site_in == Site(Point.ATTN_OUT, 5)
    with pytest.raises(FailedPrecondition, match="end its URI"):
        opened(f"{other}#site=attn_out")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"activation": "Identity"}, "activation is 'Identity', but only ReLU or TopK"),
        ({**V5, "activation_state_dict": {}}, "activation_state_dict.k is None"),
        (
            {**V5, "activation_state_dict": {"k": 4, "postact_fn": "Identity"}},
            "postact_fn is 'Identity'",
        ),
        ({"pre_bias": torch.zeros(D + 1)}, "'encoder.weight' is [30, 12], but"),
        ({"extra": torch.zeros(2)}, "has 'extra' [2], unknown here"),
        ({"version": 5}, "version is 5"),
    ],
)
def test_what_is_not_understood_is_refused(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    write(tmp_path / "resid_delta_mlp", {**state(), **changes})
    with pytest.raises(FailedPrecondition) as caught:
        opened(tmp_path / "resid_delta_mlp")
    assert says in caught.value.message


class Runs:
    """What a malicious file pickles."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_runs_something_is_refused_and_does_not_run(tmp_path: Path) -> None:
    write(tmp_path / "resid_delta_mlp", {**state(), "pre_bias": Runs(tmp_path / "ran")})
    with pytest.raises(FailedPrecondition, match="not a file of tensors alone"):
        opened(tmp_path / "resid_delta_mlp")
    assert not (tmp_path / "ran").exists()


def test_nor_does_one_of_torch_s_old_layout(tmp_path: Path) -> None:
    path = write(tmp_path / "resid_delta_mlp", state())
    content = {**state(), "pre_bias": Runs(tmp_path / "ran")}
    torch.save(content, path, _use_new_zipfile_serialization=False)
    with pytest.raises(FailedPrecondition, match="not a file of tensors alone"):
        opened(path)
    assert not (tmp_path / "ran").exists()
    t = state()
    torch.save(t, path, _use_new_zipfile_serialization=False)
    x = tokens()
    check(one(path), x, *relu(x, t))


def test_something_that_is_no_file_of_tensors(tmp_path: Path) -> None:
    path = write(tmp_path / "resid_delta_mlp", [1, 2])
    with pytest.raises(FailedPrecondition, match="holds no state dict"):
        opened(path)
    path.write_text("not a file of torch's")
    with pytest.raises(FailedPrecondition, match="not a file of tensors alone"):
        opened(path)


CASES = {
    ("05a_ae_both", "ae-resid-delta-mlp-v4"): (Point.MLP_OUT, "mlp"),
    ("05a_ae_both", "ae-resid-delta-attn-v4"): (Point.ATTN_OUT, "attention"),
    ("05d_ae_mlppost", "ae-mlp-post-act-v4"): (Point.MLP_ACT, "mlp"),
    ("09b_topk_ae_mlp_only", "ae-resid-delta-mlp-topk"): (Point.MLP_OUT, "mlp"),
}


@pytest.mark.shared
@pytest.mark.parametrize(("case", "name"), CASES)
def test_latents_are_those_of_openai_s_server(shared_data: Path, case: str, name: str) -> None:
    """Its server reads TopK files without their normalisation, which is its fault to reproduce."""
    point, kind = CASES[case, name]
    folder = shared_data / "parity"
    widths = Widths(layers=3, residual=64, neurons=256, heads=64)
    registered = opened(folder / "dictionaries" / name, widths=widths)
    sites = _sites(folder, case)
    with np.load(folder / "expected" / f"{case}.npz") as arrays:
        for layer, each in enumerate(registered):
            expected = torch.from_numpy(
                arrays[f"sub0/activation/online_{kind}_autoencoder_latent/L{layer}"]
            )
            d = each.load()
            assert d.header.site_in == Site(point, layer)
            x, near = sites[point, layer], 1e-4 * float(expected.abs().max())
            assert_close(replace(d, norm=InputNorm()).encode(x), expected, atol=near, rtol=0)
            ours = torch.allclose(d.encode(x), expected, atol=near)
            assert ours is (d.norm.kind is NormKind.NONE)


def _sites(folder: Path, case: str) -> dict[tuple[Point, int], Tensor]:
    """The points of every layer, taken from Hugging Face's modules."""
    request = json.loads((folder / "requests" / f"{case}.json").read_text())
    model = GPT2LMHeadModel.from_pretrained(folder / "model").eval()
    sites: dict[tuple[Point, int], Tensor] = {}

    def keep(point: Point, layer: int, take: Any) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            sites[point, layer] = take(inputs, output)[0].detach()

        return hook

    for layer, block in enumerate(model.transformer.h):
        block.mlp.register_forward_hook(keep(Point.MLP_OUT, layer, lambda _, output: output))
        block.mlp.c_proj.register_forward_hook(
            keep(Point.MLP_ACT, layer, lambda inputs, _: inputs[0])
        )
        block.attn.register_forward_hook(keep(Point.ATTN_OUT, layer, lambda _, output: output[0]))
    with torch.no_grad():
        model(torch.tensor([request["read_outs"][0]["tokens"]]))
    return sites
