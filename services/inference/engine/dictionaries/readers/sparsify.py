"""EleutherAI sparsify: `HOOKPOINT/cfg.json` and `HOOKPOINT/sae.safetensors`.

    pre = (x - b_dec unless it transcodes) @ encoder.weight^T + encoder.bias, relu, top k
    recon = f @ W_dec + b_dec + x @ W_skip^T

The hookpoint is the folder: the Hugging Face module whose output it reads (`layers.5`,
`layers.5.mlp`), or whose input and output, if it transcodes. Modules end before a post-norm. Skip
transcoders of the first versions do not say `transcode`, and do subtract b_dec.
"""

import re
from pathlib import Path

import torch

from services.common.errors import FailedPrecondition
from services.inference.engine.dictionaries.dictionary import Dictionary, InputNorm, TopK
from services.inference.engine.dictionaries.files import TensorFile, read_json
from services.inference.engine.dictionaries.readings import (
    Origin,
    Reading,
    checked_k,
    encoder,
    matrix,
    refuse_option,
)
from services.inference.engine.dictionaries.sites import Declared, Header, Point, Site

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"

_HOOKPOINT = re.compile(r"(?:[a-z_]+\.)*(?:layers|h)\.(\d+)(?:\.([a-z_]+))?\Z")
_MODULES = {
    None: Point.RESID_POST,
    "mlp": Point.MLP_OUT,
    "self_attn": Point.ATTN_OUT,
    "attention": Point.ATTN_OUT,
    "attn": Point.ATTN_OUT,
}


def matches(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def read(folder: Path, origin: Origin) -> list[Reading]:
    """The one dictionary of the folder. Raises FailedPrecondition."""
    path = folder / CONFIG
    config = read_json(path)
    if (function := config.get("activation", "topk")) != "topk":
        raise refuse_option(path, "activation", function, "topk")
    if config.get("signed"):
        raise refuse_option(path, "signed", config["signed"], "false")
    transcodes, skips = (_flag(path, config, key) for key in ("transcode", "skip_connection"))
    site_in, site_out = _sites(folder, transcodes or skips, origin)

    file = TensorFile(folder / WEIGHTS)
    required = ["encoder.weight", "encoder.bias", "W_dec", "b_dec"]
    file.require([*required, "W_skip"] if skips else required)
    latents, width = file.length("encoder.bias"), file.length("b_dec")
    k = checked_k(path, "k", config.get("k"), latents)
    w_enc = encoder(file, "encoder.weight", latents, turned=True)
    w_dec = matrix(file, "W_dec", latents, width, turned=False)
    skip = matrix(file, "W_skip", w_enc.rows, width, turned=True) if skips else None
    said = config.get("num_latents") or w_enc.rows * int(config.get("expansion_factor", 32))
    if said != latents or config.get("d_in", w_enc.rows) != w_enc.rows or w_enc.rows != width:
        raise FailedPrecondition(
            f"{path} says d_in {config.get('d_in')} and {said} latents, but in {file.path} "
            f"encoder.weight is {list(file.shapes['encoder.weight'])} and b_dec [{width}]"
        )
    header = Header(
        id="",
        site_in=site_in,
        site_out=site_out,
        d_in=width,
        d_out=width,
        latents=latents,
        activation="topk",
        declared=Declared(),
        provenance=origin.provenance("sparsify", path, file.path),
        has_skip=skips,
    )

    def load() -> Dictionary:
        b_dec = file.read("b_dec")
        return Dictionary(
            header,
            w_enc.read(),
            w_dec.read(),
            file.read("encoder.bias"),
            b_in=torch.zeros(width) if transcodes else b_dec.clone(),
            b_dec=b_dec,
            activation=TopK(k),
            norm=InputNorm(),
            skip=None if skip is None else skip.read(),
        )

    return [Reading(folder, header, load)]


def _flag(path: Path, config: dict[str, object], key: str) -> bool:
    value = config.get(key, False)
    if not isinstance(value, bool):
        raise refuse_option(path, key, value, "true or false")
    return value


def _sites(folder: Path, transcodes: bool, origin: Origin) -> tuple[Site, Site]:
    hookpoint = _HOOKPOINT.match(folder.name)
    point = _MODULES.get(hookpoint[2]) if hookpoint else None
    if hookpoint is None or point is None or (transcodes and point is not Point.MLP_OUT):
        return origin.place_unnamed(
            folder,
            int(hookpoint[1]) if hookpoint else None,
            before_post_norm=True,
            looked="its folder should be layers.N, layers.N.mlp or layers.N.self_attn, "
            "and layers.N.mlp if it transcodes",
        )
    layer = int(hookpoint[1])
    site_out = Site(point, layer, before_post_norm=True)
    return origin.place(folder, Site(Point.MLP_IN, layer) if transcodes else site_out, site_out)
