"""Gemma Scope, the first (`params.npz`, Gemma 2) and the second (`params.safetensors`, Gemma 3).

    f = relu(x @ W_enc + b_enc) where that exceeds the threshold; b_dec is not subtracted from x

The first keeps what it is in folder names: `gemma-scope-2b-pt-mlp/layer_3/width_16k/average_l0_50`.
Its `mlp` lies after the post-norm, its `att` is the output projection's input, its transcoders read
before the gain of the MLP's norm (the gain was folded into the MLP when they were trained) and
write after the post-norm. The second names modules in `config.json`; its skip connection is used
as it is, x @ affine_skip_connection.
"""

import re
from pathlib import Path

import torch

from services.common.errors import FailedPrecondition
from services.inference.engine.dictionaries import hooks
from services.inference.engine.dictionaries.dictionary import Dictionary, InputNorm, JumpRelu
from services.inference.engine.dictionaries.files import TensorFile, read_json
from services.inference.engine.dictionaries.readings import (
    Origin,
    Reading,
    encoder,
    matrix,
    refuse_option,
)
from services.inference.engine.dictionaries.sites import Declared, Header, Point, Site

FIRST, SECOND, CONFIG = "params.npz", "params.safetensors", "config.json"

_KIND = re.compile(r"gemma-scope-\w+-(?:pt|it)-(res|mlp|att|transcoders)\b")
_LAYER = re.compile(r"\blayer_(\d+)\b")
_L0 = re.compile(r"\baverage_l0_(\d+)\b")
_SINKS = 4
"""Positions that instruction-tuned Gemma 3 uses as attention sinks; training left them out."""


def matches(folder: Path) -> bool:
    return (folder / FIRST).is_file() or (
        (folder / SECOND).is_file() and (folder / CONFIG).is_file()
    )


def read(folder: Path, origin: Origin) -> list[Reading]:
    """The one dictionary of the folder. Raises FailedPrecondition."""
    return [_first(folder, origin) if (folder / FIRST).is_file() else _second(folder, origin)]


def _first(folder: Path, origin: Origin) -> Reading:
    place = f"{origin.uri}/{folder}"
    kind, layer, l0 = _KIND.search(place), _LAYER.search(place), _L0.search(place)
    number = int(layer[1]) if layer else None
    sites = _first_sites(kind[1], number) if kind and number is not None else None
    if kind and kind[1] == "res" and "embedding" in folder.parts:
        sites = Site(Point.RESID_PRE, 0), Site(Point.RESID_PRE, 0)
    if sites is None:
        site_in, site_out = origin.place_unnamed(
            folder,
            number,
            before_post_norm=False,
            looked="no folder is called like gemma-scope-2b-pt-res, with layer_N in it",
        )
    else:
        site_in, site_out = origin.place(folder, *sites)
    declared = Declared(l0=float(l0[1]) if l0 else None, leave_out_first=1)
    file = TensorFile(folder / FIRST)
    return jump_relu(folder, file, (), "gemma-scope", site_in, site_out, declared, origin)


def _first_sites(kind: str, layer: int) -> tuple[Site, Site]:
    match kind:
        case "res":
            point = Point.RESID_POST
        case "mlp":
            point = Point.MLP_OUT
        case "att":
            point = Point.Z
        case _:
            return Site(Point.MLP_IN, layer, before_gain=True), Site(Point.MLP_OUT, layer)
    return Site(point, layer), Site(point, layer)


def _second(folder: Path, origin: Origin) -> Reading:
    path = folder / CONFIG
    config = read_json(path)
    if config.get("architecture") != "jump_relu":
        raise refuse_option(path, "architecture", config.get("architecture"), "jump_relu")
    if config.get("type", "sae") not in ("sae", "transcoder"):
        raise refuse_option(path, "type", config["type"], "sae or transcoder")
    if config.get("apply_b_dec_to_input"):
        raise refuse_option(path, "apply_b_dec_to_input", True, "false")
    affine = config.get("affine_connection", False)
    if not isinstance(affine, bool):
        raise refuse_option(path, "affine_connection", affine, "true or false")
    hook_in = config.get("hf_hook_point_in")
    hook_out = config.get("hf_hook_point_out") or hook_in
    site_in, site_out = hooks.hugging_face(str(hook_in)), hooks.hugging_face(str(hook_out))
    if site_in is None or site_out is None:
        site_in, site_out = origin.place_unnamed(
            path, None, before_post_norm=False, looked=f"it says {hook_in!r} to {hook_out!r}"
        )
    else:
        site_in, site_out = origin.place(path, site_in, site_out)
    tuned = "-it" in f"{config.get('model_name')} {origin.uri} {folder}"
    l0 = config.get("l0")
    declared = Declared(
        l0=float(l0) if isinstance(l0, int | float) else None,
        leave_out_first=_SINKS if tuned else 1,
    )
    file = TensorFile(folder / SECOND)
    if affine != ("affine_skip_connection" in file.shapes):
        raise FailedPrecondition(
            f"{path} says affine_connection {affine}, but {file.path} holds "
            f"{', '.join(file.shapes)}"
        )
    return jump_relu(folder, file, (path,), "gemma-scope-2", site_in, site_out, declared, origin)


def jump_relu(
    where: Path,
    file: TensorFile,
    others: tuple[Path, ...],
    format: str,
    site_in: Site,
    site_out: Site,
    declared: Declared,
    origin: Origin,
) -> Reading:
    """A file with Gemma Scope's tensors, in either spelling of their names."""
    e, d = ("w_enc", "w_dec") if "w_enc" in file.shapes else ("W_enc", "W_dec")
    affine = ["affine_skip_connection"] if "affine_skip_connection" in file.shapes else []
    file.require([e, d, "b_enc", "b_dec", "threshold", *affine], ["scaling_factor"])
    latents, d_out = file.length("b_enc"), file.length("b_dec")
    file.expect("threshold", latents, "b_enc")
    w_enc = encoder(file, e, latents, turned=False)
    w_dec = matrix(file, d, latents, d_out, turned=False)
    d_in = w_enc.rows
    skip = matrix(file, affine[0], d_in, d_out, turned=False) if affine else None
    header = Header(
        id="",
        site_in=site_in,
        site_out=site_out,
        d_in=d_in,
        d_out=d_out,
        latents=latents,
        activation="jumprelu",
        declared=declared,
        provenance=origin.provenance(format, file.path, *others),
        has_skip=skip is not None,
    )

    def load() -> Dictionary:
        if "scaling_factor" in file.shapes and bool((file.read("scaling_factor") != 1).any()):
            raise FailedPrecondition(f"{file.path}: 'scaling_factor' is not all ones")
        return Dictionary(
            header,
            w_enc.read(),
            w_dec.read(),
            file.read("b_enc"),
            b_in=torch.zeros(d_in),
            b_dec=file.read("b_dec"),
            activation=JumpRelu(file.read("threshold")),
            norm=InputNorm(),
            skip=None if skip is None else skip.read(),
        )

    return Reading(where, header, load)
