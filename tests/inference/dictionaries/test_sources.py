"""URIs: what they name, what dictionaries are called, what is refused before weights are read."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from services.common.errors import FailedPrecondition
from services.common.settings import DictionarySource
from services.inference.engine import hub
from services.inference.engine.dictionaries.sites import Point, Site
from services.inference.engine.dictionaries.sources import open_dictionaries
from services.inference.engine.dictionaries.widths import Widths
from tests.inference.dictionaries.opening import WIDTHS, D, N, one, opened


def write(folder: Path, hook: str = "blocks.2.hook_mlp_out", d: int = D) -> Path:
    """A SAELens folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps({"hook_name": hook}))
    shapes = {"W_enc": (d, N), "W_dec": (N, d), "b_enc": (N,), "b_dec": (d,)}
    save_file({k: torch.ones(v) for k, v in shapes.items()}, folder / "sae_weights.safetensors")
    return folder


def test_one_folder_is_called_as_given_and_several_by_site(tmp_path: Path) -> None:
    write(tmp_path / "release" / "second", "blocks.10.hook_mlp_out")
    write(tmp_path / "release" / "first", "blocks.2.hook_attn_out")
    wide = Widths(layers=12, residual=D, neurons=None, heads=D)
    both = opened(tmp_path / "release", "my.set", wide)
    assert [each.id for each in both] == ["my-set-attn_out-2", "my-set-mlp_out-10"]
    assert {each.set_name for each in both} == {"my-set"}
    (alone,) = opened(tmp_path / "release" / "first", "alone", wide)
    assert (alone.id, alone.set_name) == ("alone", "alone")
    file = tmp_path / "release" / "first" / "sae_weights.safetensors"
    assert opened(file, "alone", wide)[0].header == opened(f"{file}", "alone", wide)[0].header


def test_nothing_is_read_before_it_is_needed(tmp_path: Path) -> None:
    (registered,) = opened(write(tmp_path))
    weights = tmp_path / "sae_weights.safetensors"
    before = registered.header.provenance.weights_hash
    status = weights.stat()
    write(tmp_path)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    with pytest.raises(FailedPrecondition, match="has changed since the service started"):
        registered.load()
    assert opened(tmp_path)[0].header.provenance.weights_hash == before


def test_names_that_collide_are_refused(tmp_path: Path) -> None:
    write(tmp_path)
    sources = [DictionarySource(name, str(tmp_path), False) for name in ("a.b", "a-b")]
    with pytest.raises(
        FailedPrecondition, match=r"two dictionaries would be called 'a-b': /.* and /"
    ):
        open_dictionaries(sources, WIDTHS)
    assert [each.id for each in open_dictionaries(sources[:1], WIDTHS)] == ["a-b"]


def test_unchecked_is_remembered(tmp_path: Path) -> None:
    write(tmp_path)
    assert opened(tmp_path, unchecked=True)[0].unchecked
    assert not opened(tmp_path)[0].unchecked


def test_a_site_in_the_uri_beats_the_files(tmp_path: Path) -> None:
    write(tmp_path)
    assert one(f"{tmp_path}#site=resid_post.4").header.site_in == Site(Point.RESID_POST, 4)
    moved = one(f"{tmp_path}#site=mlp_in.3:mlp_out.3").header
    assert (str(moved.site_in), str(moved.site_out)) == ("mlp_in.3", "mlp_out.3")


@pytest.mark.parametrize(
    ("fragment", "says"),
    [
        ("layer=3", "only #site=POINT.LAYER or"),
        ("site=mlp_out.x", "only #site=POINT.LAYER or"),
        ("site=a.1:b.1:c.1", "only #site=POINT.LAYER or"),
        ("site=mlp.3", "'mlp' is no point; the points are resid_pre, resid_mid"),
        ("site=mlp_in.3:mlp_out.4", "both sites need the same layer"),
        ("site=resid_post.3.before", ".before means something at attn_out, mlp_out, mlp_in only"),
        ("site=mlp_in.3", "reads and writes mlp_in.3, which is nothing that a layer adds"),
        ("site=resid_pre.3:resid_post.3", "only transcoders that write mlp_out are supported"),
        ("site=mlp_act.3", "reads 12 channels at mlp_act.3, but the model's mlp_act is 20 wide"),
        ("site=mlp_out.6", "reads layer 6, but the model has layers 0 to 5"),
    ],
)
def test_a_suffix_that_is_not_understood(tmp_path: Path, fragment: str, says: str) -> None:
    write(tmp_path)
    with pytest.raises(FailedPrecondition) as caught:
        opened(f"{tmp_path}#{fragment}")
    assert says in caught.value.message


