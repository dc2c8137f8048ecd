"""circuit-tracer's transcoder sets written from its layout."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from services.common.errors import FailedPrecondition
from services.inference.engine.dictionaries.sites import Point, Site
from services.inference.engine.dictionaries.widths import Widths
from tests.inference.dictionaries.opening import (
    HEADS,
    D,
    F,
    N,
    agrees,
    check,
    drawn,
    opened,
    save_npz,
    tokens,
)

CONFIG = {
    "model_name": "some/model",
    "model_kind": "transcoder_set",
    "feature_input_hook": "mlp.hook_in",
    "feature_output_hook": "mlp.hook_out",
    "scan": "some-scan",
}


def tensors(layer: int = 0) -> dict[str, Tensor]:
    random = drawn(20 + layer)
    return {
        "W_enc": random(N, D),
        "W_dec": random(N, D),
        "b_enc": random(N) - 0.5,
        "b_dec": random(D),
    }


def write(folder: Path, layers: list[dict[str, Tensor]], **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({**CONFIG, **changes}))
    for layer, t in enumerate(layers):
        save_file(t, folder / f"layer_{layer}.safetensors")
    return folder


def pre(x: Tensor, t: dict[str, Tensor]) -> Tensor:
    return x @ t["W_enc"].T + t["b_enc"]


def recon(x: Tensor, f: Tensor, t: dict[str, Tensor]) -> Tensor:
    y = f @ t["W_dec"] + t["b_dec"]
    return y + x @ t["W_skip"].T if "W_skip" in t else y


def test_a_set_of_relu_transcoders(tmp_path: Path) -> None:
    layers = [tensors(layer) for layer in range(3)]
    registered = opened(write(tmp_path, layers), "ct")
    assert [each.id for each in registered] == [f"ct-mlp_in-{layer}" for layer in range(3)]
    x = tokens()
    for layer, each in enumerate(registered):
        assert each.header.site_in == Site(Point.MLP_IN, layer)
        assert each.header.site_out == Site(Point.MLP_OUT, layer, before_post_norm=True)
        f = torch.relu(pre(x, layers[layer]))
        check(each.load(), x, f, recon(x, f, layers[layer]))
        assert not agrees(each.load(), x, f, recon(x, f, layers[layer - 1]))


def test_sites_after_the_post_norm_and_before_the_mlp_s_norm(tmp_path: Path) -> None:
    hooks = {"feature_input_hook": "hook_resid_mid", "feature_output_hook": "hook_mlp_out"}
    (registered,) = opened(write(tmp_path, [tensors()], **hooks))
    assert registered.header.site_in == Site(Point.RESID_MID, 0)
    assert registered.header.site_out == Site(Point.MLP_OUT, 0, before_post_norm=False)


@pytest.mark.parametrize("scalar", [False, True])
def test_jumprelu(tmp_path: Path, scalar: bool) -> None:
    t = tensors()
    threshold = torch.tensor([0.4]) if scalar else drawn(7)(N).abs()
    t["activation_function.threshold"] = threshold
    (registered,) = opened(write(tmp_path, [t]))
    x = tokens()
    f = pre(x, t) * (pre(x, t) > threshold)
    check(registered.load(), x, f, recon(x, f, t))
    t["activation_function.threshold"] = threshold - 5
    (registered,) = opened(write(tmp_path, [t], activation="jumprelu"))
    with pytest.raises(FailedPrecondition, match="negative somewhere"):
        registered.load()


def test_topk_keeps_negative_values(tmp_path: Path) -> None:
    t = tensors()
    t["b_enc"] -= 4
    (registered,) = opened(write(tmp_path, [t], activation="topk", k=6))
    x = tokens()
    values, index = pre(x, t).topk(6)
    f = torch.zeros(len(x), N).scatter(-1, index, values)
    assert (f < 0).any()
    check(registered.load(), x, f, recon(x, f, t))
    assert not agrees(registered.load(), x, f.relu(), recon(x, f.relu(), t))


def test_a_skip_is_turned(tmp_path: Path) -> None:
    t = {**tensors(), "W_skip": drawn(9)(D, D)}
    (registered,) = opened(write(tmp_path, [t]))
    x = tokens()
    f = torch.relu(pre(x, t))
    check(registered.load(), x, f, recon(x, f, t))
    assert not agrees(registered.load(), x, f, recon(x, f, t | {"W_skip": t["W_skip"].T}))


def test_a_list_of_gemma_scope_files(tmp_path: Path) -> None:
    """W_enc is [d, N] in those and [N, d] in circuit-tracer's own."""
    t = tensors()
    threshold = drawn(7)(N).abs()
    save_npz(tmp_path / "params.npz", {**t, "W_enc": t["W_enc"].T, "threshold": threshold})
    (tmp_path / "set").mkdir()
    hooks = {"feature_input_hook": "ln2.hook_normalized", "feature_output_hook": "hook_mlp_out"}
    write(tmp_path / "set", [], transcoders=["../params.npz"], **hooks)
    gain = torch.rand(D) + 0.5
    widths = Widths(6, D, F, HEADS, mlp_norms=[(gain, torch.zeros(D))])
    (registered,) = opened(tmp_path / "set", widths=widths)
    x = tokens()
    f = torch.relu(pre(x, t)) * (pre(x, t) > threshold)
    check(registered.load(), x * gain, f, recon(x, f, t))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"model_kind": "cross_layer_transcoder"},
            "cross-layer transcoder: its latents write into",
        ),
        ({"model_kind": "other"}, "model_kind is 'other'"),
        ({"activation": "gelu"}, "activation is 'gelu'"),
        ({"activation": "topk"}, "k is None"),
        ({"activation": "jumprelu"}, "lacks 'activation_function.threshold'"),
        ({"feature_input_hook": "hook_q"}, "feature_input_hook is 'hook_q'"),
        ({"transcoders": ["nowhere.safetensors"]}, "lists nowhere.safetensors, which does not"),
        ({"transcoders": "all"}, "transcoders is 'all'"),
    ],
)
def test_what_is_not_understood_is_refused(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    write(tmp_path, [tensors()], **changes)
    with pytest.raises(FailedPrecondition) as caught:
        opened(tmp_path)
    assert says in caught.value.message


def test_tensors_that_contradict_the_config(tmp_path: Path) -> None:
    t = tensors()
    write(tmp_path, [{**t, "k": torch.tensor(5)}], activation="topk", k=6)
    with pytest.raises(FailedPrecondition, match="k is 6, but only 5"):
        opened(tmp_path)
    write(tmp_path, [{**t, "activation_function.threshold": torch.ones(N)}], activation="relu")
    with pytest.raises(FailedPrecondition, match=r"'relu', but .* holds activation_function"):
        opened(tmp_path)
    write(tmp_path, [{**t, "k": torch.tensor(5)}], activation="relu")
    with pytest.raises(FailedPrecondition, match="holds k"):
        opened(tmp_path)


def test_yaml_runs_nothing(tmp_path: Path) -> None:
    write(tmp_path, [tensors()])
    (tmp_path / "config.yaml").write_text("a: !!python/object/apply:os.mkdir [ran]")
    with pytest.raises(FailedPrecondition, match="not readable YAML"):
        opened(tmp_path)
    (tmp_path / "config.yaml").write_text("- a list")
    with pytest.raises(FailedPrecondition, match="should hold a YAML mapping"):
        opened(tmp_path)


def test_a_cross_layer_folder_without_its_config_is_named(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "W_enc_0.safetensors")
    with pytest.raises(FailedPrecondition, match="belongs to a cross-layer transcoder"):
        opened(tmp_path)
