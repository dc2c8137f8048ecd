"""circuit-tracer's per-layer transcoders: `config.yaml` and a `layer_N.safetensors` per layer.

    pre = x @ W_enc^T + b_enc;  recon = f @ W_dec + b_dec + x @ W_skip^T

`W_enc` is [N, d_in] here. Its TopK keeps negative values, unlike everyone else's. The config may
list files elsewhere (`transcoders:`), Gemma Scope's among them. Cross-layer transcoders, which
write into many layers, are refused.
"""

import re
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import torch
import yaml

from services.common.errors import FailedPrecondition
from services.inference.engine import hub
from services.inference.engine.dictionaries import hooks
from services.inference.engine.dictionaries.dictionary import (
    Activation,
    Dictionary,
    InputNorm,
    JumpRelu,
    Relu,
    TopK,
)
from services.inference.engine.dictionaries.files import TensorFile
from services.inference.engine.dictionaries.readers import gemma_scope
from services.inference.engine.dictionaries.readings import (
    Origin,
    Reading,
    checked_k,
    encoder,
    matrix,
    refuse_option,
)
from services.inference.engine.dictionaries.sites import Declared, Header, Site

CONFIG = "config.yaml"
THRESHOLD = "activation_function.threshold"

_FILE = re.compile(r"layer_(\d+)\.safetensors\Z")


def matches(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def read(folder: Path, origin: Origin) -> list[Reading]:
    """The transcoders of all layers, in their order. Raises FailedPrecondition."""
    path = folder / CONFIG
    config = _config(path)
    readings = []
    for layer, file_path in sorted(_files(folder, path, config).items()):
        sites = []
        for key in ("feature_input_hook", "feature_output_hook"):
            site = hooks.in_block(str(config.get(key)), layer)
            if site is None:
                raise refuse_option(path, key, config.get(key), f"one of {hooks.known_hooks()}")
            sites.append(site)
        site_in, site_out = origin.place(path, *sites)
        file = TensorFile(file_path)
        if "threshold" in file.shapes:
            readings.append(
                gemma_scope.jump_relu(
                    file_path,
                    file,
                    (path,),
                    "circuit-tracer",
                    site_in,
                    site_out,
                    Declared(),
                    origin,
                )
            )
        else:
            readings.append(_read_file(path, config, file, site_in, site_out, origin))
    return readings


def _config(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, OSError, ValueError) as error:
        raise FailedPrecondition(f"{path} is not readable YAML: {hub.sentence(error)}") from error
    if not isinstance(config, dict):
        raise FailedPrecondition(f"{path} should hold a YAML mapping")
    kind = config.get("model_kind")
    if kind == "cross_layer_transcoder":
        raise FailedPrecondition(
            f"{path} describes a cross-layer transcoder: its latents write into many layers at "
            "once, which this version does not support; per-layer transcoders work"
        )
    if kind != "transcoder_set":
        raise refuse_option(path, "model_kind", kind, "transcoder_set")
    if config.get("activation") not in (None, "topk", "relu", "jumprelu"):
        raise refuse_option(path, "activation", config["activation"], "topk, relu or jumprelu")
    return config


def _files(folder: Path, path: Path, config: dict[str, Any]) -> dict[int, Path]:
    listed = config.get("transcoders")
    if listed is None:
        found = {int(m[1]): p for p in folder.iterdir() if (m := _FILE.match(p.name))}
        if not found:
            raise FailedPrecondition(f"{folder} holds {CONFIG}, but no layer_N.safetensors")
        return found
    if not isinstance(listed, list) or not all(isinstance(entry, str) for entry in listed):
        raise refuse_option(path, "transcoders", listed, "a list of files")
    return {layer: _file(folder, path, entry) for layer, entry in enumerate(listed)}


def _file(folder: Path, path: Path, entry: str) -> Path:
    """A listed file: beside the config, or `hf://org/repo/file?revision=...` (or `@...`)."""
    if not entry.startswith("hf://"):
        file = folder / entry
    else:
        url = urlsplit(entry)
        location, _, pinned = url.path.partition("@")
        repo, _, name = location.lstrip("/").partition("/")
        revision = parse_qs(url.query).get("revision", [pinned or None])[0]
        root, _ = hub.folder(
            f"{url.netloc}/{repo}", [name], lambda cached: (cached / name).is_file(), revision
        )
        file = root / name
    if not file.is_file():
        raise FailedPrecondition(f"{path} lists {entry}, which does not exist")
    return file


def _read_file(
    path: Path,
    config: dict[str, Any],
    file: TensorFile,
    site_in: Site,
    site_out: Site,
    origin: Origin,
) -> Reading:
    optional = [name for name in (THRESHOLD, "W_skip", "k") if name in file.shapes]
    file.require(["W_enc", "W_dec", "b_enc", "b_dec", *optional])
    latents, d_out = file.length("b_enc"), file.length("b_dec")
    w_enc = encoder(file, "W_enc", latents, turned=True)
    w_dec = matrix(file, "W_dec", latents, d_out, turned=False)
    d_in = w_enc.rows
    skip = matrix(file, "W_skip", d_in, d_out, turned=True) if "W_skip" in file.shapes else None
    function = config.get("activation") or ("jumprelu" if THRESHOLD in optional else "relu")
    k = int(file.number("k")) if "k" in optional else None
    match function:
        case "topk":
            said = checked_k(path, "k", config.get("k", k), latents)
            if k not in (None, said):
                raise refuse_option(path, "k", said, f"{k}, as in {file.path},")
            k = said
        case "jumprelu":
            if THRESHOLD not in optional:
                file.require(["W_enc", "W_dec", "b_enc", "b_dec", THRESHOLD], optional)
            if file.shapes[THRESHOLD] not in ((), (1,)):
                file.expect(THRESHOLD, latents, "b_enc")
    if function != "jumprelu" and THRESHOLD in optional:
        raise FailedPrecondition(
            f"{path}: activation is {function!r}, but {file.path} holds {THRESHOLD}"
        )
    if function != "topk" and k is not None:
        raise FailedPrecondition(f"{path}: activation is {function!r}, but {file.path} holds k")
    header = Header(
        id="",
        site_in=site_in,
        site_out=site_out,
        d_in=d_in,
        d_out=d_out,
        latents=latents,
        activation=function,
        declared=Declared(),
        provenance=origin.provenance("circuit-tracer", file.path, path),
        has_skip=skip is not None,
    )

    def load() -> Dictionary:
        activation: Activation = Relu()
        if function == "topk":
            activation = TopK(k or 0, signed=True)
        elif function == "jumprelu":
            threshold = file.read(THRESHOLD).expand(latents).clone()
            if bool((threshold < 0).any()):
                raise FailedPrecondition(
                    f"{file.path}: {THRESHOLD} is negative somewhere, which lets negative "
                    "activations through; only thresholds of at least 0 are supported"
                )
            activation = JumpRelu(threshold)
        return Dictionary(
            header,
            w_enc.read(),
            w_dec.read(),
            file.read("b_enc"),
            b_in=torch.zeros(d_in),
            b_dec=file.read("b_dec"),
            activation=activation,
            norm=InputNorm(),
            skip=None if skip is None else skip.read(),
        )

    return Reading(file.path, header, load)