def test_the_same_weights_can_be_tried_elsewhere(tmp_path: Path) -> None:
    (registered,) = opened(write(tmp_path))
    elsewhere = Site(Point.RESID_POST, 4)
    moved = registered.at(elsewhere, elsewhere).load()
    assert moved.header.site_in == moved.header.site_out == elsewhere
    assert moved.id == registered.id
    assert torch.equal(moved.w_enc, registered.load().w_enc)


def test_points_that_the_model_does_not_have(tmp_path: Path) -> None:
    write(tmp_path)
    no_neurons = Widths(layers=6, residual=D, neurons=None, heads=D)
    with pytest.raises(FailedPrecondition, match="this model has no mlp_act"):
        opened(f"{tmp_path}#site=mlp_act.3", widths=no_neurons)
    parallel = Widths(layers=6, residual=D, neurons=D, heads=D, parallel=True)
    with pytest.raises(FailedPrecondition, match="this model has no resid_mid"):
        opened(f"{tmp_path}#site=resid_mid.3", widths=parallel)


def test_a_folder_without_dictionaries_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(FailedPrecondition) as caught:
        opened(tmp_path)
    assert "holds no dictionary: it has model.safetensors, and below it" in caught.value.message
    assert "cfg.json + sae_weights.safetensors (SAELens)" in caught.value.message
    with pytest.raises(FailedPrecondition, match="is not recognised beside model"):
        opened(tmp_path / "model.safetensors")


@pytest.mark.parametrize("content", ["", "{", "[1]", "\x00\xff"])
def test_a_config_that_is_not_json(tmp_path: Path, content: str) -> None:
    write(tmp_path)
    (tmp_path / "cfg.json").write_text(content, encoding="latin-1")
    with pytest.raises(FailedPrecondition, match=r"cfg\.json"):
        opened(tmp_path)


def test_a_damaged_file_of_weights(tmp_path: Path) -> None:
    write(tmp_path)
    weights = tmp_path / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(FailedPrecondition, match="is no safetensors file"):
        opened(tmp_path)


@pytest.mark.parametrize("uri", ["/no/such/folder", "./nowhere", "single", "hf://one", "a/../b/c"])
def test_a_uri_that_is_neither_path_nor_repository(uri: str) -> None:
    with pytest.raises(FailedPrecondition, match="is neither an existing path nor hf://"):
        opened(uri)


@pytest.mark.parametrize("uri", ["hf://nobody/nothing/layer_3@main", "nobody/nothing/layer_3"])
def test_an_unreachable_hub_is_one_sentence_within_five_seconds(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(FailedPrecondition) as caught:
        opened(uri)
    assert time.monotonic() - started < 5
    message = caught.value.message
    assert message.startswith("dictionary 'mine': 'nobody/nothing' is neither a folder nor whole")
    assert caught.value.reason == "MODEL_NOT_AVAILABLE"


def test_a_hub_uri_names_repository_path_and_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "0123abcd"
    write(snapshot / "layer_2")
    asked: list[dict[str, Any]] = []

    def download(source: str, **more: Any) -> str:
        asked.append({"source": source, **more})
        return str(snapshot)

    monkeypatch.setattr(hub, "snapshot_download", download)
    (registered,) = opened("hf://org/repo/layer_2@v1.0")
    assert registered.id == "mine"
    assert registered.header.provenance.revision == "0123abcd"
    assert registered.header.provenance.uri == "hf://org/repo/layer_2@v1.0"
    assert (asked[0]["source"], asked[0]["revision"]) == ("org/repo", "v1.0")
    assert "layer_2/*.safetensors" in asked[0]["allow_patterns"]
    monkeypatch.setattr(hub, "unreachable", lambda: "")
    with pytest.raises(FailedPrecondition, match="'org/repo' has no 'layer_9'"):
        opened("org/repo/layer_9")


@pytest.mark.parametrize("reachable", [True, False])
def test_a_cached_part_of_a_set_is_completed_where_the_hub_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reachable: bool
) -> None:
    cached, whole = tmp_path / "cached", tmp_path / "whole"
    for folder, layers in ((cached, (2,)), (whole, (1, 2))):
        for layer in layers:
            write(folder / f"layer_{layer}", f"blocks.{layer}.hook_mlp_out")

    def download(source: str, *, local_files_only: bool = False, **more: Any) -> str:
        assert more["revision"] is None
        return str(cached if local_files_only else whole)

    monkeypatch.setattr(hub, "snapshot_download", download)
    monkeypatch.setattr(hub, "unreachable", lambda: "" if reachable else "it is away")
    ids = [each.id for each in opened("org/repo")]
    assert ids == (["mine-mlp_out-1"] if reachable else []) + ["mine-mlp_out-2"]
