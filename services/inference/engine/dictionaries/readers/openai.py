"""OpenAI's `LAYER.pt`: sparse_autoencoder v5 (TopK) and Transformer Debugger v1 and v4 (ReLU).

    TopK: x = (x - mean) / (std + eps), undone after decoding; ReLU files normalise nothing
    pre = (x - pre_bias) @ encoder.weight^T + latent_bias;  recon = f @ decoder.weight^T + pre_bias

Without `activation` a file is ReLU, without `decoder.weight` it is tied. No file says where it was
trained: a folder above it does (`resid_delta_mlp_v4/autoencoders/3.pt`).
"""

import re
from pathlib import Path

import torch

from services.inference.engine.dictionaries.dictionary import (
    Activation,
    Dictionary,
    InputNorm,
    NormKind,
    Relu,
    TopK,
)
from services.inference.engine.dictionaries.files import TensorFile
from services.inference.engine.dictionaries.readings import (
    Origin,
    Reading,
    checked_k,
    encoder,
    matrix,
    refuse_option,
)
from services.inference.engine.dictionaries.sites import Declared, Header, Point, Site

_POINTS = {
    "resid-delta-mlp": Point.MLP_OUT,
    "resid-delta-attn": Point.ATTN_OUT,
    "mlp-post-act": Point.MLP_ACT,
    "resid-post-attn": Point.RESID_MID,
    "resid-post-mlp": Point.RESID_POST,
}
_FILE = re.compile(r"(\d+)\.pt\Z")
_STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")


def matches(folder: Path) -> bool:
    return any(_FILE.match(path.name) for path in folder.glob("*.pt"))


def read(folder: Path, origin: Origin) -> list[Reading]:
    """The dictionaries of the folder's layers, in their order. Raises FailedPrecondition."""
    layers = {int(m[1]): path for path in folder.glob("*.pt") if (m := _FILE.match(path.name))}
    return [read_file(layers[layer], origin) for layer in sorted(layers)]


def read_file(path: Path, origin: Origin) -> Reading:
    """One file. Raises FailedPrecondition."""
    site_in, site_out = _sites(path, origin)
    file = TensorFile(path)
    tied = "decoder.weight" not in file.shapes
    required = ["pre_bias", "latent_bias", "encoder.weight"]
    file.require(required if tied else [*required, "decoder.weight"], _STATISTICS)
    latents, width = file.length("latent_bias"), file.length("pre_bias")
    activation, norm = _activation(file, latents)
    w_enc = encoder(file, "encoder.weight", latents, turned=True)
    matrix(file, "encoder.weight", width, latents, turned=True)
    w_dec = None if tied else matrix(file, "decoder.weight", latents, width, turned=True)
    header = Header(
        id="",
        site_in=site_in,
        site_out=site_out,
        d_in=width,
        d_out=width,
        latents=latents,
        activation="topk" if isinstance(activation, TopK) else "relu",
        declared=Declared(),
        provenance=origin.provenance("openai", path),
    )

    def load() -> Dictionary:
        encoding, bias = w_enc.read(), file.read("pre_bias")
        return Dictionary(
            header,
            encoding,
            encoding.T.contiguous() if w_dec is None else w_dec.read(),
            file.read("latent_bias"),
            b_in=bias,
            b_dec=bias.clone(),
            activation=activation,
            norm=norm,
        )

    return Reading(path, header, load)


def _sites(path: Path, origin: Origin) -> tuple[Site, Site]:
    number = _FILE.match(path.name)
    layer = int(number[1]) if number else None
    for part in reversed(path.parent.parts):
        name = part.replace("_", "-").lower()
        for key, point in _POINTS.items():
            if key in name and layer is not None:
                return origin.place(path, Site(point, layer), Site(point, layer))
    return origin.place_unnamed(
        path,
        layer,
        before_post_norm=False,
        looked=f"no folder above LAYER.pt is called after one of {', '.join(_POINTS)}",
    )


def _activation(file: TensorFile, latents: int) -> tuple[Activation, InputNorm]:
    name = file.notes.get("activation", "ReLU")
    state = file.notes.get("activation_state_dict", {})
    unknown = sorted(set(file.notes) - {"activation", "activation_state_dict"})
    if unknown:
        raise refuse_option(file.path, unknown[0], file.notes[unknown[0]], "no such entry")
    match name:
        case "ReLU":
            return Relu(), InputNorm()
        case "TopK":
            k, after = state.get("k"), state.get("postact_fn", "ReLU")
            if isinstance(k, torch.Tensor) and k.numel() == 1:
                k = int(k)
            k = checked_k(file.path, "activation_state_dict.k", k, latents)
            if after != "ReLU":
                raise refuse_option(file.path, "activation_state_dict.postact_fn", after, "ReLU")
            return TopK(k), InputNorm(NormKind.LAYER_NORM, eps=1e-5)
    raise refuse_option(file.path, "activation", name, "ReLU or TopK")
